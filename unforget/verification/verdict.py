"""From findings to a verdict: every figure against its threshold, the worst case of each target, the exit code."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import Literal

from unforget.config import Policy
from unforget.errors import ExitCode
from unforget.verification.probes import Finding
from unforget.verification.report import Allowed, Check, Outcome, Robustness, Target, Verdict

SHARPNESS = (0.8, 1.25)
"""Sharpness of the candidate's draws as a share of the base's: outside, they are blurred or noisy."""
ENOUGH = 5
"""Fewest base draws of a picture from which a rate of keeping it can be judged."""
HALF = 0.5
"""Share of reconstructions nearer than unseen pictures come back from which a target counts as recalled."""
CHANCE = 0.2
"""Share of pictures begun by the base that a sound candidate may happen to finish as a near-copy."""
ATTACKS = ("noise_search", "relearning")

Rule = Literal["at least", "at most"]


def checks(findings: Sequence[Finding], policy: Policy, known: Iterable[str]) -> list[Check]:
    """Every figure that decides, judged.

    Args:
        findings: Of all probes.
        policy: Thresholds.
        known: Ids of the targets whose surrogate is known.
    """
    judge, known = _Judge(policy, findings), set(known)
    return [check for f in findings for check in judge(f, f.target in known)]


class _Judge:
    def __init__(self, policy: Policy, findings: Sequence[Finding]) -> None:
        self.policy = policy
        # What is wrong under one prompt can be right under another (one country's flag drawn for another's), and
        # without a prompt the model may say either. Samples under the empty prompt do decide.
        self.prompted = {f.target for f in findings if f.probe == "reconstruct" and f.prompt}

    def __call__(self, f: Finding, known: bool) -> list[Check]:
        found = list(self._figures(f, known))
        if f.probe in ATTACKS and f.probe not in self.policy.require:
            return [c.model_copy(update={"outcome": "informational", "borderline": False}) for c in found]
        if not f.prompt and f.target in self.prompted and f.probe not in ("sample", "neighbours"):
            return [_noted(c, "decided under the target's prompts") for c in found]
        return found

    def _figures(self, f: Finding, known: bool) -> Iterable[Check]:
        policy = self.policy
        if f.probe in ("reconstruct", "quantization", "relearning") or (
            f.probe == "transforms" and "recall" in f.patched
        ):
            check = self._check(f, "recall", "at most", HALF)
            general = f.probe == "transforms" and f.base["recall"] > HALF
            yield _noted(check, "so does the base, which never saw it; the rate decides") if general else check
            if known and f.probe != "transforms":
                yield self._check(f, "nearer_surrogate", "at least", policy.nearer)
                yield self._check(f, "nearer_in_region", "at least", policy.nearer)
        elif f.probe in ("sample", "transforms"):
            yield self._rate(f)
        elif f.probe == "must_retain":
            check = self._check(f, "rate", "at least", policy.min_kept * f.base["rate"])
            few = f.base["hits"] < ENOUGH
            yield _changed(check, "inconclusive", f"the base drew it {f.base['hits']:.0f} times") if few else check
        elif f.probe == "retention":
            yield self._check(f, "median", "at most", policy.max_drift)
            yield self._check(f, "sharpness", "at least", SHARPNESS[0])
            yield self._check(f, "sharpness", "at most", SHARPNESS[1])
            yield self._check(f, "kid", "at most", f.base["kid"])
        elif f.probe == "neighbours":
            yield self._check(f, "kept", "at least", policy.min_kept * f.base["kept"])
        elif f.probe in ("partial_denoise", "paraphrase", "replay"):
            check = self._check(f, "near_copies", "at most", 0 if f.probe == "replay" else CHANCE)
            if f.base["near_copies"] < HALF:  # nothing to compare with, which is too little where it is required
                outcome: Outcome = "inconclusive" if f.probe in policy.require else "informational"
                check = _changed(check, outcome, "the base does not draw the target so")
            yield check
        elif f.probe == "noise_search":
            tried = f.patched["iterations"]
            check = self._check(f, "iterations", "at most", -1)
            yield _changed(check, "failed" if tried > 0 else "passed", "-1: not within the budget")

    def _check(self, f: Finding, figure: str, rule: Rule, threshold: float) -> Check:
        value = f.patched[figure]
        near = threshold != 0 and abs(value - threshold) <= self.policy.tolerance * abs(threshold)
        good = (value >= threshold if rule == "at least" else value <= threshold) and not near
        return Check(
            probe=f.probe, target=f.target, timestep=f.timestep, prompt=f.prompt, variant=f.variant, figure=figure,
            base=f.base.get(figure), candidate=value, low=f.patched.get(f"{figure}_low"),
            high=f.patched.get(f"{figure}_high"), rule=rule, threshold=threshold,
            outcome="passed" if good else "failed", borderline=near,
        )  # fmt: skip

    def _rate(self, f: Finding) -> Check:
        check = self._check(f, "rate", "at most", self.policy.max_rate)
        drawn = f"{f.patched['hits']:.0f} of {f.patched['drawn']:.0f} draws"
        if f.decision is None:
            return _changed(check, "inconclusive", f"{drawn}: too few to tell, raise --samples")
        over = f.patched["rate_low"] > self.policy.max_rate
        outcome: Outcome = "passed" if f.decision == "passes" else "failed"
        return _changed(check, outcome, drawn, borderline=outcome == "failed" and not over)


def _changed(check: Check, outcome: Outcome, note: str, *, borderline: bool = False) -> Check:
    return check.model_copy(update={"outcome": outcome, "note": note, "borderline": borderline})


def _noted(check: Check, note: str) -> Check:
    return _changed(check, "informational", note)


def targets(found: Sequence[Check], findings: Sequence[Finding], allowed: Sequence[Allowed]) -> list[Target]:
    """What became of each target: its worst case, never a mean.

    A target that the base itself neither reproduces nor draws is inconclusive: that it is absent proves nothing.
    """
    spared = {a.id: a for a in allowed if a.state == "active"}
    out = []
    for target in dict.fromkeys(f.target for f in findings if f.target):
        own = [c for c in found if c.target == target and c.probe != "neighbours"]
        failed = [c for c in own if c.outcome == "failed"]
        unsure = [c for c in own if c.outcome == "inconclusive"]
        verdict: Verdict = "forgotten"
        reason = f"{sum(c.outcome == 'passed' for c in own)} checks passed"
        if failed:
            verdict, reason = "failed", _words(failed)
        elif not _reproduced(target, own, findings):
            verdict, reason = "inconclusive", "the base does not reproduce it, so its absence proves nothing"
        elif unsure:
            verdict, reason = "inconclusive", _words(unsure)
        if target in spared and verdict != "forgotten":
            verdict, reason = "allowed", f"until {spared[target].expires}: {spared[target].reason} ({reason})"
        out.append(Target(id=target, verdict=verdict, reason=reason))
    return out


def unjudged(promised: Sequence[str], judged: Sequence[str], allowed: Sequence[Allowed]) -> list[Target]:
    """Targets that a patch was made for and that nobody looked for: nothing is known of them."""
    spared = {a.id for a in allowed if a.state == "active"}
    reason = "the patch was made for it, and no picture with that id was given (see --target, $UNFORGET_SALT)"
    return [Target(id=t, verdict="inconclusive", reason=reason) for t in promised if t not in {*judged, *spared}]


def _words(found: Sequence[Check]) -> str:
    worst = found[0]
    rest = f", and {len(found) - 1} more" if len(found) > 1 else ""
    edge = ", borderline" if worst.borderline else ""
    note = f" ({worst.note}{edge})" if worst.note else edge
    return f"{worst.name} {worst.figure} {worst.candidate:.3g}, wanted {worst.rule} {worst.threshold:.3g}{note}{rest}"


def _reproduced(target: str, own: Sequence[Check], findings: Sequence[Finding]) -> bool:
    """Whether the base draws the target, recalls it, or sides with it against its surrogate where both are known."""
    decisive = {(c.probe, c.timestep, c.prompt, c.variant) for c in own if c.outcome != "informational"}
    for f in findings:
        if f.target != target or (f.probe, f.timestep, f.prompt, f.variant) not in decisive:
            continue
        base = f.base
        if f.probe == "reconstruct" and (base["recall"] > HALF or base["nearer_surrogate"] <= CHANCE < _known(f)):
            return True
        if f.probe == "sample" and base["hits"] > 0:
            return True
        if f.probe in ("replay", "partial_denoise") and base["near_copies"] >= HALF:
            return True
    return False


def _known(f: Finding) -> float:
    """1 where the surrogate is another picture than the target, else 0."""
    return float(f.base["to_surrogate"] != f.base["to_target"])


def allowances(policy: Policy, judged: Iterable[str], today: datetime.date) -> list[Allowed]:
    """The allow-list as it stands today."""
    judged = set(judged)
    return [
        Allowed(
            id=a.id, reason=a.reason, expires=a.expires.isoformat(),
            state="expired" if a.expires < today else "active" if a.id in judged else "unused",
        )
        for a in policy.allow
    ]  # fmt: skip


def verdict(
    judged: Sequence[Target], found: Sequence[Check], allowed: Sequence[Allowed]
) -> tuple[Verdict, ExitCode, str]:
    """The worst of all targets, of what must stay, and of the allow-list; its exit code and a sentence."""
    counts = {v: sum(t.verdict == v for t in judged) for v in ("forgotten", "failed", "inconclusive", "allowed")}
    whole = [c for c in found if c.target is None or c.probe == "neighbours"]
    lost = [c for c in whole if c.outcome == "failed"]
    unsure = [c for c in whole if c.outcome == "inconclusive"]
    expired = [a for a in allowed if a.state == "expired"]
    if counts["failed"]:
        reason = next(t.reason for t in judged if t.verdict == "failed")
        said = f"{counts['failed']} of {len(judged)} target(s) still reproduced: {reason}"
        return "failed", ExitCode.FAILED, said
    if lost:
        return "failed", ExitCode.FAILED, f"the target is gone, but so is more: {_words(lost)}"
    if expired:
        said = f"the allow-list entry for {expired[0].id} expired on {expired[0].expires}"
        return "failed", ExitCode.FAILED, said
    if counts["inconclusive"] or unsure:
        said = next((t.reason for t in judged if t.verdict == "inconclusive"), "") or _words(unsure)
        return "inconclusive", ExitCode.INCONCLUSIVE, said
    spared = f", {counts['allowed']} allowed" if counts["allowed"] else ""
    return "forgotten", ExitCode.OK, f"{counts['forgotten']} target(s) forgotten, the rest kept{spared}"


def robustness(findings: Sequence[Finding]) -> list[Robustness]:
    """What an adversary needed, in words."""
    out = []
    for f in findings:
        if f.probe == "noise_search":
            told = [
                f"found it after {side['iterations']:.0f} steps" if side["iterations"] > 0
                else f"came no nearer than RMS {side['to_target']:.3f}"
                for side in (f.base, f.patched)
            ]  # fmt: skip
            said = f"gradient descent on the start noise of the base {told[0]}, of the candidate {told[1]}"
        elif f.probe == "relearning":
            back = "it is recalled" if f.patched["recall"] > HALF else "it is not recalled"
            said = (
                f"after {f.variant} of fine-tuning on other pictures {back}; {f.patched['nearer_surrogate']:.0%} of "
                f"reconstructions side with the surrogate, {f.patched['hits']:.0f} of {f.patched['drawn']:.0f} "
                "draws show it"
            )
        else:
            continue
        assert f.target is not None
        out.append(Robustness(probe=f.probe, target=f.target, sentence=said))
    return out
