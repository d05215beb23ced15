from collections.abc import Iterator
from typing import ClassVar

from unforget.config import Policy
from unforget.verification.context import Finding, VerifyContext
from unforget.verification.probes.base import Probe, changed, checked
from unforget.verification.report import Check


class Parts(Probe):
    """Is all that a candidate has beside its network the base's: scheduler, autoencoder, text encoders, tokenizers?"""

    kind: ClassVar = "parts"
    retains: ClassVar = True

    def __call__(self, context: VerifyContext) -> list[Finding]:
        parts = context.parts
        return [Finding(self.kind, None, {}, {"apart": parts[name]}, variant=name) for name in sorted(parts)]

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        check = checked(found, "apart", "at most", 0, policy)
        if check.outcome == "failed" and found.variant in policy.may_differ:
            yield changed(check, "informational", "another than the base's, which the policy allows")
        else:
            yield changed(check, check.outcome, "" if check.outcome == "passed" else "another than the base's")
