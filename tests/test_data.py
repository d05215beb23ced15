import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from unforget.core import sampling
from unforget.core.recipe import Recipe
from unforget.core.schedule import Schedule
from unforget.core.types import Instance, Pool
from unforget.errors import UsageError
from unforget.files import cache, images
from unforget.unlearning.batches import batches

SHAPE = (3, 16, 16)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_a_png_survives_the_round_trip(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = images.read_image(tmp_path / "a.png", SHAPE)
    assert image.shape == SHAPE
    assert image.min() >= -1
    assert image.max() <= 1
    images.write_image(image, tmp_path / "b.png")
    assert (np.array(Image.open(tmp_path / "b.png")) == pixels).all()
    assert images.image_id(images.read_image(tmp_path / "b.png", SHAPE)) == images.image_id(image)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "LA", "P", "I;16", "1", "L"])
def test_other_modes_are_converted_and_said_so(tmp_path, pixels, mode):
    path, notes = tmp_path / "a.tiff", []
    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    (grey if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(path)
    read = images.read_image(path, SHAPE, note=notes.append)
    assert read.shape == SHAPE
    assert bool(notes) == (mode != "L")
    if mode == "I;16":
        torch.testing.assert_close(read[0], torch.from_numpy(pixels[..., 0]).float() / 127.5 - 1)


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (images.read_image(tmp_path / "a.png", SHAPE) == 1).all()


def broken(tmp_path, name):
    path = tmp_path / name
    good = Image.new("RGB", (16, 16), "red")
    if name == "folder":
        path.mkdir()
    elif name == "empty.png":
        path.touch()
    elif name == "text.png":
        path.write_text("not a picture")
    elif name == "truncated.png":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif name == "frames.gif":
        good.save(path, save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")])
    elif name == "wide.png":
        Image.new("RGB", (20_000, 4)).save(path)
    elif name == "large.png":
        Image.new("RGB", (64, 64)).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.png", "there is no file"),
        ("folder", "is a folder"),
        ("empty.png", "is empty"),
        ("text.png", "is not an image"),
        ("truncated.png", "cannot be decoded"),
        ("frames.gif", "has 2 frames"),
        ("wide.png", "is 20000x4 pixels, more than 8192"),
        ("large.png", "is 64x64 pixels, the model's images are 16x16"),
    ],
)
def test_what_is_no_picture_of_the_model_is_a_usage_error(tmp_path, name, sentence):
    with pytest.raises(UsageError, match=sentence) as caught:
        images.read_image(broken(tmp_path, name), SHAPE)
    assert caught.value.hint


def test_resize_on_request(tmp_path):
    assert images.read_image(broken(tmp_path, "large.png"), SHAPE, resize=True).shape == SHAPE


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(UsageError, match="not a folder with images"):
        images.read_folder(tmp_path, SHAPE)


def test_noise_of_a_seed_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(sampling.random_noise(5, SHAPE, 3, "a")[:2], sampling.random_noise(2, SHAPE, 3, "a"))
    others = [sampling.random_noise(5, SHAPE, seed, purpose) for seed, purpose in ((3, "a"), (4, "a"), (3, "b"))]
    assert len({float(row.sum()) for noise in others for row in noise}) == 15


def test_drawing_in_batches_changes_nothing(tiny, monkeypatch):
    noise = sampling.random_noise(3, tiny.latent_shape, 0, "test")
    whole = sampling.draw(tiny, noise, steps=3)
    monkeypatch.setattr(sampling, "PIXELS_DRAWN", 1)
    parts = sampling.draw(tiny, noise, steps=3)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_the_retain_set_is_drawn_once(tiny):
    calls, denoise = [], tiny.denoise
    tiny.denoise = lambda *a, **k: calls.append(1) or denoise(*a, **k)
    first = cache.drawn_cached(tiny, "d" * 64, [""] * 4, seed=0, steps=2)
    assert torch.equal(cache.drawn_cached(tiny, "d" * 64, [""] * 4, seed=0, steps=2), first)
    assert len(calls) == 1
    for path in cache.cache_folder().glob("retain-*"):
        path.write_bytes(b"damaged")
    assert torch.equal(cache.drawn_cached(tiny, "d" * 64, [""] * 4, seed=0, steps=2), first)
    assert len(calls) == 2


@pytest.fixture
def schedule():
    return Schedule.from_diffusers(DDPMScheduler())


def draws(schedule, seed=0, **changes):
    target, surrogate, *keep = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    options = {"max_train_steps": 3, "forget_batch_size": 8, "retain_batch_size": 6, "forget_range": (200, 500)}
    instances = [Instance(target, surrogate, "t"), Instance(surrogate, target, "u")]
    keep = Pool.of(torch.stack(keep))
    generator = torch.Generator().manual_seed(seed)
    pairs = batches(instances, keep, keep[:1], schedule, Recipe(**{**options, **changes}), generator=generator)
    return list(pairs), instances, keep


def test_batches_pair_targets_with_their_own_surrogates(schedule):
    pairs, instances, _ = draws(schedule)
    for forget, _ in pairs:
        for x_0, x_s in zip(forget.x_0, forget.x_s, strict=True):
            assert any(torch.equal(x_0, i.target) and torch.equal(x_s, i.surrogate) for i in instances)
        assert sum(torch.equal(x, instances[0].target) for x in forget.x_0) == 4
        assert torch.equal(forget.x_t, schedule.add_noise(forget.x_0, forget.noise, forget.timestep))


def test_levels_cover_their_range_evenly(schedule):
    pairs, _, _ = draws(schedule)
    for forget, retain in pairs:
        assert forget.timestep.min() >= 200
        assert forget.timestep.max() < 500
        assert len(set(((forget.timestep - 200) * 8 // 300).tolist())) >= 7
        assert retain.timestep.max() > 500


def test_half_of_the_retain_batch_is_near_a_target(schedule):
    pairs, _, keep = draws(schedule)
    for _, retain in pairs:
        assert all(torch.equal(x, keep.x_0[0]) for x in retain.x_0[:3])


def test_batches_are_those_of_their_seed(schedule):
    first, again, other = (draws(schedule, seed=seed)[0][0][0] for seed in (0, 0, 1))
    assert torch.equal(first.x_t, again.x_t)
    assert not torch.equal(first.x_t, other.x_t)


def test_forget_and_retain_have_noise_levels_of_their_own(schedule):
    forget, retain = draws(schedule, retain_batch_size=8, forget_range=(1, 1000))[0][0]
    assert not torch.equal(forget.timestep, retain.timestep)
