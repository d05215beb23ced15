import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from unforget.config import Policy
from unforget.core.passes import Count
from unforget.core.registration import UNRELATED, misfit
from unforget.core.types import Family, Instance
from unforget.verification.context import Drawn, Finding, Role, VerifyContext, known_surrogate, shown
from unforget.verification.probes.base import HALF, Probe, changed, checked
from unforget.verification.probes.sample import base_draws, rate_draws
from unforget.verification.report import Check

DRAWS = 64
"""Draws of the candidate under each prompt that are looked at, of those that `sample` makes."""
SLACK = 1.25
"""How much farther than most of the base's own draws of the target a draw of the surrogate may lie from it."""


class Replaced(Probe):
    """Does the candidate draw the surrogate under the given prompts, or just something else?

    An image may have it moved and scaled, and may vary as the base's own images of the target do.
    """

    kind: ClassVar = "replaced"
    heading: ClassVar = "drawn"
    needs: ClassVar = "--prompt"

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        for _, prompt_id in self.cases(context):
            yield ("candidate", (prompt_id,)), Count.of(self._count(context, prompt_id))
            yield base_draws(context, prompt_id)

    def _count(self, context: VerifyContext, prompt_id: int) -> int:
        """Draws that are looked at: no more than `sample` makes in any case."""
        (_, drawn), _ = rate_draws(context, prompt_id)
        return min(DRAWS, drawn.least)

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        prompt = context.prompt(prompt_id)
        if not prompt or not known_surrogate(instance):
            return
        drawn: dict[Role, Tensor] = {
            "base": context.base_draws(prompt_id).images,
            "candidate": context.draws("candidate", (prompt_id,), self._count(context, prompt_id)).images,
        }
        unrelated, drawable = context.retained("base").images, as_drawn(context.base, instance.surrogate)
        base, candidate = what_is_shown(drawn["base"], drawn["candidate"], unrelated, instance, drawable)
        yield Finding(
            self.kind, instance.id, base, candidate, prompt=prompt, draws=len(drawn["candidate"]), images=shown(drawn)
        )

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        check = checked(found, "surrogate", "at least", policy.min_replaced, policy)
        reliable = found.base["target"] >= HALF
        yield check if reliable else changed(check, "informational", "the base seldom draws the target so")


def as_drawn(family: Family, image: Tensor) -> Tensor:
    """An image (C, H, W) as far as a model can draw it: what its autoencoder returns."""
    return family.decode(family.encode(image[None]))[0]


def what_is_shown(
    base: Tensor, candidate: Tensor, unrelated: Tensor, instance: Instance, drawable: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of images (N, C, H, W) that show the target and its surrogate, of the base and of the candidate.

    What the base draws nearer to the target than most images of other prompts shows it, and how these vary says how far
    an image of it may be. One of the surrogate, or of what is `drawable` of it, may be farther by what the two differ:
    a picture made by hand is sharper than anything that an autoencoder returns. Independent errors add in squares. What
    lies as far from the surrogate as the target does is not it.
    """
    target, surrogate = instance.target, instance.surrogate
    own = misfit(base, target)
    if len(unrelated):
        own = own[own <= misfit(unrelated, target).quantile(UNRELATED)]
    limit = SLACK * float(own.quantile(0.9)) if len(own) else 0.0
    lost, edit = misfit(torch.stack([drawable, target]), surrogate).tolist()

    def shares(images: Tensor) -> dict[str, float]:
        to_target, to_surrogate = misfit(images, target), misfit(images, surrogate)
        nearer = to_surrogate < to_target
        near = torch.minimum(to_surrogate, misfit(images, drawable)) <= min(math.hypot(limit, lost), edit)
        near = near.where(nearer, to_target <= limit)
        found = {"target": near & ~nearer, "surrogate": near & nearer, "something_else": ~near}
        return {name: float(which.float().mean()) for name, which in found.items()}

    return shares(base), shares(candidate)
