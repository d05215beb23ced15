"""Finding one image again where another shows it, moved and scaled: that is how a prompted model repeats what it draws.

All images are (C, H, W) or (N, C, H, W) in [-1, 1]; places are compared at the working size of `metrics`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from unforget.core.metrics import at_working_size, pairwise_rms

UNRELATED = 0.05
"""Share of the images of other prompts that may lie as near to an image, moved and scaled, as what shows it."""
SHIFTS, SCALES = torch.linspace(-0.08, 0.08, 11), torch.linspace(0.8, 1.2, 9)
"""What is tried each way: shifts as shares of the width, and scales."""


def _places() -> Tensor:
    """All places that are tried, as `affine_grid` takes them, (P, 2, 3)."""
    # The width is 2 in the units of `affine_grid`.
    scale, dx, dy = (a.flatten() for a in torch.meshgrid(SCALES, 2 * SHIFTS, 2 * SHIFTS, indexing="ij"))
    zero = torch.zeros_like(scale)
    return torch.stack([torch.stack([1 / scale, zero, dx], 1), torch.stack([zero, 1 / scale, dy], 1)], 1)


def _moved(image: Tensor, places: Tensor) -> Tensor:
    grid = functional.affine_grid(places, [len(places), *image.shape], align_corners=False)
    whole = image.expand(len(places), -1, -1, -1)
    return functional.grid_sample(whole, grid, padding_mode="border", align_corners=False)


def _registered(images: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """RMS between images (N, C, H, W) and the nearest place of `image`, and which place that is, both (N,)."""
    if not len(images):
        return torch.empty(0), torch.empty(0, dtype=torch.long)
    distances = pairwise_rms(images, _moved(at_working_size(image), _places()))
    nearest = distances.min(1)
    return nearest.values, nearest.indices


def misfit(images: Tensor, image: Tensor) -> Tensor:
    """RMS of images (N, C, H, W) to the nearest place of another image, (N,): small if they show the same thing."""
    return _registered(images, image)[0]


def carried(images: Tensor, target: Tensor, surrogate: Tensor) -> tuple[Tensor, Tensor]:
    """The edit from target to surrogate, moved to where each image (N, C, H, W) shows the target; and their misfit."""
    left, which = _registered(images, target)
    edits = [_moved(surrogate - target, _places()[i : i + 1]) for i in which.tolist()]
    return (images + torch.cat(edits)).clamp(-1, 1) if edits else images, left
