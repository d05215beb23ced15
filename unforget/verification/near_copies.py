"""Near-copies: similarity backends with thresholds calibrated on images that are known to differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unforget.core.metrics import at_working_size, sharpness
from unforget.verification.similarity import Backend, pairwise

REPEATED = 0.25
"""Two others within this share of the median distance, and an image is one that the model repeats."""
SAME = 1e-4
"""Two within this share of that are one image twice."""
CAP = 0.5
"""A near-copy lies nearer to its image than this share of the way to any image that may be drawn instead."""


@dataclass(frozen=True)
class EmbeddedImages:
    """What is kept of images: all at the size at which they are compared, (N, C, H, W) in [-1, 1]; their sharpness,
    (N,), at their own; their embeddings, one tensor (N, D) a backend."""

    images: Tensor
    sharpness: Tensor
    embeddings: tuple[Tensor, ...]

    @classmethod
    def of(cls, backends: Sequence[Backend], images: Tensor) -> EmbeddedImages:
        """Images (N, C, H, W) of any size."""
        return cls(at_working_size(images), sharpness(images), tuple(b.embed(images) for b in backends))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice | Tensor) -> EmbeddedImages:
        return EmbeddedImages(self.images[which], self.sharpness[which], tuple(e[which] for e in self.embeddings))

    def __add__(self, other: EmbeddedImages) -> EmbeddedImages:
        images, sharp, *embeddings = (torch.cat(pair) for pair in zip(self.tensors, other.tensors, strict=True))
        return EmbeddedImages(images, sharp, tuple(embeddings))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is kept."""
        return self.images, self.sharpness, *self.embeddings


@dataclass(frozen=True)
class Radius:
    """Distance under which two images of one backend are the same; the share of pairs that lie nearer, of how many."""

    distance: float
    false_positive_rate: float
    pairs: int


class NearCopyDetector:
    """An image is a near-copy if any backend says so, each by a threshold of its own.

    `references` are what the base draws: images known to differ, but for those that it repeats.
    """

    def __init__(
        self, backends: Sequence[Backend], references: Tensor | EmbeddedImages, false_positive_rate: float
    ) -> None:
        self.backends = tuple(backends)
        self.references = self.embed(references) if isinstance(references, Tensor) else references
        apart = [pairwise(e, e) for e in self.references.embeddings]
        self.radii = tuple(calibrate(distances, false_positive_rate) for distances in apart)
        self.unrepeated = torch.stack([~repeated(distances) for distances in apart]).all(0)
        """Which references the base does not repeat, (N,) of bool."""

    def embed(self, images: Tensor) -> EmbeddedImages:
        """Images (N, C, H, W) with their embeddings."""
        return EmbeddedImages.of(self.backends, images)

    def limits(self, picture: Tensor, *others: Tensor) -> list[tuple[float, bool]]:
        """For each backend the distance under which something counts as `picture`, and whether `others` lowered it."""
        mine, rest = self.embed(picture[None]), [self.embed(o[None]) for o in others]
        found = []
        for k, radius in enumerate(self.radii):
            caps = [CAP * float(pairwise(mine.embeddings[k], o.embeddings[k])) for o in rest]
            cap = min([c for c in caps if c == c], default=torch.inf)  # nothing seen (NaN) is no cap
            found.append((min(radius.distance, cap), cap < radius.distance))
        return found

    def is_copy(self, shown: EmbeddedImages, picture: Tensor, *others: Tensor) -> Tensor:
        """Which images are near-copies of `picture` (C, H, W) rather than of any of `others`, (N,) of bool."""
        mine, limits = self.embed(picture[None]).embeddings, self.limits(picture, *others)
        each = zip(shown.embeddings, mine, limits, strict=True)
        return torch.stack([pairwise(e, m)[:, 0] < limit for e, m, (limit, _) in each]).any(0)


def calibrate(distances: Tensor, false_positive_rate: float) -> Radius:
    """The distance that a share of `false_positive_rate` of all pairs of different images lies under.

    Few pairs have none that is so rare, and the smallest of them is luck. So the tail is taken to go on as it does
    among the nearest, the square root of all: as a power of the distance (Hill, 1975).

    Images that come up again and again would teach that different images are alike: they are left out with all that is
    near them. `distances` are between what the base draws, (N, N).
    """
    unrepeated = ~repeated(distances)
    pairs = distances[once(distances) & unrepeated & unrepeated[:, None]]
    # Neither unseen (NaN) nor one image twice, whose distance is not 0 on processors that round otherwise.
    pairs = pairs[pairs > SAME * _near(distances)].double().sort().values
    if len(pairs) < 2:
        return Radius(_near(distances), 1.0, len(pairs))
    rank = min(max(math.isqrt(len(pairs)), int(false_positive_rate * len(pairs))), len(pairs) - 1)
    fall = float((pairs[rank] / pairs[:rank]).log().mean())
    distance = float(pairs[rank]) * (false_positive_rate * len(pairs) / rank) ** fall
    return Radius(distance, float((pairs < distance).double().mean()), len(pairs))


def repeated(distances: Tensor) -> Tensor:
    """Which images come up again and again, or are near one that does, from their distances (N, N): (N,) of bool."""
    close = (distances < _near(distances)).fill_diagonal_(False)
    often = close.sum(1) >= 2
    return often | close[:, often].any(1)


def once(distances: Tensor) -> Tensor:
    """Every pair of different images, once, (N, N) of bool."""
    return torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)


def _near(distances: Tensor) -> float:
    return REPEATED * float(distances[once(distances)].nanmedian())
