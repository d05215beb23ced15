"""Figures of similarity and quality must mean the same at the sizes that models draw: with photographs."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.nn import functional

from unforget.config.base import DrawConfig
from unforget.core import metrics
from unforget.core.metrics import WORKING_SIZE, at_working_size, pairwise_rms, redrawn, rms, sharpness, shows
from unforget.core.registration import carried
from unforget.files import images
from unforget.reports.contact_sheet import sheet
from unforget.surrogate.canvas import ellipse_mask
from unforget.surrogate.ranking import QUALITY, REDRAWN
from unforget.unlearning.prepare import neighbours
from unforget.verification.near_copies import once
from unforget.verification.similarity import Pixels, Structure, pairwise

DISTANCE, NEAR_COPY = (DrawConfig.model_fields[n].default for n in ("min_distance", "near_copy"))
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "camera.png")
SIZES = (256, 512, 1024)


def photograph(name, size):
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    image = Image.open(folder / name).convert("RGB")
    return images.from_pil(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module", params=SIZES)
def photographs(request):
    names = NAMES if request.param < 1024 else NAMES[:3]  # the largest cost most
    return torch.stack([photograph(name, request.param) for name in names])


def each(edit):
    return lambda batch: torch.stack([images.from_pil(edit(images.to_pil(image))) for image in batch])


def jpeg(quality):
    def saved(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return each(saved)


def blur(pixels):
    return each(lambda image: image.filter(ImageFilter.GaussianBlur(pixels)))


def shift(pixels):
    def moved(batch):
        height, width = batch.shape[-2:]
        return functional.pad(batch, (pixels, 0, pixels, 0), mode="replicate")[..., :height, :width]

    return moved


def half_size(batch):
    half = functional.interpolate(batch, scale_factor=0.5, mode="bicubic", antialias=True)
    return functional.interpolate(half, batch.shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)


def noise(batch):
    return batch + 0.04 * torch.randn(batch.shape, generator=torch.Generator().manual_seed(0))


COPIES = {
    "jpeg 75": jpeg(75),
    "jpeg 90": jpeg(90),
    "blur": blur(0.7),
    "shift 1": shift(1),
    "shift 2": shift(2),
    "half size": half_size,
    "brighter": lambda batch: (batch + 0.04).clamp(-1, 1),
    "png": images.eight_bit,
    "noise": noise,
}


def inside(mask, batch):
    """Each photograph with another one inside the mask."""
    return mask * batch.roll(1, 0) + (1 - mask) * batch


def box(batch):
    height, width = batch.shape[-2:]
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    return inside(mask, batch)


EDITS = {
    "another photograph": lambda batch: batch.roll(1, 0),
    "a region of another": box,
    "another ellipse": lambda batch: inside(ellipse_mask(*batch.shape[-2:]), batch),
}


LIGHTER = {"jpeg 90, lighter": lambda batch: jpeg(90)((0.9 * batch + 0.3).clamp(-1, 1))}
BLURRED = {"strong blur": lambda batch: blur(batch.shape[-1] / 128)(batch)}


def quality(batch, originals):
    return sharpness(at_working_size(batch)) / sharpness(at_working_size(originals))


@pytest.fixture(scope="module")
def made(photographs):
    """What every change makes of the photographs, by name."""
    return {name: change(photographs) for name, change in {**COPIES, **EDITS, **LIGHTER, **BLURRED}.items()}


@pytest.fixture(scope="module")
def redrawing(photographs, made):
    """How much every change redraws each photograph, by name."""
    each = [redrawn(torch.stack([batch[i] for batch in made.values()]), p) for i, p in enumerate(photographs)]
    return dict(zip(made, torch.stack(each, 1), strict=True))


def fair(batch, originals):
    share = quality(batch, originals)
    return (share > QUALITY) & (share < 1 / QUALITY)


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_photograph_is_no_other_instance_and_of_fair_quality(copy, photographs, made, redrawing):
    assert (redrawing[copy] < REDRAWN).all()
    assert (rms(made[copy], photographs) < DISTANCE).all()
    assert fair(made[copy], photographs).all()


def test_a_copy_in_other_light_is_no_other_instance(photographs, made, redrawing):
    (name,) = LIGHTER
    assert (rms(made[name], photographs) > DISTANCE).all()
    assert (redrawing[name] < REDRAWN).all()


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_photograph_is_another_instance(edit, photographs, made, redrawing):
    assert (redrawing[edit] >= REDRAWN).all()
    assert (rms(made[edit], photographs) >= DISTANCE).all()
    assert fair(made[edit], photographs).all() or edit == "another photograph"  # it may have more or less detail


def test_a_strong_blur_is_of_poor_quality(photographs, made):
    assert not fair(made["strong blur"], photographs).any()


@pytest.mark.parametrize("how", [Pixels(), Structure()], ids=lambda how: how.kind)
def test_detectors_find_copies_nearer_than_any_other_photograph(how, photographs, made):
    whole = how.embed(photographs)
    distances = pairwise(whole, whole)
    apart = distances[once(distances)].min() / 2
    for name in COPIES:
        if how.kind == "structure" or not name.startswith("shift"):
            assert ((how.embed(made[name]) - whole).norm(dim=1) < apart).all(), name
    for name in ("another photograph", "a region of another"):
        assert ((how.embed(made[name]) - whole).norm(dim=1) > NEAR_COPY).all(), name


# --- the working size itself


def test_what_is_no_larger_than_the_working_size_is_left_as_it_is():
    for size in ((32, 32), (64, 64), (WORKING_SIZE, 40)):
        small = torch.randn(3, 3, *size)
        assert at_working_size(small) is small
        target, others = small[0], small[1:]
        assert torch.equal(rms(others, target), (others - target).square().mean((1, 2, 3)).sqrt())
        drawing = metrics.laplacian(target)
        exact = (metrics.laplacian(others) - drawing).square().mean((1, 2, 3)).sqrt() / drawing.square().mean().sqrt()
        assert torch.equal(redrawn(others, target), exact)


def test_a_scaled_image_keeps_its_proportions_its_mean_and_its_leading_dimensions():
    whole = photograph("chelsea.png", 512)[None, None, :, :256].expand(2, 3, -1, -1, -1)
    small = at_working_size(whole)
    assert small.shape == (2, 3, 3, WORKING_SIZE // 2, WORKING_SIZE)
    torch.testing.assert_close(small.mean((-2, -1)), whole.mean((-2, -1)), atol=0.01, rtol=0)
    assert at_working_size(small) is small


def test_figures_are_the_same_at_every_size():
    """The same pair of pictures, at three sizes."""
    found = []
    for size in SIZES:
        a, b = photograph("astronaut.png", size), photograph("coffee.png", size)
        found.append([float(v) for v in (rms(a, b), redrawn(b[None], a)[0], quality(b[None], a[None])[0])])
    torch.testing.assert_close(torch.tensor(found), torch.tensor(found[:1]).expand(3, -1), atol=0, rtol=0.08)


def test_a_photograph_shows_its_target_wherever_the_copy_comes_from(photographs, made):
    target, surrogate = photographs[0], made["a region of another"][0]
    copies = torch.stack([made[name][0] for name in COPIES])
    assert shows(copies, target, surrogate).all()
    assert not shows(torch.stack([surrogate, photographs[2]]), target, surrogate).any()


def test_an_edit_is_carried_at_full_size(photographs, made):
    target, surrogate = photographs[0], made["a region of another"][0]
    (edited,), (misfit,) = carried(made["jpeg 90"][:1], target, surrogate)
    assert misfit < 0.1
    assert edited.shape == target.shape
    assert rms(edited, surrogate) < 0.25 * rms(target, surrogate)


def test_the_neighbours_of_a_photograph_are_its_copies(photographs, made):
    copies = torch.stack([made[name][0] for name in COPIES])
    nearest = neighbours(torch.cat([photographs[1:], copies]), photographs[:1], len(copies))
    assert nearest.min() >= len(photographs) - 1
    near = pairwise_rms(copies, photographs[:1])[:, 0] < NEAR_COPY
    assert near[[name != "shift 2" for name in COPIES]].all()  # 1 % of the side, at 256 px


@pytest.mark.parametrize(("size", "cell"), [(32, 96), (128, 128), (512, 256)])
def test_a_sheet_shows_images_as_large_as_they_are_within_bounds(size, cell):
    picture = torch.ones(3, size // 2, size)
    picture[:, :, : size // 2] = -1
    drawn = sheet("title", [("row", [(picture, "a"), (picture, "b")])])
    dark = [x for x in range(drawn.width) if drawn.getpixel((x, 60))[0] < 128]
    assert len(dark) == cell  # half of each of two cells
    assert drawn.height == 8 + 28 + 14 + 6 + cell + 14 + 8 + 8
