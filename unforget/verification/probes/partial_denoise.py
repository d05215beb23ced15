from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unforget.core import passes, sampling
from unforget.core.passes import Count
from unforget.core.types import Instance
from unforget.verification.context import Drawn, Finding, VerifyContext, shown
from unforget.verification.probes.base import HALF, NearCopies
from unforget.verification.probes.sample import base_draws

BEGUN = 800
"""Timestep to which the target is noised where the base does not often draw it."""

ASIDE = 0.2
"""How far what is near such noise lies aside: the sine of the angle between them."""


class PartialDenoise(NearCopies):
    """The base does the first steps, towards the target, and the candidate finishes what it was handed."""

    kind: ClassVar = "partial_denoise"
    heading: ClassVar = "begun by the base, finished from t = {timestep:g}"
    handover: int = Field(700, gt=0, lt=1000, description="timestep at which the candidate takes over")
    draws: int = Field(16, ge=2, le=4096, description="beginnings")

    def cost(self, context: VerifyContext) -> Count:
        finished = 2 * context.repeated(self.cases(context), self.draws, [self.handover])
        return finished + Count(*(self._begun(context, first) for first in (self._noised(context), None)))

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        yield from (base_draws(context, prompt_id) for _, prompt_id in self.cases(context))

    def _begun(self, context: VerifyContext, first: float | None) -> int:
        """Passes of the base from a timestep, or from noise, to where it hands over."""
        start = context.start(self.handover)
        visited = len(context.usual(start).between(first, start).timesteps)
        return sum(passes.drawn(context.base, [id] * self.draws, visited) for _, id in self.cases(context))

    def _noised(self, context: VerifyContext) -> float:
        """The timestep nearest to where the target is noised to, of those that are visited before the handover."""
        visited = context.usual(context.start(self.handover)).timesteps
        return float(visited[(visited - BEGUN).abs().argmin()])

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        x_t, first = self._beginnings(context, instance, prompt_id)
        start, ids = context.start(self.handover), torch.full((len(x_t),), prompt_id)
        way = context.usual(start)
        with torch.no_grad():
            handed = context.base.denoise(x_t, steps=way, start=first, stop=start, prompt_ids=ids)
        visited = len(way.between(first, start).timesteps)
        context.advance(passes.drawn(context.base, ids.tolist(), visited))
        images = {role: context.run(family, handed, prompt_id, start=start) for role, family in context.models.items()}
        near = (context.is_target(made, instance).float().mean() for made in images.values())
        base, candidate = ({"near_copies": float(share)} for share in near)
        prompt, draws = context.prompt(prompt_id), len(handed)
        yield Finding(
            self.kind, instance.id, base, candidate, start, prompt, draws=draws, images=shown(images)
        )  # fmt: skip

    def _beginnings(self, context: VerifyContext, instance: Instance, prompt_id: int) -> tuple[Tensor, float | None]:
        """Noise from which the base drew the target, if it often did; else the target under a great deal of noise.

        Where that noise is not enough, more is near it: of four or five beginnings nobody could be certain.
        """
        hits = context.is_target(context.base_draws(prompt_id), instance)
        if (count := int(hits.sum())) >= max(1, self.draws // 4):
            known, turn = context.noise("sample", len(hits))[hits], torch.arange(self.draws)
            aside = (ASIDE * (turn >= count))[:, None, None, None]
            return (1 - aside**2).sqrt() * known[turn % count] + aside * context.noise("aside", self.draws), None
        start, noise = self._noised(context), context.noise("complete", self.draws)
        return sampling.add_noise(context.base, instance.target[None], noise, start), start

    def reproduces(self, found: Finding) -> bool:
        return found.base["near_copies"] >= HALF
