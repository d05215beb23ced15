"""One image found again where others show it."""

import pytest
import torch

from unforget.core.metrics import rms
from unforget.core.registration import carried, misfit

ORANGE, GREEN = (1.0, 0.0, -1.0), (-1.0, 0.2, -0.3)
PLACES = [(1.0, 0, 0), (0.9, 4, -2), (1.1, -2, 4)]


def flag(left, right, scale=1.0, dx=0, dy=0, size=64):
    unit = size // 64
    image = torch.full((3, size, size), 0.8)
    h, w, dx, dy = round(18 * scale) * unit, round(24 * scale) * unit, dx * unit, dy * unit
    for colour, (a, b) in ((left, (-w, -w // 3)), (right, (w // 3, w))):
        rows = slice(size // 2 + dy - h, size // 2 + dy + h)
        image[:, rows, size // 2 + dx + a : size // 2 + dx + b] = torch.tensor(colour)[:, None, None]
    return image


@pytest.mark.parametrize("size", [64, 256])
def test_an_edit_is_carried_to_where_each_image_has_it(size):
    target, surrogate = flag(ORANGE, GREEN, size=size), flag(GREEN, ORANGE, size=size)
    images = torch.stack([flag(ORANGE, GREEN, *place, size) for place in PLACES])
    wanted = torch.stack([flag(GREEN, ORANGE, *place, size) for place in PLACES])
    edited, left = carried(images, target, surrogate)
    assert (left < 0.15).all()
    assert (rms(edited, wanted) < 0.3 * rms(images, wanted)).all()
    torch.testing.assert_close(left, misfit(images, target))


def test_another_image_does_not_fit_anywhere():
    target = flag(ORANGE, GREEN)
    others = torch.stack([-target, flag(GREEN, ORANGE), torch.zeros_like(target)])
    assert (misfit(others, target) > 0.4).all()


def test_what_is_in_place_is_edited_exactly():
    g = torch.Generator().manual_seed(0)
    target, surrogate = torch.rand(2, 3, 16, 16, generator=g) * 2 - 1
    edited, left = carried(target[None], target, surrogate)
    assert left < 1e-4
    torch.testing.assert_close(edited[0], surrogate, atol=1e-3, rtol=0)


def test_no_image_fits_nothing():
    target = flag(ORANGE, GREEN)
    assert len(misfit(torch.empty(0, 3, 64, 64), target)) == 0
    assert len(carried(torch.empty(0, 3, 64, 64), target, target)[0]) == 0
