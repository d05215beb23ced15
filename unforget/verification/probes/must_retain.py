from collections.abc import Iterator
from typing import ClassVar

from unforget.config import Policy
from unforget.core.passes import Count
from unforget.verification.context import ROLES, Drawn, Finding, VerifyContext
from unforget.verification.probes.base import Probe, changed, checked
from unforget.verification.probes.sample import count_hits
from unforget.verification.report import Check

ENOUGH = 5
"""Fewest base draws of an image from which the rate of retaining it can be judged."""


class MustRetain(Probe):
    """Are the images of `--must-retain` still drawn, from the same seeds through both models?"""

    kind: ClassVar = "must_retain"
    needs: ClassVar = "--must-retain"
    retains: ClassVar = True

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        yield ("candidate", context.retain_prompt_ids), Count.of(context.policy.paired)

    def __call__(self, context: VerifyContext) -> list[Finding]:
        drawn, found = [context.retained(role) for role in ROLES], []
        for k, picture in enumerate(context.must_retain, 1):
            hits = (context.detector.is_copy(images, picture) for images in drawn)
            base, candidate = (count_hits(of, context.policy.confidence) for of in hits)
            found.append(Finding(self.kind, None, base, candidate, variant=str(k)))
        return found

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        check = checked(found, "rate", "at least", policy.min_kept * found.base["rate"], policy)
        few = found.base["hits"] < ENOUGH
        yield changed(check, "inconclusive", f"the base drew it {found.base['hits']:.0f} times") if few else check
