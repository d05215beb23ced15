"""Variants of an image that a person still knows it by, searched: turned, scaled, moved, mirrored, in any colours.

An image is compared with the target as it looks under each of several thousand affine maps, by the correlation of the
middle of both in grey: brightness, contrast, hue, a negative and what lies around it do not count. That search finds
likenesses among different images, too, so the threshold is calibrated by the same search on images known to differ.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from unforget.core.metrics import pairwise_rms
from unforget.verification.near_copies import REPEATED, once

SIDE = 32
"""Pixels at which images are compared, the longer side."""
MIDDLE = 0.55
"""Half of the side of the middle that is compared, as a share of the image's."""
TURNS = range(-21, 22, 3)
"""Degrees."""
SCALES = (0.76, 0.87, 1.0, 1.15, 1.32)
SHIFTS = [k * 2 / SIDE for k in range(-4, 5)]
"""To either side, as shares of half of the image: an eighth of it at most."""
PRETENDED = 16
"""Images that are searched for among all others, to learn what the search finds by chance."""
RATHER = 0.02
"""By so much more an image must look like the target than like what may be drawn instead."""


@dataclass(frozen=True)
class Searched:
    """The likeness, in [0, 1], from which an image is a variant, and how many pairs of different images say so."""

    likeness: float
    pairs: int


def calibrate(images: Tensor, false_positive_rate: float, target: Tensor) -> Searched:
    """The likeness that a share of images (N, C, H, W) has to `target` (C, H, W), or to each other, whichever is more.

    They are known to differ; pairs that are one picture by their pixels are left out. Of a plain target a search finds
    more by chance than of a busy one. Few pairs know nothing of so small a share: beyond one in a thousand the tail of
    Fisher's z goes on as it does from one in a hundred to there (exponentially), so that one pair that is alike after
    all does not decide.
    """
    apart = pairwise_rms(images, images)
    others = apart >= REPEATED * apart[once(apart)].nanmedian()
    each = [likeness(images[others[k]], picture) for k, picture in enumerate(images[:PRETENDED])]
    found = [likeness(images, target), torch.cat([torch.empty(0), *each])]
    return Searched(max(_tail(f, false_positive_rate) for f in found), sum(map(len, found)))


def _tail(chance: Tensor, share: float) -> float:
    """The likeness that so small a share of those by chance has, (N,); 1 for too few."""
    if len(chance) < 2:
        return 1.0
    chance = chance.clamp(max=1 - 1e-6).atanh()
    seldom, rare = chance.quantile(0.99), chance.quantile(0.999)
    return float(torch.tanh(rare + math.log10(1e-3 / share) * (rare - seldom)))


def is_variant(shown: Tensor, limit: float, picture: Tensor, *others: Tensor) -> Tensor:
    """Which images (N, C, H, W) are variants of `picture` (C, H, W) rather than of any of `others`, (N,) of bool."""
    alike = likeness(shown, picture)
    found = alike > limit
    for other in others:
        found &= alike > likeness(shown, other) + RATHER
    return found


def likeness(shown: Tensor, picture: Tensor) -> Tensor:
    """Best correlation of each image (N, C, H, W) with any variant of a picture (C, H, W), (N,) in [0, 1]."""
    small, few = _grey(torch.cat([picture[None], shown])), []
    maps, where = _maps(*small.shape[-2:])
    turned = functional.grid_sample(
        small[:1].expand(len(maps), -1, -1, -1), maps, padding_mode="reflection", align_corners=False
    )
    templates = _middle(turned, where)
    for part in torch.split(_middle(small[1:], where), 256):  # of many, all correlations at once would take gigabytes
        few.append((part @ templates.T).abs().max(1).values)
    return torch.cat([torch.empty(0), *few]).clamp(0, 1)


def turned(picture: Tensor, degrees: float) -> Tensor:
    """An image (C, H, W) turned about its middle; at the corners it is mirrored."""
    turn = _turn(degrees, 1, 1, *picture.shape[-2:])[None]
    maps = functional.affine_grid(turn, [1, *picture.shape], align_corners=False)
    return functional.grid_sample(picture[None], maps, padding_mode="reflection", align_corners=False)[0]


def _grey(images: Tensor) -> Tensor:
    """(N, C, H, W) to (N, 1, h, w), SIDE at most."""
    factor = max(1.0, max(images.shape[-2:]) / SIDE)
    size = [max(1, round(side / factor)) for side in images.shape[-2:]]
    return functional.interpolate(images.mean(1, keepdim=True), size, mode="bilinear", antialias=True)


def _middle(images: Tensor, where: Tensor) -> Tensor:
    """The middle of each as a unit vector without its mean, (N, numbers)."""
    numbers = images.flatten(1)[:, where]
    return functional.normalize(numbers - numbers.mean(1, keepdim=True), eps=1e-6)


def _turn(degrees: float, scale: float, side: int, height: int, width: int) -> Tensor:
    """The map of coordinates in [-1, 1], (2, 3); `side` -1 mirrors."""
    cos, sin = (f(math.radians(degrees)) / scale for f in (math.cos, math.sin))
    return torch.tensor([[side * cos, side * sin * height / width, 0], [-sin * width / height, cos, 0]])


@cache
def _maps(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where each variant takes its pixels from, (variants, height, width, 2); and which pixels are the middle."""
    rows = []
    for side, degrees, scale, x, y in itertools.product((1, -1), TURNS, SCALES, SHIFTS, SHIFTS):
        turn = _turn(degrees, scale, side, height, width)[:, :2]
        rows.append(torch.cat([turn, -turn @ torch.tensor([[x], [y]])], 1))
    maps = functional.affine_grid(torch.stack(rows), [len(rows), 1, height, width], align_corners=False)
    tall, wide = (torch.linspace(-1, 1, n).abs() < MIDDLE for n in (height, width))
    return maps, (tall[:, None] & wide).flatten()
