"""Scores: plain functions from images or counts to numbers."""

import torch
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional


def rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference over each image, in pixels of [-1, 1]; (..., C, H, W) to (...)."""
    return (a - b).square().mean((-3, -2, -1)).sqrt()


COMPARED = 128
"""Shorter side, in pixels, at which larger images are compared and kept: what makes two images one is larger."""


def compared(images: Tensor) -> Tensor:
    """Images (..., C, H, W) at the size at which they are compared: averaged, or as they are where they are small."""
    height, width = images.shape[-2:]
    if min(height, width) <= COMPARED:
        return images
    factor = COMPARED / min(height, width)
    return functional.adaptive_avg_pool2d(images, (round(height * factor), round(width * factor)))


def region(target: Tensor, surrogate: Tensor, share: float = 0.9) -> Tensor:
    """Where two images (C, H, W) differ: the fewest pixels that carry `share` of the squared difference, (H, W)."""
    square = (target - surrogate).square().sum(0)
    order = square.flatten().argsort(descending=True, stable=True)
    carried = square.flatten()[order].cumsum(0)
    where = torch.zeros(square.numel(), dtype=torch.bool)
    where[order[: int((carried < share * carried[-1]).sum()) + 1]] = True
    return where.reshape(square.shape)


def rms_within(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """RMS over the pixels of a region (H, W) alone; (..., C, H, W) to (...)."""
    return (a - b).square()[..., where].mean((-2, -1)).sqrt()


def pairwise_rms(a: Tensor, b: Tensor) -> Tensor:
    """RMS between every image of a (N, C, H, W) and of b (M, C, H, W): (N, M)."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    square = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
    return (square / a.shape[1]).clamp(min=0).sqrt().float()


def margin(images: Tensor, target: Tensor, surrogate: Tensor) -> Tensor:
    """How much nearer images are to the surrogate than to the target, (N,): 1 at the surrogate, -1 at the target."""
    return (rms(images, target) - rms(images, surrogate)) / rms(target, surrogate)


SIDED = -0.25  # margin up to which an image drawn under a prompt counts as the target, perhaps in another place or size


def shows(images: Tensor, target: Tensor, surrogate: Tensor) -> Tensor:
    """Which images (N, C, H, W) are clearly nearer to the target than to the surrogate, wherever they have it, (N,).

    An unrelated image is about as far from both; where target and surrogate are one image, nothing shows it.
    """
    apart = rms(target, surrogate)
    return (rms(images, target) - rms(images, surrogate) <= SIDED * apart) & (apart > 0)


def upper_bound(hits: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound of a rate; about 3 / n at no hit and 95 %."""
    return 1.0 if hits >= n else float(beta.ppf(confidence, hits + 1, n - hits))


def lower_bound(hits: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson lower bound of a rate."""
    return 0.0 if hits == 0 else float(beta.ppf(1 - confidence, hits, n - hits + 1))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD between features (N, D) and (M, D) under KID's cubic kernel (arXiv:1801.01401).

    Features are scaled to a mean square of 1 over `a`, so that the figure does not depend on their unit.
    """
    a, b = a.double(), b.double()
    scale = a.square().sum(1).mean().clamp(min=1e-12)
    within = [((x @ x.T) / scale + 1) ** 3 for x in (a, b)]
    inside = sum(float((k.sum() - k.diag().sum()) / (len(k) * (len(k) - 1))) for k in within)
    return inside - 2 * float((((a @ b.T) / scale + 1) ** 3).mean())


def laplacian(images: Tensor) -> Tensor:
    """Each pixel's difference from its four neighbours, (..., C, H - 2, W - 2): what is drawn, without flat colour."""
    centre = images[..., 1:-1, 1:-1]
    around = images[..., :-2, 1:-1] + images[..., 2:, 1:-1] + images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    return 4 * centre - around


def sharpness(images: Tensor) -> Tensor:
    """Mean absolute Laplacian of each image, (N,): falls with blur, rises with left-over noise."""
    return laplacian(images).abs().mean((-3, -2, -1))


def redrawn(images: Tensor, target: Tensor) -> Tensor:
    """RMS between the Laplacians of images and target, as a share of the target's own, (N,); 1.4 if unrelated."""
    drawing = laplacian(target)
    return rms(laplacian(images), drawing) / drawing.square().mean().sqrt().clamp(min=1e-6)
