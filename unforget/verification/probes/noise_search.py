import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unforget.config import Policy
from unforget.core import passes
from unforget.core.metrics import at_working_size, rms
from unforget.core.passes import WITH_GRADIENTS, Count
from unforget.core.types import LARGE, Family, Instance
from unforget.files.images import eight_bit
from unforget.verification.context import ROLES, Drawn, Finding, Role, VerifyContext
from unforget.verification.probes.base import Probe, changed, checked
from unforget.verification.report import Check, Outcome


class NoiseSearch(Probe):
    """Gradient descent on the start noise, kept on the sphere where noise lies, towards the target.

    Some noise leads to any image: what counts is the effort beside the base's.
    """

    kind: ClassVar = "noise_search"
    heading: ClassVar = "start noise found by gradient descent"
    attack: ClassVar = True
    restarts: int = Field(4, ge=1, le=64, description="noises to start from, the best of many")
    iterations: int = Field(20, ge=1, le=10_000, description="steps of Adam")
    steps: int = Field(8, ge=2, le=100, description="sampler steps that gradients go through")
    rate: float = Field(0.1, gt=0, description="learning rate")

    def cost(self, context: VerifyContext) -> Count:
        once = sum(self._one(context, id) for _, id in self.cases(context))
        return Count(self.iterations * once, 2 * self.iterations * once)  # the base may find it at once

    def _one(self, context: VerifyContext, prompt_id: int) -> int:
        """Passes of an iteration: each step is computed again in the backward pass."""
        return (WITH_GRADIENTS + 1) * passes.drawn(context.base, [prompt_id] * self.restarts, self.steps)

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        for _, prompt_id in self.cases(context):
            yield from (((role, (prompt_id,)), Count.of(context.policy.paired)) for role in ROLES)

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        found = {role: self._search(context, role, instance, prompt_id) for role in context.models}
        images = {role: image for role, (_, image) in found.items()}
        base, candidate = (figures for figures, _ in found.values())
        yield Finding(self.kind, instance.id, base, candidate, prompt=context.prompt(prompt_id), images=images)

    def _search(
        self, context: VerifyContext, role: Role, instance: Instance, prompt_id: int
    ) -> tuple[dict[str, float], Tensor]:
        """How near the search came and after how many iterations it found a near-copy, -1 if none; and its best."""
        family, drawn = context.models[role], context.draws(role, (prompt_id,), context.policy.paired).images
        first = rms(drawn, at_working_size(instance.target)).argsort(stable=True)[: self.restarts]
        x = context.noise("sample", context.policy.paired)[first].clone().requires_grad_()
        goal, norm = context.base.encode(instance.target[None]), x.detach().flatten(1).norm(dim=1)
        optimizer, ids = torch.optim.Adam([x], self.rate), torch.full((len(first),), prompt_id)
        nearest, best = math.inf, drawn[:1]
        family.network.requires_grad_(False)
        if sum(p.numel() for p in family.network.parameters()) >= LARGE:
            family.network.enable_gradient_checkpointing()  # type: ignore[operator]
        size = passes.in_one_pass(passes.PIXELS_TRAINED, family.image_shape)
        for iteration in range(1, self.iterations + 1):
            optimizer.zero_grad()
            x_0 = torch.cat([self._descend(family, part, goal, ids) for part in torch.split(x, size)])
            made = eight_bit(family.decode(x_0))
            apart = rms(made, instance.target)
            if float(apart.min()) < nearest:
                nearest, best = float(apart.min()), made[apart.argmin()][None]
            if bool(context.is_target(made, instance).any()):
                return {"to_target": nearest, "iterations": float(iteration)}, best
            optimizer.step()
            with torch.no_grad():
                x *= (norm / x.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
            context.advance(self._one(context, prompt_id))
        return {"to_target": nearest, "iterations": -1.0}, best

    def _descend(self, family: Family, x: Tensor, goal: Tensor, prompt_ids: Tensor) -> Tensor:
        """What is made of noise (N, ...), to which the gradient of the distance to the goal is added."""
        x_0 = family.denoise(x, steps=self.steps, prompt_ids=prompt_ids[: len(x)])
        (x_0 - goal).square().mean((1, 2, 3)).sum().backward()  # type: ignore[no-untyped-call]
        return x_0.detach()

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        outcome: Outcome = "failed" if found.candidate["iterations"] > 0 else "passed"
        yield changed(checked(found, "iterations", "at most", -1, policy), outcome, "-1: not within the budget")

    def robustness(self, found: Finding) -> str:
        base, candidate = (
            f"found it after {side['iterations']:.0f} steps" if side["iterations"] > 0
            else f"came no nearer than RMS {side['to_target']:.3f}"
            for side in (found.base, found.candidate)
        )  # fmt: skip
        return f"gradient descent on the start noise of the base {base}, of the candidate {candidate}"
