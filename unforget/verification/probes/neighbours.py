from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field

from unforget.config import Policy
from unforget.core.metrics import rms
from unforget.core.passes import Count
from unforget.core.types import Instance
from unforget.verification.context import ROLES, Drawn, Finding, VerifyContext, known_surrogate
from unforget.verification.probes.base import Probe, changed, checked
from unforget.verification.probes.retention import same_seed_drift, spread
from unforget.verification.report import Check


class Neighbours(Probe):
    """What the base makes of the heavily noised target that is no target and no surrogate: is it retained?

    Few of a model's draws are like one target. From here many are, and each must stay what it is.
    """

    kind: ClassVar = "neighbours"
    heading: ClassVar = "neighbours, from t = {timestep:g}"
    retains: ClassVar = True
    decides_unprompted: ClassVar = True
    draws: int = Field(64, ge=1, description="draws of each target's neighbours")
    timestep: int = Field(700, gt=0, lt=1000, description="timestep that they start from")

    def cost(self, context: VerifyContext) -> Count:
        turns = context.retain_turns(self.draws).tolist()
        return Count.of(2 * context.passes(turns, self.timestep) * len(context.instances))

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        yield ("candidate", context.retain_prompt_ids), Count.of(context.policy.paired)

    def __call__(self, context: VerifyContext) -> list[Finding]:
        drift, typical = same_seed_drift(context)
        kept = spread(drift)["kept"]
        return [f for instance in context.instances for f in self._of(instance, context, typical, kept)]

    def _of(self, instance: Instance, context: VerifyContext, typical: float, kept: float) -> list[Finding]:
        noise, turns = context.noise("look-alikes", self.draws), context.retain_turns(self.draws)
        base, candidate = (
            context.reconstruct(model, instance.target, noise, turns, self.timestep)
            for model in context.models.values()
        )
        drawn = context.detector.embed(base)  # of several targets that are alike, one is no neighbour of the other
        pictures = [picture for i in context.instances for picture in (i.target, *known_surrogate(i))]
        others = ~torch.stack([context.detector.is_copy(drawn, picture) for picture in pictures]).any(0)
        base, candidate = base[others], candidate[others]
        if not len(base):
            return []
        figures = {**spread(rms(base, candidate) / typical), "seen": float(len(base))}
        images = dict(zip(ROLES, (base[:4].clone(), candidate[:4].clone()), strict=True))
        start, seen = context.start(self.timestep), len(base)
        return [Finding(self.kind, instance.id, {"kept": kept}, figures, start, draws=seen, images=images)]

    def judge(self, found: Finding, policy: Policy, known: bool) -> list[Check]:
        check = checked(found, "kept", "at least", policy.min_kept * found.base["kept"], policy)
        few = check.outcome == "inconclusive"  # whatever the candidate does, the base draws nearly nothing else here
        return [changed(check, "informational", check.note) if few else check]
