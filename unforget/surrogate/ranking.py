"""Ranking of the candidates for a surrogate.

A good surrogate is another instance (far enough from the target, and drawn differently: not the same face on another
background), keeps its structure (otherwise near), looks like something the model itself would draw, and is nobody it
draws already: to send a target's share to another memorised image would only move the harm.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unforget.core.metrics import at_working_size, pairwise_exact_rms, pairwise_rms, redrawn, rms, sharpness
from unforget.core.registration import misfit
from unforget.core.sampling import add_noise, random_noise
from unforget.core.types import UNCONDITIONAL
from unforget.surrogate.canvas import Canvas

REDRAWN = 0.35
"""Least share of a target's drawing that must change; on `faces` one face stays under 0.27, others exceed 0.42."""
QUALITY = 0.6  # least sharpness of an edit, as a share of its target's; its inverse is the most
TYPICAL_AT, STRAYS_AT = 250, 550  # timesteps of the reconstructions that measure typicality and strays
STRAYS = 32  # draws that measure strays


@dataclass(frozen=True)
class Candidate:
    """An edited target, (C, H, W) in [-1, 1], and how it ranks; distances are RMS, in pixels of [-1, 1]."""

    image: Tensor
    label: str  # how it was made
    distance: float = 0.0  # to the target
    redrawn: float = 0.0  # share of the target's drawing that is another, whatever the colours
    moved: float = math.inf  # to the target moved and scaled to where the edit has it, under a prompt
    familiar: float = math.inf  # to the nearest image that the base is known to draw
    quality: float = 1.0  # its sharpness as a share of the target's
    typicality: float = 0.0  # to the base's reconstruction of it; small is what the base could draw
    strays: float = 0.0  # small when the edit lies among those whom a noised target may be taken for
    score: float = 0.0  # smaller is better
    refused: str = ""  # why it is no surrogate, if it is none
    accepted: bool = False  # another instance than the target, of fair quality, and nobody the base draws already

    def nearest(self) -> float:
        """Distance to the nearest of all that it must not be."""
        return min(self.distance, self.familiar, self.moved)


def rank(
    candidates: Sequence[Candidate], canvas: Canvas, *, distance: float, near_copy: float = 0.16
) -> list[Candidate]:
    """Score candidates, best first: accepted ones before others, then near, typical and sharp ones with few strays.

    Another instance is at least `distance` (RMS) from the target, and `near_copy` from what the base draws already.
    """
    images = torch.stack([c.image for c in candidates])
    sharp, target_sharp = (sharpness(at_working_size(i)) for i in (images, canvas.target[None]))
    drawn = canvas.drawn if canvas.drawn is not None else images[:0]
    noise = random_noise(len(images), canvas.family.latent_shape, canvas.seed, "rank")
    figures: dict[str, Any] = {
        "distance": rms(images, canvas.target),
        "redrawn": redrawn(images, canvas.target),
        "familiar": pairwise_rms(images, drawn).min(1).values if len(drawn) else torch.full((len(images),), math.inf),
        "moved": _moved(canvas, images),
        "quality": sharp / target_sharp.clamp(min=1e-6),
        "typicality": rms(canvas.redraw(images, noise, TYPICAL_AT), images),
        "strays": _strays(canvas, images, torch.cat([images, drawn]), near_copy),
    }
    scored = []
    for i, candidate in enumerate(candidates):
        c = replace(candidate, **{name: values[i].item() for name, values in figures.items()})
        refused = ", ".join(_refused(c, distance, near_copy))
        score = abs(c.distance - distance) + 3 * c.typicality + 0.3 * c.strays + 0.1 * abs(c.quality - 1)
        scored.append(replace(c, score=score, refused=refused, accepted=not refused))
    return sorted(scored, key=lambda c: (not c.accepted, c.score))


def _refused(c: Candidate, distance: float, near_copy: float) -> Iterator[str]:
    """Why a candidate is not another instance of fair quality that the base does not draw; nothing if it is."""
    if c.distance < distance:
        yield f"too near the target ({c.distance:.2f}, under {distance:g})"
    if c.redrawn < REDRAWN:
        yield f"the same drawing ({c.redrawn:.0%} is another, under {REDRAWN:.0%})"
    if c.moved < near_copy:
        yield f"the target in another place ({c.moved:.2f}, under {near_copy:g})"
    if c.familiar < near_copy:
        yield f"what the base draws already ({c.familiar:.2f}, under {near_copy:g})"
    if not QUALITY <= c.quality <= 1 / QUALITY:
        yield f"{'blurred' if c.quality < 1 else 'noisy'} ({c.quality:.2f} of the target's sharpness)"


def _moved(canvas: Canvas, images: Tensor) -> Tensor:
    """`Candidate.moved` of each image (N,), at a width of 32: a prompted model draws one thing in many places."""
    if canvas.prompt_id == UNCONDITIONAL:
        return torch.full((len(images),), math.inf)
    target, *small = functional.adaptive_avg_pool2d(torch.cat([canvas.target[None], images]), 32)
    return misfit(torch.stack(small), target)


def _strays(canvas: Canvas, images: Tensor, others: Tensor, near_copy: float) -> Tensor:
    """Chance that a noised target, taken for another that is no copy of it, is taken for one nearer to the target than
    to the edit, for each of the images (N,)."""
    family, target = canvas.family, canvas.target
    others = others[rms(others, target) >= near_copy]
    if not len(others):
        return torch.zeros(len(images))
    noise = random_noise(STRAYS, family.latent_shape, canvas.seed, "strays")
    x_t, timestep = add_noise(family, target[None], noise, STRAYS_AT), torch.tensor([STRAYS_AT])
    alpha, sigma = (family.schedule.column(name, timestep, noise) for name in ("alphas", "sigmas"))
    far = pairwise_exact_rms(x_t, alpha * family.encode(others)).square() * noise[0].numel() / sigma.flatten().square()
    taken_for = torch.softmax(-far / 2, 1).mean(0)
    return (pairwise_rms(images, others) > rms(others, target)).float() @ taken_for
