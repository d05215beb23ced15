"""What the HTML page and the Markdown summary say in tables. A cell is a text, or a text and a note below it."""

from collections.abc import Iterable

from unforget.reports.words import interval, number
from unforget.verification.report import Check, Report, Seen

Rows = list[dict[str, str | tuple[str, str]]]
"""Rows of cells, by the heading of the column."""


def of_checks(checks: Iterable[Check]) -> Rows:
    """Each figure against its threshold. A negative margin is on the wrong side."""
    return [
        {
            "outcome": (c.outcome, "borderline" * c.borderline),
            "target": c.target or "model",
            "check": (c.name, c.note),
            "figure": (c.meaning, c.figure if c.figure != c.meaning else ""),
            "base": number(c.base),
            "candidate": (number(c.candidate), interval(c)),
            "wanted": f"{c.rule} {number(c.threshold)}",
            "margin": f"{(c.candidate - c.threshold) * (1 if c.rule == 'at least' else -1) or 0.0:+.3g}",
        }
        for c in checks
    ]


def of_findings(findings: Iterable[Seen]) -> Rows:
    """All figures that the probes measured."""
    return [
        {"probe": s.name, "figure": name, "base": number(s.base.get(name)), "candidate": number(s.candidate.get(name))}
        for s in findings
        for name in s.base | s.candidate
    ]


def by_title(report: Report) -> dict[str, Rows]:
    """What holds for the whole report."""
    known = [
        ("base", report.base_digest),
        ("candidate", report.candidate_digest),
        ("nonce", report.nonce),
        ("schema version", report.schema_version),
        *(("similarity backend", backend) for backend in report.backends),
        *((f"version of {name}", version) for name, version in report.versions.items()),
        *((k, ", ".join(map(str, v)) if isinstance(v, list | tuple) else v) for k, v in report.settings.items()),
        *((f"seconds, {name}", f"{seconds:.1f}") for name, seconds in report.seconds.items()),
    ]
    return {
        "Robustness": [
            {"target": r.target, "probe": r.probe, "what an adversary needed": r.sentence} for r in report.robustness
        ],
        "Allow-list": [
            {"target": a.id, "reason": a.reason, "state": a.state, "until": a.expires} for a in report.allowed
        ],
        "Calibration": [
            {
                "target": c.target,
                "similarity": c.backend,
                "near-copy below": (number(c.threshold), "capped half way to the surrogate" * c.capped),
                "false positives": number(c.false_positive_rate),
                "pairs": str(c.pairs),
            }
            for c in report.calibrations
        ],
        "Provenance": [{"what": name, "which": str(value)} for name, value in known],
    }
