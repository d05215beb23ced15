"""Variants of an image that a person still knows it by, searched: turned, scaled, moved, mirrored, in any colours, and
as a part of a collage.

An image is compared with the target as it looks under each of several thousand affine maps, by the correlation of the
middle of both in grey, and of the centre of that: brightness, contrast, hue, a negative and what lies around do not
count. Another search looks for the whole target, small, at every place. All find likenesses among different images,
too, so the threshold of each is calibrated by the same search on images known to differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from unforget.core.metrics import pairwise_rms
from unforget.verification.near_copies import REPEATED, once

SIDE = 32
"""Pixels at which images are compared, the longer side."""
MIDDLE = 0.55
"""Half of the side of the middle that is compared, as a share of the image's."""
CENTRE = 0.45
"""The same of the radius of the centre, which is left of a target before another background."""
TURNS = range(-21, 22, 3)
"""Degrees, as a picture may hang."""
FURTHER = range(24, 337, 3)
"""Degrees to which somebody may have put it on purpose: at its own size, and moved half as far."""
SCALES = (0.76, 0.87, 1.0, 1.15, 1.32)
SHIFTS = [k * 2 / SIDE for k in range(-4, 5)]
"""To either side, as shares of half of the image: an eighth of it at most."""
PASTED = tuple(k / SIDE for k in range(12, 24))
"""Sizes of the target in a collage, as shares of the image's."""
CONTRAST = 1e-3
"""Variance under which a place of a collage is flat, and like nothing."""
PRETENDED = 16
"""Images that are searched for among all others, to learn what the search finds by chance."""
RATHER = 0.5
"""By so much more an image must look like the target than like what may be drawn instead, as a share of how much more
the target itself does."""


@dataclass(frozen=True)
class Searched:
    """The likeness, in [0, 1], of the middle, of the centre and of some place from which an image is a variant; how
    many pairs of different images say so."""

    middle: float
    centre: float
    pasted: float
    pairs: int


def calibrate(images: Tensor, false_positive_rate: float, target: Tensor) -> Searched:
    """The likenesses that a share of images (N, C, H, W) has to `target` (C, H, W) or to each other, if that is more.

    They are known to differ; pairs that are one picture by their pixels are left out. Of a plain target a search finds
    more by chance than of a busy one. Few pairs know nothing of so small a share: beyond one in a thousand the tail of
    Fisher's z goes on as it does from one in a hundred to there (exponentially), so that one pair that is alike after
    all does not decide. Of one image or none nobody knows anything: nothing counts.
    """
    if len(images) < 2:  # whatever the model draws it repeats
        return Searched(1.0, 1.0, 1.0, 0)
    apart = pairwise_rms(images, images)
    others = apart >= REPEATED * apart[once(apart)].nanmedian()
    shown = [images[others[k]] for k in range(len(images[:PRETENDED]))]

    def limits(search: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        each = [search(s, picture) for s, picture in zip(shown, images, strict=False)]
        found = search(images, target), torch.cat(each)
        return [max(_tail(f, false_positive_rate) for f in of) for of in zip(*(f.T for f in found), strict=True)]

    (middle, centre), (place,) = limits(likeness), limits(pasted)
    return Searched(middle, centre, place, len(images) + sum(map(len, shown)))


def _tail(chance: Tensor, share: float) -> float:
    """The likeness that so small a share of those by chance has, (N,); 1 for too few."""
    if len(chance) < 2:
        return 1.0
    chance = chance.clamp(max=1 - 1e-6).atanh()
    seldom, rare = chance.quantile(0.99), chance.quantile(0.999)
    return float(torch.tanh(rare + math.log10(1e-3 / share) * (rare - seldom)))


def is_variant(shown: Tensor, limits: Searched, picture: Tensor, *others: Tensor) -> Tensor:
    """Which images (N, C, H, W) are variants of `picture` (C, H, W), or hold one, rather than of any of `others`, (N,)
    of bool."""
    found = torch.zeros(len(shown), dtype=torch.bool)
    whole, place = (limits.middle, limits.centre), (limits.pasted,)
    for search, limit, share in ((likeness, whole, 1.0), (pasted, place, PASTED[0])):
        alike = search(shown, picture)
        for other in others:
            same = functional.interpolate(other[None], scale_factor=share, mode="bilinear", antialias=True)
            same = functional.pad(same, [0, other.shape[2] - same.shape[3], 0, other.shape[1] - same.shape[2]])
            more = RATHER * (1 - search(same, picture))
            alike = torch.where(alike > search(shown, other) + more, alike, 0)
        found |= (alike > torch.tensor(limit)).any(1)
    return found


def likeness(shown: Tensor, picture: Tensor) -> Tensor:
    """Best correlation of each image (N, C, H, W) with any variant of a picture (C, H, W), of the middle and of the
    centre, (N, 2) in [0, 1]."""
    whole, small = _grey(picture[None])[0, 0], _grey(shown)
    best, templates = torch.zeros(len(shown), 2), _templates(whole.numpy().tobytes(), *whole.shape)
    for k, where in enumerate(_maps(*whole.shape)[1]):
        # Of many, all correlations at once would take gigabytes.
        parts = torch.split(_seen(small, where), 256)
        best[:, k] = torch.cat([(part @ templates[k].T).abs().amax(1) for part in parts])
    return best.clamp(max=1)


@lru_cache(maxsize=3)  # 34 MB each; of a target and its surrogate at every look at the draws
def _templates(grey: bytes, height: int, width: int) -> list[Tensor]:
    """What both windows show of every variant of a grey picture, (variants, numbers)."""
    picture = torch.frombuffer(bytearray(grey), dtype=torch.float32).reshape(1, 1, height, width)
    maps, windows = _maps(height, width)
    turned = functional.grid_sample(
        picture.expand(len(maps), -1, -1, -1), maps, padding_mode="reflection", align_corners=False
    )
    return [_seen(turned, where) for where in windows]


def pasted(shown: Tensor, picture: Tensor) -> Tensor:
    """Best correlation of any place of each image (N, C, H, W) with a picture (C, H, W), small, (N, 1) in [0, 1]."""
    small = _grey(torch.cat([picture[None], shown]))
    whole, best = small[1:], torch.zeros(len(shown))
    for share in PASTED:
        size = [max(2, round(share * length)) for length in small.shape[-2:]]
        template = functional.interpolate(small[:1], size, mode="bilinear", antialias=True)
        best = torch.maximum(best, _correlation(whole, template).flatten(1).amax(1))
    return best.clamp(max=1)[:, None]


def _correlation(images: Tensor, template: Tensor) -> Tensor:
    """Of either sign, of every place of images (N, 1, H, W) with a template (1, 1, h, w) and its mirror image,
    (N, 2, places...)."""
    numbers, ones = template.numel(), torch.ones_like(template)
    template = functional.normalize((template - template.mean()).flatten(), dim=0, eps=1e-6).reshape(template.shape)
    template = torch.cat([template, template.flip(-1)])
    sums, squares = functional.conv2d(images, ones), functional.conv2d(images**2, ones)
    spread = (squares - sums**2 / numbers).clamp(min=CONTRAST * numbers).sqrt()
    return functional.conv2d(images, template).abs() / spread


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


def _seen(images: Tensor, where: Tensor) -> Tensor:
    """What a window shows of each, as a unit vector without its mean, (N, numbers)."""
    numbers = images.flatten(1)[:, where]
    return functional.normalize(numbers - numbers.mean(1, keepdim=True), eps=1e-6)


def _turn(degrees: float, scale: float, side: int, height: int, width: int) -> Tensor:
    """The map of coordinates in [-1, 1], (2, 3); `side` -1 mirrors."""
    cos, sin = (f(math.radians(degrees)) / scale for f in (math.cos, math.sin))
    return torch.tensor([[side * cos, side * sin * height / width, 0], [-sin * width / height, cos, 0]])


@cache
def _maps(height: int, width: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Where each variant takes its pixels from, (variants, height, width, 2); which pixels are middle and centre."""
    rows = []
    near = itertools.product((1, -1), TURNS, SCALES, SHIFTS, SHIFTS)
    far = itertools.product((1, -1), FURTHER, (1.0,), SHIFTS[2:-2], SHIFTS[2:-2])
    for side, degrees, scale, x, y in itertools.chain(near, far):
        turn = _turn(degrees, scale, side, height, width)[:, :2]
        rows.append(torch.cat([turn, -turn @ torch.tensor([[x], [y]])], 1))
    maps = functional.affine_grid(torch.stack(rows), [len(rows), 1, height, width], align_corners=False)
    down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    middle, centre = torch.maximum(down.abs(), across.abs()) < MIDDLE, torch.hypot(down, across) < CENTRE
    return maps, (middle.flatten(), centre.flatten())
