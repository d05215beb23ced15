"""From findings to a verdict: the probes' checks, the worst case of each target, the allow-list, the exit code."""

import datetime
from collections.abc import Collection, Iterator, Sequence

from unforget.config import Policy
from unforget.errors import CannotRun, ExitCode
from unforget.verification.context import Finding
from unforget.verification.probes.base import Probe, changed
from unforget.verification.probes.sample import Sample
from unforget.verification.report import Allowed, Check, Place, Robustness, Target, Verdict


class Judgement:
    """What the findings of a suite of probes say; `CannotRun` if one is of no probe of it, or a required one is not in.

    `ids` are the targets, `known` those whose surrogate is known, `promised` those that the candidate was made for.
    """

    def __init__(
        self, findings: Sequence[Finding], suite: Sequence[Probe], policy: Policy, ids: Sequence[str],
        known: Collection[str], promised: Sequence[str] = (), today: datetime.date | None = None,
    ) -> None:  # fmt: skip
        self.probes, self.policy, self.findings, self.ids = {p.kind: p for p in suite}, policy, findings, ids
        for kind in (*policy.require, *(f.probe for f in findings)):
            if kind not in self.probes:
                raise CannotRun(f"no probe that ran judges '{kind}'", "A finding must have the kind of its probe.")
        # What is wrong under one prompt can be right under another (one country's flag drawn for another's), and
        # without a prompt the model may say either. Samples under the empty prompt do decide.
        self.prompted = {f.target for f in findings if f.probe == "reconstruct" and f.prompt}
        self.checks = [check for f in findings for check in self._judged(f, f.target in known)]
        self.checks += self._undecided()
        self.allowed = _allowances(policy, ids, today or datetime.datetime.now(datetime.UTC).date())
        excused = {a.id: f"until {a.expires}: {a.reason}" for a in self.allowed if a.state == "active"}
        # Nothing is known of a target that the candidate was made for and that nobody gave an image of.
        missing = "the patch was made for it, and no image with that id was given (see --target, $UNFORGET_SALT)"
        self.targets = [self._worst_case(target, excused.get(target)) for target in ids] + [
            Target(id=t, verdict="inconclusive", reason=missing) for t in promised if t not in {*ids, *excused}
        ]
        said = [(f, self.probes[f.probe].robustness(f)) for f in findings]
        self.robustness = [Robustness(probe=f.probe, target=f.target, sentence=s) for f, s in said if s]
        self.verdict, self.exit_code, self.summary = self._verdict()

    def _judged(self, f: Finding, known: bool) -> Iterator[Check]:
        probe = self.probes[f.probe]
        for check in probe.judge(f, self.policy, known):
            if probe.attack and probe.kind not in self.policy.require:
                yield changed(check, "informational", check.note)
            elif not f.prompt and f.target in self.prompted and not probe.decides_unprompted:
                yield changed(check, "informational", "decided under the target's prompts")
            else:
                yield check

    def _undecided(self) -> Iterator[Check]:
        """An inconclusive check for each target that a required probe decides nothing of."""
        for kind in self.policy.require:
            decided = {c.target for c in self.checks if c.probe == kind and c.outcome != "informational"}
            for target in () if None in decided else self.ids:
                if target not in decided:
                    yield Check(
                        probe=kind, target=target, figure="checks", base=None, candidate=0, rule="at least",
                        threshold=1, outcome="inconclusive", note="the policy requires it, and it found nothing",
                    )  # fmt: skip

    def _worst_case(self, target: str, excuse: str | None) -> Target:
        """What became of a target: its worst case, never a mean."""
        own = [c for c in self.checks if c.target == target and not self.probes[c.probe].retains]
        failed, unsure = ([c for c in own if c.outcome == outcome] for outcome in ("failed", "inconclusive"))
        verdict: Verdict = "forgotten"
        reason = "no check failed"
        if failed:
            verdict, reason = "failed", _worst(failed)
        elif not self._reproduced(target, own):
            verdict, reason = "inconclusive", "the base does not reproduce it, so its absence says nothing"
        elif unsure:
            verdict, reason = "inconclusive", _worst(unsure)
        if excuse and verdict != "forgotten":
            verdict, reason = "allowed", f"{excuse} ({reason})"
        return Target(id=target, verdict=verdict, reason=reason, rate=self._rate(target))

    def _rate(self, target: str) -> str:
        """How often it is drawn, under the prompt where that may be most, in a sentence."""
        found = [f for f in self.findings if (f.probe, f.target) == (Sample.kind, target)]
        if not found:
            return ""
        worst = max(found, key=lambda f: f.candidate["rate_high"])
        drawn = [f"{said['hits']:.0f} of {said['drawn']:.0f}" for said in (worst.candidate, worst.base) if said]
        under = f" under '{worst.prompt}'" if worst.prompt else ""
        base = f" (base: {drawn[1]})" if drawn[1:] else ""
        rate = {"passes": "rate below", "fails": "rate not below", None: "too few to tell if the rate is below"}
        limit = f"{100 * self.policy.max_rate:g} % at {100 * self.policy.confidence:g} % confidence"
        return f"{drawn[0]} draws{under} were near-copies{base}: {rate[worst.decision]} {limit}"

    def _reproduced(self, target: str, own: Sequence[Check]) -> bool:
        decisive = {c.name for c in own if c.outcome != "informational"}
        found = (f for f in self.findings if f.target == target and Place(**f.place).name in decisive)
        return any(self.probes[f.probe].reproduces(f) for f in found)

    def _verdict(self) -> tuple[Verdict, ExitCode, str]:
        """The worst of all targets, of what must be retained, and of the allow-list; its exit code and a sentence."""
        outcomes: tuple[Verdict, ...] = ("failed", "inconclusive", "allowed")
        failed, unsure, excused = ([t for t in self.targets if t.verdict == outcome] for outcome in outcomes)
        rest = [c for c in self.checks if c.target is None or self.probes[c.probe].retains]
        lost, unclear = ([c for c in rest if c.outcome == outcome] for outcome in outcomes[:2])
        expired = [a for a in self.allowed if a.state == "expired"]
        if failed:
            said = f"{len(failed)} of {_targets(len(self.targets))} still reproduced: {failed[0].reason}"
            return "failed", ExitCode.FAILED, said
        if lost:
            return "failed", ExitCode.FAILED, f"the target is gone, but so is more: {_worst(lost)}"
        if expired:
            said = f"the allow-list entry for {expired[0].id} expired on {expired[0].expires}"
            return "failed", ExitCode.FAILED, said
        if unsure or unclear:
            return "inconclusive", ExitCode.INCONCLUSIVE, unsure[0].reason if unsure else _worst(unclear)
        more = f", {len(excused)} allowed" if excused else ""
        forgotten = len(self.targets) - len(excused)
        return "forgotten", ExitCode.OK, f"{_targets(forgotten)} forgotten, the rest retained{more}"


def _targets(count: int) -> str:
    return f"{count} target{'s' * (count != 1)}"


def _worst(found: Sequence[Check]) -> str:
    worst = found[0]
    rest = f", and {len(found) - 1} more" if len(found) > 1 else ""
    edge = ", borderline" if worst.borderline else ""
    note = f" ({worst.note}{edge})" if worst.note else edge
    return f"{worst.name}: {worst.meaning} {worst.candidate:.3g}, wanted {worst.rule} {worst.threshold:.3g}{note}{rest}"


def _allowances(policy: Policy, ids: Collection[str], today: datetime.date) -> list[Allowed]:
    """The allow-list as it stands today."""
    return [
        Allowed(
            id=a.id, reason=a.reason, expires=a.expires.isoformat(),
            state="expired" if a.expires < today else "active" if a.id in ids else "unused",
        )
        for a in policy.allow
    ]  # fmt: skip
