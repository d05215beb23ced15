from collections.abc import Iterator
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from unforget.config import VerifyConfig
from unforget.core import passes
from unforget.core.metrics import rms, shows
from unforget.core.passes import Count
from unforget.core.types import Family, Instance
from unforget.files.images import eight_bit
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.base import HALF, NearCopies


class Replay(NearCopies):
    """The seed, sampler and prompt that made the image, once more."""

    kind: ClassVar = "replay"
    heading: ClassVar = "the seed that made it"
    needs: ClassVar = "--replay-seed"
    allowed: ClassVar = 0
    seed: int = Field(ge=0, lt=2**63, description="of the generator that made the image")
    steps: int | None = Field(None, ge=1, le=10_000, description="sampler steps that made it")
    scheduler: str | None = Field(None, description="diffusers class of the sampler that made it")

    @classmethod
    def from_policy(cls, config: VerifyConfig, prompted: bool) -> Self | None:
        if config.replay_seed is None:
            return None
        return cls(seed=config.replay_seed, steps=config.replay_steps, scheduler=config.replay_scheduler)

    def cost(self, context: VerifyContext) -> Count:
        steps = self.steps or context.policy.sampler_steps
        return Count.of(2 * sum(passes.drawn(context.base, [id], steps) for _, id in self.cases(context)))

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        steps, prompt_ids = self.steps or context.policy.sampler_steps, torch.tensor([prompt_id])

        def image(family: Family) -> Tensor:
            x_0 = family.replay(self.seed, steps=steps, scheduler=self.scheduler, prompt_ids=prompt_ids)
            context.advance(passes.drawn(context.base, [prompt_id], steps))
            return eight_bit(family.decode(x_0))

        def figures(image: Tensor) -> dict[str, float]:
            near = context.is_target(image, instance) | shows(image, instance.target, instance.surrogate)
            return {"near_copies": float(bool(near)), "to_target": float(rms(image, instance.target))}

        images = {role: image(family) for role, family in context.models.items()}
        base, candidate = map(figures, images.values())
        yield Finding(self.kind, instance.id, base, candidate, prompt=context.prompt(prompt_id), images=images)

    def reproduces(self, found: Finding) -> bool:
        return found.base["near_copies"] >= HALF
