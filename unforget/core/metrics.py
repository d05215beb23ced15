"""Scores: plain functions from images or counts to numbers.

Images are compared at one working size: a figure means, and costs, the same at 64 and at 1024 pixels. At full size a
recompressed or hardly blurred copy of a photograph differs from it in every fine detail.
"""

import math

import torch
from scipy.stats import beta, binom, nct, norm
from torch import Tensor
from torch.nn import functional

WORKING_SIZE = 80
"""Longest side, in pixels, at which images are compared. Above, JPEG 75 redraws a photograph of 256 px as much as an
edit does; below, a blur of 4 px at 512 px still counts as sharp: `docs/results.md`, Photographs."""


def at_working_size(images: Tensor) -> Tensor:
    """Images (..., C, H, W) scaled down to the working size, antialiased; smaller ones as they are."""
    factor = max(images.shape[-2:]) / WORKING_SIZE
    if factor <= 1:
        return images
    size = [max(1, round(side / factor)) for side in images.shape[-2:]]
    planes = images.reshape(-1, 1, *images.shape[-2:])
    small = functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return small.reshape(*images.shape[:-2], *size)


def exact_rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference over the last three dimensions, of all numbers; for latents, too."""
    return (a - b).square().mean((-3, -2, -1)).sqrt()


def rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference over each image, in pixels of [-1, 1]; (..., C, H, W) to (...)."""
    return exact_rms(at_working_size(a), at_working_size(b))


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
    return pairwise_exact_rms(at_working_size(a), at_working_size(b))


def pairwise_exact_rms(a: Tensor, b: Tensor) -> Tensor:
    """The same of all numbers; for latents, too."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    square = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
    return (square / a.shape[1]).clamp(min=0).sqrt().float()


def margin(latents: Tensor, target: Tensor, surrogate: Tensor) -> Tensor:
    """How much nearer latents are to the surrogate than to the target, (N,): 1 at the surrogate, -1 at the target."""
    return (exact_rms(latents, target) - exact_rms(latents, surrogate)) / exact_rms(target, surrogate)


SIDED = -0.25  # margin up to which an image drawn under a prompt counts as the target, perhaps in another place or size


def shows(images: Tensor, target: Tensor, surrogate: Tensor) -> Tensor:
    """Which images (N, C, H, W) are clearly nearer to the target than to the surrogate, wherever they have it, (N,).

    An unrelated image is about as far from both; where target and surrogate are one image, nothing shows it.
    """
    images, target, surrogate = map(at_working_size, (images, target, surrogate))
    apart = rms(target, surrogate)
    return (rms(images, target) - rms(images, surrogate) <= SIDED * apart) & (apart > 0)


def upper_bound(hits: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound of a rate; about 3 / n at no hit and 95 %."""
    return 1.0 if hits >= n else float(beta.ppf(confidence, hits + 1, n - hits))


def lower_bound(hits: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson lower bound of a rate."""
    return 0.0 if hits == 0 else float(beta.ppf(1 - confidence, hits, n - hits + 1))


def tolerance_bound(values: Tensor, share: float, confidence: float) -> float:
    """What all but a share of positive values (N,) like these stay above, at this confidence; 0 for fewer than two.

    Their logarithms are taken to be normal: the factor of the standard deviation is from a noncentral t distribution
    (Owen, 1968).
    """
    n, logs = len(values), values.double().clamp(min=1e-12).log()
    if n < 2:
        return 0.0
    factor = nct.ppf(confidence, n - 1, norm.isf(share) * math.sqrt(n)) / math.sqrt(n)
    return float((logs.mean() - factor * logs.std()).exp())


def median_bounds(values: Tensor, confidence: float) -> tuple[float, float]:
    """One-sided bounds of the median that values (N,) are drawn from, exact: two of them (order statistics).

    Infinite where so few values cannot bound it.
    """
    n, ordered = len(values), values.double().sort().values.tolist()
    rank = int(binom.ppf(1 - confidence, n, 0.5))  # so many smallest values lie under the median nearly always
    if not rank:
        return -math.inf, math.inf
    return ordered[rank - 1], ordered[n - rank]


def ratio_bounds(a: Tensor, b: Tensor, confidence: float) -> tuple[float, float]:
    """One-sided bounds of how many times the mean of b the mean of a is, of pairs (N,), by the delta method."""
    a, b = a.double(), b.double()
    mean = b.mean().clamp(min=1e-9)
    ratio = a.mean() / mean
    error = float(norm.ppf(confidence)) * (a - ratio * b).std() / (mean * math.sqrt(len(a)))
    return float(ratio - error), float(ratio + error)


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
    """Mean absolute Laplacian of each image, (N,), at its own size: falls with blur, rises with left-over noise."""
    return laplacian(images).abs().mean((-3, -2, -1))


def redrawn(images: Tensor, target: Tensor) -> Tensor:
    """RMS between the Laplacians of images and target, as a share of the target's own, (N,); 1.4 if unrelated.

    A move by less than a pixel of the working size redraws nothing: the least over such moves counts.
    """
    drawn, own = laplacian(at_working_size(images)), laplacian(at_working_size(target)).square().mean().sqrt()
    apart = torch.stack([exact_rms(drawn, laplacian(moved)) for moved in _nudged(target)]).amin(0)
    return apart / own.clamp(min=1e-6)


def _nudged(target: Tensor) -> list[Tensor]:
    """The target (C, H, W) at the working size, after moves by up to half a pixel of that, in eighths."""
    height, width = target.shape[-2:]
    factor = max(height, width) / WORKING_SIZE
    if factor <= 1:
        return [target]
    reach = math.ceil(factor / 2)
    moves = range(0, 2 * reach + 1, max(1, round(factor / 8)))
    wide = functional.pad(target, (reach,) * 4, mode="replicate")
    return [at_working_size(wide[:, y : y + height, x : x + width]) for y in moves for x in moves]
