from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from unforget.core import sampling
from unforget.core.types import LARGE, Family, Instance, Pool
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.base import HALF
from unforget.verification.probes.reconstruct import Reconstruction, reconstruction_figures


class Relearning(Reconstruction):
    """Ordinary fine-tuning on images that are not the target, as any user may do: does it come back?"""

    kind: ClassVar = "relearning"
    level: ClassVar = "deep"
    attack: ClassVar = True
    stops: tuple[int, ...] = Field((10, 30, 100), description="training steps after which to look")
    batch: int = Field(16, ge=1, le=1024, description="images a step")
    learning_rate: float = Field(1e-4, gt=0, description="of Adam")
    timestep: int = Field(400, gt=0, lt=1000, description="timestep to reconstruct from")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions, and samples")

    def cost(self, context: VerifyContext) -> int:
        looks = len(self.stops) * len(context.cases) * self.draws
        calls = context.calls() + context.calls(context.start(self.timestep))
        return 3 * self.batch * max(self.stops) + looks * calls

    def __call__(self, context: VerifyContext) -> list[Finding]:
        twin, found = context.candidate.copy(), []
        large = sum(p.numel() for p in twin.network.parameters()) >= LARGE
        parameters = twin.trainable("lora" if large else "full")  # of a large model only an adapter is tuned
        for p in parameters:
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, self.learning_rate)
        before = [self._figures(context, context.candidate, *case) for case in context.cases]
        pool, done = _retained(context), 0
        for stop in self.stops:
            for step in range(done, stop):
                self._train(context, twin, parameters, optimizer, pool, step)
            done = stop
            for (instance, prompt_id), base in zip(context.cases, before, strict=True):
                after = self._figures(context, twin, instance, prompt_id)
                prompt, variant = context.prompt(prompt_id), f"{stop} steps"
                found.append(Finding(self.kind, instance.id, base, after, prompt=prompt, variant=variant))
        return found

    def _train(
        self, context: VerifyContext, twin: Family, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer,
        pool: Pool, step: int,
    ) -> None:  # fmt: skip
        """An ordinary denoising step."""
        generator = torch.Generator().manual_seed(1_000_003 * (context.seed + 1) + step)
        picked = pool[torch.randint(len(pool), (self.batch,), generator=generator)]
        schedule = context.base.schedule
        batch = sampling.noised(picked.x_0, picked.x_0, picked.prompt_ids, schedule, generator)
        answer = twin.predict(batch.x_t, batch.timestep, batch.prompt_ids)
        loss = (answer - schedule.target(batch.x_0, batch.noise, batch.timestep)).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        context.advance(3 * self.batch)

    def _figures(
        self, context: VerifyContext, family: Family, instance: Instance, prompt_id: int
    ) -> dict[str, float]:  # fmt: skip
        start, floor = context.start(self.timestep), context.floor(self.timestep, prompt_id)
        noise = context.noise("revive", self.draws)
        images = context.reconstruct(family, instance.target, noise, prompt_id, start)
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


def _retained(context: VerifyContext) -> Pool:
    """What the base draws, encoded, less every copy of a target."""
    drawn = context.retained("base")
    others = ~context.is_any_target(drawn)
    return Pool(context.base.encode(drawn.images[others]), context.retain_turns(len(drawn))[others])
