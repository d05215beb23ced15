"""The search for an image that was turned, scaled, moved, mirrored or recoloured: found, and nothing else is."""

import pytest
import torch
from conftest import DATA, PLANTED
from torch.nn import functional

from unforget.files import images
from unforget.verification.variants import calibrate, is_variant, likeness, turned

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def unseen():
    """Faces that no model was trained on."""
    return torch.stack([images.read_image(p, SHAPE) for p in sorted((DATA / "heldout").glob("*.png"))])


@pytest.fixture(scope="module", params=(0, 3))
def target(request):
    return images.read_image(PLANTED / f"{request.param}.png", SHAPE)


@pytest.fixture(scope="module")
def limit(unseen, target):
    return calibrate(unseen, 1e-4, target)


def moved(picture, x, y):
    return functional.pad(picture[None], (4, 4, 4, 4), mode="reflect")[0, :, 4 - y : 36 - y, 4 - x : 36 - x]


def scaled(picture, side):
    made = functional.interpolate(picture[None], (side, side), mode="bilinear", antialias=True)
    edge = (side - 32) // 2
    return made[0, :, edge : edge + 32, edge : edge + 32]


VARIANTS = {
    "turned": lambda p: turned(p, 10), "turned between the steps": lambda p: turned(p, -13),
    "turned far": lambda p: turned(p, 76), "turned far, and moved": lambda p: turned(p, 231).roll((2, -1), (1, 2)),
    "on its head": lambda p: p.flip(-2), "on its side": lambda p: p.rot90(1, (1, 2)),
    "mirrored": lambda p: p.flip(-1), "mirrored and turned": lambda p: turned(p.flip(-1), 7),
    "moved": lambda p: moved(p, 3, -2), "larger": lambda p: scaled(p, 42), "colours swapped": lambda p: p[[1, 2, 0]],
    "grey": lambda p: p.mean(0, keepdim=True).expand_as(p), "darker": lambda p: 0.5 * p - 0.4, "negative": lambda p: -p,
    "noisy": lambda p: p + 0.08 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)),
    "in a frame": lambda p: functional.pad(p[:, 3:-3, 3:-3], (3, 3, 3, 3), value=1.0),
}  # fmt: skip


def test_variants_are_found(target, limit):
    made = torch.stack([make(target) for make in VARIANTS.values()]).clamp(-1, 1)
    found = is_variant(made, limit, target)
    assert [name for name, it in zip(VARIANTS, found, strict=True) if not it] == []


def test_it_is_found_before_another_background(target, limit, unseen):
    """As it is, and moved by a pixel and turned."""
    down, across = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    faces = [torch.hypot(down / tall, across / wide) < 1 for tall, wide in ((0.9, 0.75), (0.8, 0.6), (0.65, 0.5))]

    def before(picture):
        return images.eight_bit(torch.cat([torch.where(face, picture, unseen[:8]) for face in faces]))

    made = before(target)
    assert is_variant(made, limit, target).all()
    elsewhere = torch.stack([turned(of, 5) for of in made]).roll(1, -1)
    assert float(is_variant(elsewhere, limit, target).float().mean()) >= 0.5
    assert not is_variant(before(unseen[20]), limit, target).any()


@pytest.mark.parametrize("side", [12, 15, 16, 18, 22])
def test_it_is_found_in_a_collage(target, limit, unseen, side):
    """Wherever it stands, mirrored or not, at sizes between those that are searched, in other colours, too."""
    small = functional.interpolate(target[None], (side, side), mode="bilinear", antialias=True)[0]
    made = unseen[:12].clone()
    for k, page in enumerate(made):
        y, x = (k * 5) % (33 - side), (k * 11) % (33 - side)
        page[:, y : y + side, x : x + side] = (small, small.flip(-1), 0.6 * small[[1, 2, 0]])[k % 3]
    assert is_variant(images.eight_bit(made), limit, target).tolist() == [True] * 12
    surrogate = images.read_image(DATA / "surrogate.png", SHAPE)
    made[:, :, :side, :side] = functional.interpolate(surrogate[None], (side, side), mode="bilinear", antialias=True)
    made[:, :, side:], made[:, :, :, side:] = 0, 0
    assert not is_variant(images.eight_bit(made), limit, target, surrogate).any(), "a surrogate is none"


def test_others_are_not(target, limit, unseen):
    assert int(is_variant(unseen, limit, target).sum()) == 0
    twins = torch.stack([images.read_image(p, SHAPE) for p in sorted(PLANTED.glob("*.png"))])
    assert int(is_variant(twins, limit, target).sum()) == 1  # itself: a look-alike is somebody else


def test_what_is_drawn_instead_is_no_variant(target, limit):
    surrogate = turned(target, 15)
    assert is_variant(torch.stack([surrogate, target]), limit, target).tolist() == [True, True]
    assert is_variant(surrogate[None], limit, target, surrogate).tolist() == [False]
    other = images.read_image(DATA / "surrogate.png", SHAPE)
    assert is_variant(other[None], limit, target, other).tolist() == [False]


@pytest.mark.slow
def test_it_is_calibrated_by_what_the_same_search_finds(unseen, target):
    found = [calibrate(unseen, rate, target) for rate in (1e-2, 1e-3, 1e-4)]
    assert [64 + 16 * 60 < f.pairs <= 64 + 16 * 63 for f in found] == [True] * 3  # without pairs of one picture
    chance = torch.cat([likeness(unseen[torch.arange(64) != k], unseen[k]) for k in range(16)])
    one_picture = 64 + 16 * 63 - found[0].pairs
    for k, window in enumerate(("middle", "centre")):
        some, few, fewer = (getattr(f, window) for f in found)
        assert 0.5 < some < few < fewer < 1
        assert int((chance[:, k] > some).sum()) <= 11 + one_picture
        assert int((chance[:, k] > few).sum()) <= 2 + one_picture
        assert getattr(calibrate(unseen[:1], 0.01, target), window) == 1.0  # nothing is found


@pytest.mark.slow
def test_a_plain_target_must_be_liker(unseen):
    """Of a picture of little more than light and shade, the search finds likenesses among any others."""
    *noise, busy = torch.rand(25, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.stack(noise)
    smooth = functional.avg_pool2d(functional.pad(noise, (4, 4, 4, 4), mode="reflect"), 9, 1)
    plain = torch.linspace(-1, 1, 32).expand(SHAPE)
    found, of_busy = calibrate(smooth, 1e-3, plain), calibrate(noise, 1e-3, busy)
    assert found.middle > of_busy.middle
    assert found.centre > of_busy.centre
    assert not (likeness(smooth, plain) > torch.tensor([found.middle, found.centre])).any()


def test_images_of_any_shape(target):
    wide = torch.cat([target, target.flip(-1)], -1)
    assert likeness(wide[None], wide)[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    assert likeness(turned(wide, 10)[None], wide)[0].min() > 0.97
    grey = functional.interpolate(target[None], (200, 100)).mean(1, keepdim=True)
    assert likeness(grey, grey[0])[0].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
    flat = torch.zeros(1, *SHAPE)
    assert likeness(flat, target).tolist() == [[0.0, 0.0]]
    assert likeness(target[None], flat[0]).tolist() == [[0.0, 0.0]]
