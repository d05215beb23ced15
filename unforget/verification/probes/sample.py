from collections.abc import Callable, Iterator
from typing import ClassVar

from torch import Tensor

from unforget.config import Policy
from unforget.core.metrics import lower_bound, shows, upper_bound
from unforget.core.types import UNCONDITIONAL, Instance
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.near_copies import EmbeddedImages
from unforget.verification.probes.base import Probe, changed, checked
from unforget.verification.report import Check, Outcome
from unforget.verification.sequential import Decision


class Sample(Probe):
    """Draw until it is certain whether near-copies of a target come up less often than `--max-rate`."""

    kind: ClassVar = "sample"
    decides_unprompted: ClassVar = True

    def cost(self, context: VerifyContext) -> int:
        count = min(context.plan.shortest, context.policy.samples or context.plan.shortest)  # when nothing hits
        return context.calls() * len({prompt_id for _, prompt_id in context.cases}) * (count + context.policy.paired)

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> Iterator[Finding]:
        def hits(drawn: EmbeddedImages) -> Tensor:
            near = context.is_target(drawn, instance)
            if prompt_id == UNCONDITIONAL:
                return near
            # Under a prompt the target counts in any place and size: that is how prompted models repeat it.
            return near | shows(drawn.images, instance.target, instance.surrogate)

        base, candidate, decision = rate_test(context, prompt_id, hits)
        yield Finding(self.kind, instance.id, base, candidate, None, context.prompt(prompt_id), decision=decision)

    def judge(self, found: Finding, policy: Policy, known: bool) -> list[Check]:
        return [judge_rate(found, policy)]

    def reproduces(self, found: Finding) -> bool:
        return found.base["hits"] > 0


def count_hits(hits: Tensor, confidence: float) -> dict[str, float]:
    """A rate with its exact one-sided bounds."""
    n, seen = len(hits), int(hits.sum())
    low, high = lower_bound(seen, n, confidence), upper_bound(seen, n, confidence)
    return {"hits": seen, "drawn": n, "rate": seen / n, "rate_low": low, "rate_high": high}


def rate_test(
    context: VerifyContext, prompt_id: int, hits: Callable[[EmbeddedImages], Tensor]
) -> tuple[dict[str, float], dict[str, float], Decision | None]:
    """Draw until the rate of `hits` is certain to lie under the limit, or not to; base, candidate, decision."""
    plan, policy, count, decision = context.plan, context.policy, 0, None
    most = min(policy.samples or plan.looks[-1].drawn, plan.looks[-1].drawn)
    while decision is None and count < most:
        count = min(plan.following(count), most)
        found = hits(context.draws("candidate", (prompt_id,), count))
        drawn, decision = plan.decide(found.numpy())
    base = hits(context.draws("base", (prompt_id,), policy.paired))
    return count_hits(base, policy.confidence), count_hits(found[:drawn], policy.confidence), decision


def judge_rate(found: Finding, policy: Policy) -> Check:
    """A rate by the decision of its test; failed though its lower bound is under the limit, it is borderline."""
    check = checked(found, "rate", "at most", policy.max_rate, policy)
    drawn = f"{found.candidate['hits']:.0f} of {found.candidate['drawn']:.0f} draws"
    if found.decision is None:
        return changed(check, "inconclusive", f"{drawn}: too few to tell, raise --samples")
    outcome: Outcome = "passed" if found.decision == "passes" else "failed"
    over = found.candidate["rate_low"] > policy.max_rate
    return changed(check, outcome, drawn, borderline=outcome == "failed" and not over)
