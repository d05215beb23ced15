"""The report as Markdown: the summary of a CI job."""

import re
from bisect import bisect_right

from unforget.reports import tables
from unforget.reports.rendering import template
from unforget.reports.words import entities, tally, worst_first
from unforget.verification.report import Report

_SPECIAL = re.compile(r"[&<>|`*_~\[\]\\$]")


def markdown(report: Report, limit: int = 1_000_000) -> str:
    """The verdict and the targets first, all checks last, in at most `limit` bytes of UTF-8 (GitHub takes 1 MiB).

    The longest tables end early, and say how much is left out.
    """
    checks = worst_first(report.checks)
    excused = {t.id for t in report.targets if t.verdict == "allowed"}
    wrong = [c for c in checks if (c.outcome in ("failed", "inconclusive") or c.borderline) and c.target not in excused]
    told: dict[str, tables.Rows] = {
        "Targets": [{"target": t.id, "verdict": t.verdict, "worst found": t.reason} for t in report.targets],
        "What is wrong": tables.of_checks(wrong),
        **tables.by_title(report),
        f"All checks: {tally(checks)}": tables.of_checks(checks),
    }
    document = template("report.md.jinja", lambda text: entities(text, _SPECIAL))

    def write(most: int) -> bytes:
        return document.render(report=report, tables=told, most=most).encode()

    longest = max(map(len, told.values()))
    text = write(longest)
    if len(text) > limit:
        most = bisect_right(range(longest), limit, key=lambda most: len(write(most))) - 1
        text = write(max(most, 0))[:limit]  # without any row it may still be too long
    return text.decode(errors="ignore")
