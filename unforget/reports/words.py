"""What the formats share: how a figure reads, and which check comes first."""

from __future__ import annotations

import re
from collections.abc import Iterable

from unforget.verification.report import Check, Report

_ODD = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
RANK = {"failed": 0, "inconclusive": 1, "passed": 2, "informational": 3}
"""Which outcome a reader sees first."""


def printable(text: str) -> str:
    """The text, with a code for each character that XML forbids, that controls, or that turns the reading direction."""
    return _ODD.sub(lambda odd: f"\\u{ord(odd[0]):04x}", text)


def one_line(text: str, longest: int = 300) -> str:
    """The text printable, on one line, and cut where it is long: a prompt may be a page."""
    line = " ".join(printable(text).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def number(value: float | None) -> str:
    """Four digits; a dash for none."""
    return "—" if value is None else f"{value:.4g}"


def margin(check: Check) -> str:
    """How far the candidate is on the right side of the threshold; negative on the wrong one."""
    room = check.candidate - check.threshold
    room = room if check.rule == "at least" else -room
    return f"{room or 0.0:+.3g}"


def outcome(check: Check) -> str:
    """The outcome in words, a borderline one said."""
    return f"{check.outcome}, borderline" if check.borderline else check.outcome


def wanted(check: Check) -> str:
    """The rule and its threshold."""
    return f"{check.rule} {number(check.threshold)}"


def seen(check: Check) -> str:
    """The candidate's figure, with its exact bounds where it is a rate."""
    bounds = check.low is not None or check.high is not None
    return number(check.candidate) + (f" ({number(check.low)} to {number(check.high)})" if bounds else "")


def sentence(check: Check) -> str:
    """A check in one line."""
    borderline = ", borderline" if check.borderline else ""
    note = f" ({check.note})" if check.note else ""
    return one_line(f"{check.name}: {check.figure} {seen(check)}, wanted {wanted(check)}{borderline}{note}", 1000)


def worst_first(checks: Iterable[Check]) -> list[Check]:
    """Failed, failed only by being borderline, inconclusive, passed, informational; in each the order they came in."""
    return sorted(checks, key=lambda check: (RANK[check.outcome], check.borderline))


def tally(checks: Iterable[Check]) -> str:
    """How many checks ended how."""
    outcomes = [check.outcome for check in checks]
    return ", ".join(
        f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "inconclusive", "informational") if o in outcomes
    )


def provenance(report: Report) -> list[tuple[str, str]]:
    """Digests, backends, versions, settings and times, by name."""
    return [
        ("base", report.base_digest),
        ("candidate", report.candidate_digest),
        ("schema version", str(report.schema_version)),
        *(("similarity backend", backend) for backend in report.backends),
        *((f"version of {name}", version) for name, version in report.versions.items()),
        *((name, _plain(value)) for name, value in report.settings.items()),
        *((f"seconds, {name}", f"{seconds:.1f}") for name, seconds in report.seconds.items()),
    ]


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
