"""The report as Markdown: the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unforget.reports.words import margin, number, one_line, outcome, provenance, seen, tally, wanted, worst_first
from unforget.verification.report import Check, Report

_MARKS = {
    "forgotten": "✅", "passed": "✅", "failed": "❌", "inconclusive": "⚠️", "allowed": "⚠️", "informational": "💬",
    "active": "⚠️", "expired": "❌", "unused": "💬",
}  # fmt: skip
_SPECIAL = re.compile(r"[&<>|`*_~\[\]\\$]")
_LEFT_OUT = "\n{} of {} left out: too long for this page.\n"


@dataclass(frozen=True)
class _Part:
    """A stretch of the page whose last rows can be dropped."""

    head: str
    rows: Sequence[str] = ()
    tail: str = ""

    def cut(self, room: int) -> tuple[str, int]:
        """As many rows as go into `room` bytes, and the room that is left."""
        kept = 0
        for row in self.rows:
            if _size(row) > room:
                break
            room -= _size(row)
            kept += 1
        dropped = len(self.rows) - kept
        left_out = _LEFT_OUT.format(dropped, len(self.rows)) if dropped else ""
        return self.head + "".join(self.rows[:kept]) + left_out + self.tail, room


def markdown(report: Report, limit: int = 1_000_000) -> str:
    """The verdict and the targets first, all checks last.

    Args:
        report: What to show.
        limit: Most bytes of UTF-8; GitHub refuses a job summary of more than 1 MiB.
    """
    parts = [part for part in _parts(report) if part.rows or not part.tail]
    room = limit - sum(_size(part.head + part.tail + _LEFT_OUT.format(*[len(part.rows)] * 2)) for part in parts)
    text = ""
    for part in parts:
        said, room = part.cut(room)
        text += said
    return text.encode()[:limit].decode(errors="ignore")  # the heads alone may be too long


def _parts(report: Report) -> list[_Part]:
    checks = worst_first(report.checks)
    excused = {t.id for t in report.targets if t.verdict == "allowed"}
    wrong = [c for c in checks if (c.outcome in ("failed", "inconclusive") or c.borderline) and c.target not in excused]
    return [
        _Part(f"## unforget verify: {_marked(report.verdict)}\n\n{_safe(report.summary, 2000)}\n"),
        _table(
            "\n### Targets\n\n",
            ("target", "verdict", "worst found"),
            ((_code(t.id), _marked(t.verdict), _safe(t.reason)) for t in report.targets),
        ),
        _checks("\n### What is wrong\n\n", wrong),
        _Part(
            "\n### Robustness\n\n",
            [f"- {_safe(r.sentence)} ({_code(r.target)}, {_safe(r.probe)})\n" for r in report.robustness],
            "\n",
        ),
        _table(
            "\n### Allow-list\n\n",
            ("target", "state", "until", "reason"),
            ((_code(a.id), _marked(a.state), _safe(a.expires), _safe(a.reason)) for a in report.allowed),
        ),
        _table(
            "\n### Calibration\n\n",
            ("target", "backend", "near-copy below", "false alarms", "pairs"),
            (
                (_code(c.target), _safe(c.backend), number(c.threshold) + ", capped" * c.capped,
                 number(c.false_positive_rate), str(c.pairs))
                for c in report.calibrations
            ),
        ),
        _folded("Provenance", _table("", ("what", "which"), ((_safe(k), _safe(v)) for k, v in provenance(report)))),
        _folded(f"All checks: {tally(checks)}", _checks("", checks)),
    ]  # fmt: skip


def _checks(title: str, checks: Iterable[Check]) -> _Part:
    heads = ("outcome", "target", "check", "figure", "base", "candidate", "wanted", "margin")
    return _table(title, heads, map(_row, checks))


def _row(check: Check) -> tuple[str, ...]:
    target = _code(check.target) if check.target else "model"
    note = f"<br>{_safe(check.note)}" if check.note else ""
    figures = (number(check.base), seen(check), wanted(check), margin(check))
    return f"{_MARKS[check.outcome]} {outcome(check)}", target, _safe(check.name) + note, check.figure, *figures


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> _Part:
    head = title + _line(heads) + _line(["---"] * len(heads))
    return _Part(head, list(map(_line, rows)), "\n")


def _folded(title: str, part: _Part) -> _Part:
    head = f"\n<details><summary>{title}</summary>\n\n{part.head}"
    return _Part(head, part.rows, f"{part.tail}</details>\n")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def _marked(word: str) -> str:
    return f"{_MARKS[word]} {word}"


def _safe(text: str, longest: int = 300) -> str:
    """One line in which nothing is markup: entities, since a table splits its cells before it reads backslashes."""
    return _SPECIAL.sub(lambda special: f"&#{ord(special[0])};", one_line(text, longest))


def _code(text: str) -> str:
    """An id; not in backticks, which would show the entities."""
    return f"<code>{_safe(text)}</code>"


def _size(text: str) -> int:
    return len(text.encode())
