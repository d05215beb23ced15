from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from unforget.config import Policy
from unforget.core.metrics import at_working_size, lower_bound, shows, upper_bound
from unforget.core.passes import Count
from unforget.core.types import UNCONDITIONAL, Instance
from unforget.verification.context import FIRST, Drawn, Finding, VerifyContext
from unforget.verification.near_copies import EmbeddedImages
from unforget.verification.probes.base import Probe, changed, checked
from unforget.verification.report import Check, Outcome
from unforget.verification.sequential import Decision


class Sample(Probe):
    """Draw until it is certain whether near-copies of a target come up less often than `--max-rate`."""

    kind: ClassVar = "sample"
    decides_unprompted: ClassVar = True

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        for instance, prompt_id in self.cases(context):
            candidate, base = rate_draws(context, prompt_id)
            beside = prompt_id == UNCONDITIONAL and len(instance.prompt_ids) > 1
            yield from (candidate, (base[0], Count(0, base[1].most)) if beside else base)

    def __call__(self, context: VerifyContext) -> list[Finding]:
        """The prompts first; in the order of the cases."""
        found: dict[tuple[str, int], Finding] = {}
        for instance, prompt_id in sorted(self.cases(context), key=lambda case: case[1] == UNCONDITIONAL):
            # What the base draws decides nothing but whether it reproduces the target.
            known = any(self.reproduces(f) for (id, _), f in found.items() if id == instance.id)
            found[instance.id, prompt_id] = self._of(context, instance, prompt_id, known)
        return [found[instance.id, prompt_id] for instance, prompt_id in self.cases(context)]

    def _of(self, context: VerifyContext, instance: Instance, prompt_id: int, known: bool) -> Finding:
        pair = at_working_size(instance.target), at_working_size(instance.surrogate)

        def hits(drawn: EmbeddedImages) -> Tensor:
            near = context.is_target(drawn, instance)
            if prompt_id == UNCONDITIONAL:
                return near
            # Under a prompt the target counts in any place and size: that is how prompted models repeat it.
            return near | shows(drawn.images, *pair)

        base, candidate, decision = rate_test(context, prompt_id, hits, candidate_alone=known)
        return Finding(self.kind, instance.id, base, candidate, None, context.prompt(prompt_id), decision=decision)

    def judge(self, found: Finding, policy: Policy, known: bool) -> list[Check]:
        return [judge_rate(found, policy)]

    def reproduces(self, found: Finding) -> bool:
        return found.base.get("hits", 0) > 0


def count_hits(hits: Tensor, confidence: float) -> dict[str, float]:
    """A rate with its exact one-sided bounds."""
    n, seen = len(hits), int(hits.sum())
    low, high = lower_bound(seen, n, confidence), upper_bound(seen, n, confidence)
    return {"hits": seen, "drawn": n, "rate": seen / n, "rate_low": low, "rate_high": high}


def rate_test(
    context: VerifyContext, prompt_id: int, hits: Callable[[EmbeddedImages], Tensor], *, candidate_alone: bool = False
) -> tuple[dict[str, float], dict[str, float], Decision | None]:
    """Draw until the rate of `hits` is certain to lie under the limit, or not to; base, candidate, decision."""
    plan, policy, count, decision = context.plan, context.policy, 0, None
    found = torch.empty(0, dtype=torch.bool)
    most = min(policy.samples or plan.looks[-1].drawn, plan.looks[-1].drawn)
    while decision is None and count < most:
        count = min(plan.following(count), most)
        found = torch.cat([found, hits(context.draws("candidate", (prompt_id,), count)[len(found) :])])
        drawn, decision = plan.decide(found.numpy())
    base = {} if candidate_alone else count_hits(hits(context.base_draws(prompt_id)), policy.confidence)
    return base, count_hits(found[:drawn], policy.confidence), decision


def rate_draws(context: VerifyContext, prompt_id: int) -> tuple[tuple[Drawn, Count], tuple[Drawn, Count]]:
    """What a test of a rate draws of candidate and base: the least is when nothing hits."""
    limit = context.policy.samples or context.plan.looks[-1].drawn
    count = Count(*(min(limit, n) for n in (context.plan.shortest, context.plan.looks[-1].drawn)))
    return (("candidate", (prompt_id,)), count), base_draws(context, prompt_id)


def base_draws(context: VerifyContext, prompt_id: int) -> tuple[Drawn, Count]:
    """What `context.base_draws` draws."""
    return ("base", (prompt_id,)), Count(min(FIRST, context.policy.paired), context.policy.paired)


def judge_rate(found: Finding, policy: Policy) -> Check:
    """A rate by the decision of its test; failed though its lower bound is under the limit, it is borderline."""
    check = checked(found, "rate", "at most", policy.max_rate, policy)
    drawn = f"{found.candidate['hits']:.0f} of {found.candidate['drawn']:.0f} draws"
    if found.decision is None:
        return changed(check, "inconclusive", f"{drawn}: too few to tell, raise --samples")
    outcome: Outcome = "passed" if found.decision == "passes" else "failed"
    over = found.candidate["rate_low"] > policy.max_rate
    return changed(check, outcome, drawn, borderline=outcome == "failed" and not over)
