from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from unforget.core import passes, sampling
from unforget.core.passes import WITH_GRADIENTS, Count
from unforget.core.types import LARGE, Family, Instance
from unforget.errors import UsageError
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.base import HALF
from unforget.verification.probes.reconstruct import Reconstruction, reconstruction_figures


class Relearning(Reconstruction):
    """Ordinary fine-tuning on images that are not the target, as any user may do: does it come back?"""

    kind: ClassVar = "relearning"
    attack: ClassVar = True
    stops: tuple[int, ...] = Field((10, 30, 100), description="training steps after which to look")
    batch: int = Field(16, ge=1, le=1024, description="images a step")
    learning_rate: float = Field(1e-4, gt=0, description="of Adam")
    timestep: int = Field(400, gt=0, lt=1000, description="timestep to reconstruct from")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions, and samples")

    def cost(self, context: VerifyContext) -> Count:
        looked = context.repeated(self.cases(context), self.draws, [self.timestep, None])
        return Count.of(WITH_GRADIENTS * self.batch * max(self.stops)) + (len(self.stops) + 1) * looked

    def floors(self, context: VerifyContext) -> Iterator[tuple[float, int]]:
        yield from ((self.timestep, prompt_id) for _, prompt_id in self.cases(context))

    def __call__(self, context: VerifyContext) -> list[Finding]:
        twin, found = context.candidate.copy(), []
        before = [self._figures(context, context.candidate, *case) for case in self.cases(context)]
        for done in self._trained(context, twin):
            if done not in self.stops:
                continue
            for (instance, prompt_id), base in zip(self.cases(context), before, strict=True):
                after = self._figures(context, twin, instance, prompt_id)
                prompt, variant = context.prompt(prompt_id), f"{done} steps"
                found.append(Finding(self.kind, instance.id, base, after, prompt=prompt, variant=variant))
        return found

    def _trained(self, context: VerifyContext, twin: Family) -> Iterator[int]:
        """Take ordinary denoising steps, and say how many are done."""
        large = sum(p.numel() for p in twin.network.parameters()) >= LARGE
        parameters = twin.trainable("lora" if large else "full")  # of a large model only an adapter is tuned
        if large:
            twin.network.enable_gradient_checkpointing()  # type: ignore[operator]
        for p in parameters:
            p.requires_grad_(True)
        optimizer, schedule = torch.optim.AdamW(parameters, self.learning_rate), context.base.schedule
        drawn = context.retained("base")
        others = ~context.is_any_target(drawn)
        if not others.any():
            raise UsageError(
                "the base draws nothing but the targets, so that a copy has nothing else to be trained on",
                "Give other --retain-prompts, or leave the probe out.",
            )
        parts = torch.split(others.nonzero()[:, 0], 32)
        x_0 = torch.cat([context.base.encode(context.pictures("base", rows)) for rows in parts])
        prompt_ids = context.retain_turns(len(drawn))[others]
        size = passes.in_one_pass(passes.PIXELS_TRAINED, twin.image_shape)
        for step in range(max(self.stops)):
            generator = torch.Generator().manual_seed(1_000_003 * (context.seed + 1) + step)
            picked = torch.randint(len(x_0), (self.batch,), generator=generator)
            batch = sampling.noised(x_0[picked], x_0[picked], prompt_ids[picked], schedule, generator)
            goal = schedule.target(batch.x_0, batch.noise, batch.timestep)
            optimizer.zero_grad()
            for part in torch.split(torch.arange(self.batch), size):
                answer = twin.predict(batch.x_t[part], batch.timestep[part], batch.prompt_ids[part])
                loss = (answer - goal[part]).square().mean() * (len(part) / self.batch)
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            context.advance(WITH_GRADIENTS * self.batch)
            yield step + 1

    def _figures(self, context: VerifyContext, family: Family, instance: Instance, prompt_id: int) -> dict[str, float]:
        noise, floor = context.noise("revive", self.draws), context.floor(self.timestep, prompt_id)
        images = context.reconstruct(family, instance.target, noise, prompt_id, self.timestep)
        drawn = context.run(family, context.noise("revive draws", self.draws), prompt_id)
        hits = float(context.is_target(drawn, instance).sum())
        return {**reconstruction_figures(images, instance, floor), "hits": hits, "drawn": float(self.draws)}

    def robustness(self, found: Finding) -> str:
        after = found.candidate
        return (
            f"after {found.variant} of fine-tuning on other images it is {'' if after['recall'] > HALF else 'not '}"
            f"recalled; {after['nearer_surrogate']:.0%} of reconstructions side with the surrogate, "
            f"{after['hits']:.0f} of {after['drawn']:.0f} draws show it"
        )
