"""From findings to a verdict: checks with their thresholds, the exit code, and the versioned JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from unforget.config import VerifyConfig
from unforget.data import write_bytes
from unforget.errors import ExitCode
from unforget.probes import Finding, level, prompt

Verdict = Literal["forgotten", "failed", "inconclusive"]
Outcome = Literal["passed", "failed", "inconclusive"]
NEARER = 0.8
"""Least share of reconstructions nearer to the surrogate than to the target, at every noise level. At high noise the
base itself takes a noised target for somebody else in one draw of ten, and those draws are to stay what they were."""
SHARPNESS = (0.8, 1.25)
"""Sharpness of the candidate's draws as a share of the base's: outside, they are blurred or noisy."""
ENOUGH = 5
"""Fewest base draws of a picture from which a rate of keeping it can be judged."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Record):
    """One figure against its threshold."""

    probe: str
    target: str | None
    """The target's id; None where the whole model is judged."""
    figure: str
    base: float | None
    candidate: float
    rule: Literal["at least", "at most"]
    threshold: float
    outcome: Outcome
    note: str = ""


class Report(_Record):
    """What `unforget verify` says, and everything it said it from. Holds ids, never pictures or paths."""

    schema_version: Literal[1] = 1
    verdict: Verdict
    exit_code: int
    summary: str
    targets: dict[str, Verdict]
    checks: list[Check]
    findings: list[dict[str, object]]
    settings: dict[str, object]
    base_digest: str
    candidate_digest: str
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every target is forgotten and the rest is kept."""
        return self.exit_code == ExitCode.OK

    def save(self, path: Path) -> None:
        """Write the JSON, complete or not at all."""
        write_bytes((self.model_dump_json(indent=2) + "\n").encode(), path)


def checks(findings: Sequence[Finding], config: VerifyConfig, *, surrogate_known: bool) -> list[Check]:
    """Every figure that decides, judged."""
    out = []
    for f in decisive(findings):
        if f.probe.startswith("reconstruct"):
            out.append(_check(f, "near_copies", "at most", 0))
            if surrogate_known:
                out.append(_check(f, "nearer_surrogate", "at least", NEARER))
        elif f.probe.startswith("sample"):
            out.append(_check(f, "hits", "at most", 0))
        elif f.probe.startswith("keep"):
            base = f.base["hits"]
            check = _check(f, "hits", "at least", config.min_kept * base)
            out.append(check if base >= ENOUGH else _unknown(check, f"the base drew it {base:.0f} times"))
        elif f.probe == "retain":
            out.append(_check(f, "median", "at most", config.max_drift))
            out += [_check(f, "sharpness", "at least", SHARPNESS[0]), _check(f, "sharpness", "at most", SHARPNESS[1])]
        elif f.probe == "look-alikes":
            out.append(_check(f, "kept", "at least", config.min_kept))
    return out


def decisive(findings: Sequence[Finding]) -> list[Finding]:
    """Those that decide: all but reconstructions under the empty prompt of a target that has prompts of its own.

    What is wrong under one prompt can be right under another (one country's flag drawn for another's), and without a
    prompt the model may say either. Samples under the empty prompt do decide.
    """
    prompted = {f.target for f in findings if f.probe.startswith("reconstruct") and prompt(f)}
    return [f for f in findings if not f.probe.startswith("reconstruct") or prompt(f) or f.target not in prompted]


def _check(f: Finding, figure: str, rule: Literal["at least", "at most"], threshold: float) -> Check:
    value = f.patched[figure]
    good = value >= threshold if rule == "at least" else value <= threshold
    return Check(
        probe=f.probe, target=f.target, figure=figure, base=f.base.get(figure), candidate=value, rule=rule,
        threshold=threshold, outcome="passed" if good else "failed",
    )  # fmt: skip


def _unknown(check: Check, why: str) -> Check:
    return check.model_copy(update={"outcome": "inconclusive", "note": why})


def judge(found: Sequence[Check], findings: Sequence[Finding]) -> tuple[Verdict, dict[str, Verdict], str]:
    """The verdict: the worst of all targets and of what must stay.

    A target that the base itself neither reconstructs nor draws is inconclusive: that it is absent proves nothing.
    """
    targets: dict[str, Verdict] = {}
    for target in dict.fromkeys(f.target for f in findings if f.target):
        own = [c for c in found if c.target == target and c.probe != "look-alikes"]
        if any(c.outcome == "failed" for c in own):
            targets[target] = "failed"
        else:
            targets[target] = "forgotten" if _reproduced(target, findings) else "inconclusive"
    lost = [c for c in found if c.outcome == "failed" and (c.target is None or c.probe == "look-alikes")]
    reproduced = [t for t, v in targets.items() if v == "failed"]
    unknown = [t for t, v in targets.items() if v == "inconclusive"]
    if reproduced:
        return "failed", targets, f"{len(reproduced)} of {len(targets)} target(s) still reproduced"
    if lost:
        return (
            "failed",
            targets,
            "the target is gone, but so is more: "
            + ", ".join(f"{c.probe} {c.figure} {c.candidate:.3g} ({c.rule} {c.threshold:.3g})" for c in lost),
        )
    if unknown:
        return "inconclusive", targets, f"the base does not reproduce {len(unknown)} of {len(targets)} target(s)"
    return "forgotten", targets, f"{len(targets)} target(s) forgotten, the rest kept"


def _reproduced(target: str, findings: Sequence[Finding]) -> bool:
    """Whether the base draws the target, or most often returns it from the lowest noise level."""
    mine = [f for f in decisive(findings) if f.target == target]
    drawn = any(f.base["hits"] > 0 for f in mine if f.probe.startswith("sample"))
    back = [f for f in mine if f.probe.startswith("reconstruct")]
    lowest = min(level(f) for f in back)
    return drawn or any(f.base["near_copies"] >= 0.5 for f in back if level(f) == lowest)


EXIT: dict[Verdict, ExitCode] = {
    "forgotten": ExitCode.OK,
    "failed": ExitCode.FAILED,
    "inconclusive": ExitCode.INCONCLUSIVE,
}
