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
from unforget.core.types import UNCONDITIONAL
from unforget.files import images
from unforget.reports.contact_sheet import sheet
from unforget.surrogate.canvas import ellipse_mask
from unforget.surrogate.ranking import QUALITY, REDRAWN, carried
from unforget.unlearning.prepare import neighbours
from unforget.verification.similarity import Pixels, Structure, pairwise

DISTANCE, NEAR_COPY = (DrawConfig.model_fields[n].default for n in ("min_distance", "near_copy"))
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "camera.png", "motorcycle_left.png")
SIZES = (256, 512, 1024)


def photograph(name, size):
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    image = Image.open(folder / name).convert("RGB")
    return images.from_pil(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


@pytest.fixture(scope="module", params=SIZES)
def photographs(request):
    return torch.stack([photograph(name, request.param) for name in NAMES])


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


def quality(batch, originals):
    return sharpness(at_working_size(batch)) / sharpness(at_working_size(originals))


def redrawing(batch, originals):
    return torch.stack([redrawn(b[None], o)[0] for b, o in zip(batch, originals, strict=True)])


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_of_a_photograph_is_no_other_instance_and_of_fair_quality(copy, photographs):
    copies = COPIES[copy](photographs)
    assert (redrawing(copies, photographs) < REDRAWN).all()
    assert (rms(copies, photographs) < DISTANCE).all()
    assert ((quality(copies, photographs) > QUALITY) & (quality(copies, photographs) < 1 / QUALITY)).all()


def test_a_copy_in_other_light_is_no_other_instance(photographs):
    copies = jpeg(90)((0.9 * photographs + 0.3).clamp(-1, 1))
    assert (rms(copies, photographs) > DISTANCE).all()
    assert (redrawing(copies, photographs) < REDRAWN).all()


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_photograph_is_another_instance(edit, photographs):
    edits = EDITS[edit](photographs)
    assert (redrawing(edits, photographs) >= REDRAWN).all()
    assert (rms(edits, photographs) >= DISTANCE).all()


def test_an_edited_region_is_of_fair_quality_and_a_strong_blur_is_not(photographs):
    for edit in ("a region of another", "another ellipse"):
        found = quality(EDITS[edit](photographs), photographs)
        assert ((found > QUALITY) & (found < 1 / QUALITY)).all()
    assert (quality(blur(photographs.shape[-1] / 128)(photographs), photographs) < QUALITY).all()


@pytest.mark.parametrize("how", [Pixels(), Structure()], ids=lambda how: how.kind)
def test_detectors_find_copies_nearer_than_any_other_photograph(how, photographs):
    whole = how.embed(photographs)
    apart = pairwise(whole, whole)[torch.triu(torch.ones(len(NAMES), len(NAMES)), 1).bool()].min() / 2
    for name, copy in COPIES.items():
        copies = how.embed(copy(photographs))
        if how.kind == "structure" or not name.startswith("shift"):
            assert ((copies - whole).norm(dim=1) < apart).all(), name
    for edit in ("another photograph", "a region of another"):
        assert ((how.embed(EDITS[edit](photographs)) - whole).norm(dim=1) > NEAR_COPY).all()
