"""What the formats share: how a figure reads, and which check comes first."""

import re
from collections import Counter
from collections.abc import Iterable

from unforget.errors import printable
from unforget.verification.report import Check, Report

RANK = {"failed": 0, "inconclusive": 1, "passed": 2, "informational": 3}
"""Which outcome a reader sees first."""


def one_line(text: str, longest: int = 300) -> str:
    """The text printable, on one line, and cut where it is long: a prompt may be a page."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def entities(text: str, special: re.Pattern[str]) -> str:
    """The text on one line, its special characters as entities: tables split their cells before backslashes count."""
    return special.sub(lambda found: f"&#{ord(found[0])};", one_line(text, 1000))


def number(value: float | None) -> str:
    """Four digits; a dash for none."""
    return "—" if value is None else f"{value:.4g}"


def interval(check: Check) -> str:
    """The exact bounds of the candidate's figure; empty where it is not a rate."""
    return "" if check.low is None and check.high is None else f"{number(check.low)} to {number(check.high)}"


def sentence(check: Check) -> str:
    """A check in one line."""
    bounds = f" ({interval(check)})" if interval(check) else ""
    end = ", borderline" * check.borderline + (f" ({check.note})" if check.note else "")
    figure = f"{check.figure} {number(check.candidate)}{bounds}, wanted {check.rule} {number(check.threshold)}"
    return one_line(f"{check.name}: {figure}{end}", 1000)


def worst_first(checks: Iterable[Check]) -> list[Check]:
    """Failed, failed only by being borderline, inconclusive, passed, informational; in each the order they came in."""
    return sorted(checks, key=lambda check: (RANK[check.outcome], check.borderline))


def facts(report: Report) -> dict[str, str]:
    """What was judged, when, and by which policy."""
    patch = " + ".join(digest[:12] for digest in report.patches)
    found = {"model": report.model, "patch": patch, "date": report.date, "policy": report.level}
    return {name: value for name, value in found.items() if value}


def rates(report: Report) -> list[str]:
    """How often each target is drawn, in a sentence each."""
    several = len(report.targets) > 1
    return [f"{t.id[:8]}: {t.rate}" if several else t.rate for t in report.targets if t.rate]


def tally(checks: Iterable[Check]) -> str:
    """How many checks ended how."""
    count = Counter(check.outcome for check in checks)
    return ", ".join(f"{count[o]} {o}" for o in ("passed", "failed", "inconclusive", "informational") if count[o])
