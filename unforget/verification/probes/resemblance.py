from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from unforget.config import Policy
from unforget.core.passes import Count
from unforget.core.types import Instance
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.base import Probe, changed, checked
from unforget.verification.report import Check


class Resemblance(Probe):
    """How like each other base and candidate complete the noised target, from the same noise: the paper's own figure.

    arXiv:2603.10445 gives the mean cosine of SSCD from t = 500, lower being better. Other similarity backends give
    their distance. It decides nothing: far apart is not yet forgotten, and what was lost otherwise is far, too.
    """

    kind: ClassVar = "resemblance"
    draws: int = Field(16, ge=1, le=4096, description="completions by each model")
    timestep: int = Field(500, gt=0, lt=1000, description="timestep to noise it to")

    def cost(self, context: VerifyContext) -> Count:
        return 2 * context.repeated(self.cases(context), self.draws, [self.timestep])

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        noise, prompt = context.noise(self.kind, self.draws), context.prompt(prompt_id)
        base, candidate = (
            context.reconstruct(model, instance.target, noise, prompt_id, self.timestep)
            for model in context.models.values()
        )
        for backend in context.backends:
            apart = (backend.embed(base) - backend.embed(candidate)).norm(dim=1)
            cosine = 1 - apart.square() / 2  # of unit vectors
            figure, each = ("similarity", cosine) if backend.kind == "sscd" else ("unlike", apart)
            said = {figure: float(each.nanmean())}
            yield Finding(self.kind, instance.id, {}, said, context.start(self.timestep), prompt, backend.kind)

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        for figure in found.candidate:
            check = checked(found, figure, "at least", 0.0, policy)
            yield changed(check, "informational", "for comparison with the paper")
