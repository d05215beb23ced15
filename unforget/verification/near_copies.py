"""How near is a near-copy: similarity backends with thresholds calibrated on pictures that are known to differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unforget.verification.similarity import Backend, pairwise

REPEATED = 0.25
"""Two others within this share of the median distance, and a picture is one that the model repeats."""
CAP = 0.5
"""A near-copy lies nearer to its picture than this share of the way to any picture that may be drawn instead."""


@dataclass(frozen=True)
class Drawn:
    """Pictures (N, C, H, W) in [-1, 1] and their embeddings, one tensor (N, D) a backend."""

    images: Tensor
    embeds: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which: slice | Tensor) -> Drawn:
        return Drawn(self.images[which], tuple(e[which] for e in self.embeds))

    def __add__(self, other: Drawn) -> Drawn:
        embeds = zip(self.embeds, other.embeds, strict=True)
        return Drawn(torch.cat([self.images, other.images]), tuple(torch.cat(pair) for pair in embeds))


@dataclass(frozen=True)
class Radius:
    """Distance under which two pictures of one backend are the same, and what it rests on."""

    distance: float
    false_positive_rate: float
    """Share of the pairs that lie nearer."""
    pairs: int
    """Pairs of different pictures that it was read off."""


class Eye:
    """Sees near-copies: a picture is one if any backend says so.

    `single` says which of the references the base does not repeat, (N,) of bool.

    Args:
        backends: Each with a threshold of its own.
        references: What the base draws, (N, C, H, W): pictures known to differ, but for those that it repeats.
        false_positive_rate: Share of pairs of different pictures that may count as copies.
    """

    def __init__(self, backends: Sequence[Backend], references: Tensor, false_positive_rate: float) -> None:
        self.backends = tuple(backends)
        apart = [pairwise(e, e) for e in self.look(references).embeds]
        self.radii = tuple(calibrate(distances, false_positive_rate) for distances in apart)
        self.single = torch.stack([~repeated(distances) for distances in apart]).all(0)

    def look(self, images: Tensor) -> Drawn:
        """The pictures with their embeddings."""
        return Drawn(images, tuple(b.embed(images) for b in self.backends))

    def limits(self, picture: Tensor, *others: Tensor) -> list[tuple[float, bool]]:
        """For each backend the distance under which something counts as `picture`, and whether `others` lowered it."""
        mine, rest = self.look(picture[None]), [self.look(o[None]) for o in others]
        found = []
        for k, radius in enumerate(self.radii):
            caps = [CAP * float(pairwise(mine.embeds[k], o.embeds[k])) for o in rest]
            cap = min([c for c in caps if c == c], default=torch.inf)  # nothing seen (NaN) is no cap
            found.append((min(radius.distance, cap), cap < radius.distance))
        return found

    def sees(self, drawn: Drawn, picture: Tensor, *others: Tensor) -> Tensor:
        """Which of the pictures are near-copies of `picture` (C, H, W) rather than of any of `others`, (N,) of bool."""
        mine, limits = self.look(picture[None]), self.limits(picture, *others)
        near = [
            pairwise(e, m)[:, 0] < limit for e, m, (limit, _) in zip(drawn.embeds, mine.embeds, limits, strict=True)
        ]
        return torch.stack(near).any(0)


def calibrate(distances: Tensor, false_positive_rate: float) -> Radius:
    """The distance that a share of `false_positive_rate` of all pairs of different pictures lies under.

    Pictures that come up again and again are left out with all that is near them: a model that repeats a picture
    would teach that different pictures are alike.

    Args:
        distances: Between what the base draws, (N, N).
        false_positive_rate: In (0, 1); no less than one pair can be told.
    """
    above = torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)
    single = ~repeated(distances)
    pairs = distances[above & single & single[:, None]]
    pairs = pairs[~pairs.isnan()].sort().values
    if not len(pairs):
        return Radius(_apart(distances), 1.0, 0)
    rank = min(int(false_positive_rate * len(pairs)), len(pairs) - 1)
    return Radius(float(pairs[rank]), (rank + 1) / len(pairs), len(pairs))


def repeated(distances: Tensor) -> Tensor:
    """Which pictures come up again and again, or are near one that does, from their distances (N, N): (N,) of bool."""
    close = (distances < _apart(distances)).fill_diagonal_(False)
    often = close.sum(1) >= 2
    return often | close[:, often].any(1)


def _apart(distances: Tensor) -> float:
    above = torch.triu(torch.ones_like(distances, dtype=torch.bool), 1)
    return REPEATED * float(distances[above].nanmedian())
