"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

from torch import Tensor

from unforget.files.images import to_pil
from unforget.reports import panels
from unforget.reports.charts import safe
from unforget.reports.style import STYLE
from unforget.reports.words import margin, number, provenance, tally, wanted, worst_first
from unforget.verification.report import Check, Report, Target, Verdict

Pictures = Sequence[tuple[str, Sequence[tuple[Tensor, str]]]]

_SIGNS = {
    "forgotten": "✓", "passed": "✓", "failed": "✕", "expired": "✕", "inconclusive": "?", "allowed": "!", "active": "!",
    "informational": "·", "unused": "·",
}  # fmt: skip
_TITLES: dict[Verdict, str] = {
    "forgotten": "Forgotten",
    "failed": "Failed",
    "inconclusive": "Inconclusive",
    "allowed": "Allowed",
}
_SMALL = 128
"""Pictures up to this side are shown pixel by pixel."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_KEY = (
    '<div class="key" aria-hidden="true">'
    '<span><svg viewBox="0 0 30 12"><path class="curve base" d="M0 6h30"/>'
    '<circle class="dot base" cx="15" cy="6" r="4"/></svg>base</span>'
    '<span><svg viewBox="0 0 30 12"><path class="curve candidate" d="M0 6h30"/>'
    '<circle class="dot candidate" cx="15" cy="6" r="4"/></svg>candidate</span>'
    '<span><svg viewBox="0 0 30 12"><path class="dot failed" d="M15 0l6 6l-6 6l-6-6z"/></svg>candidate, failed</span>'
    '<span><svg viewBox="0 0 30 12"><rect class="wanted" x="0" y="6" width="30" height="6"/>'
    '<path class="threshold" d="M0 6h30"/></svg>threshold, the wanted side tinted</span></div>\n'
)


def page(report: Report, rows: Pictures = ()) -> str:
    """The whole report for a reader.

    Args:
        report: What to show.
        rows: Rows of pictures (C, H, W) in [-1, 1] with captions, by heading; a target is not shown unasked.
    """
    body = [
        _banner(report),
        _section("Targets", *(_card(report, target, n) for n, target in enumerate(report.targets))),
        _section("The rest of the model", _rest(report)),
        _section("What an adversary needed", _robustness(report)),
        _section("Pictures", _pictures(rows)),
        _section("Allow-list", _allow_list(report)),
        _section("How near is a near-copy", _calibrations(report)),
        _section("Where this comes from", _provenance(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>unforget verify: {report.verdict}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}"
        "<footer>Evidence, never a certificate: it holds for the probes and the rates named here.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    content = "".join(parts)
    return f"<section>\n<h2>{title}</h2>\n{content}</section>\n" if content else ""


def _banner(report: Report) -> str:
    links = "".join(
        f'<a href="#target-{n}">{_pill(t.verdict)} <code>{safe(t.id)}</code></a>\n'
        for n, t in enumerate(report.targets)
    )
    count = len(report.targets)
    facts = f"{count} target{'s' * (count != 1)} · checks: {tally(report.checks)} · exit code {report.exit_code}"
    sign = f'<span aria-hidden="true">{_SIGNS[report.verdict]}</span>'
    return (
        f'<header class="card banner {report.verdict}">\n<p class="over">unforget verify · {safe(report.level)}</p>\n'
        f'<h1>{sign} {_TITLES[report.verdict]}</h1>\n<p class="summary">{safe(report.summary)}</p>\n'
        f'<p class="quiet">{facts}</p>\n'
        + (f'<nav aria-label="Targets">{links}</nav>\n' if count > 1 else "")
        + "</header>\n"
    )


def _pill(word: str) -> str:
    return f'<span class="pill {word}"><span aria-hidden="true">{_SIGNS[word]}</span> {word}</span>'


def _card(report: Report, target: Target, n: int) -> str:
    """A target: verdict, reason, curves, draws, checks."""
    checks = [check for check in report.checks if check.target == target.id]
    found = [seen for seen in report.findings if seen.target == target.id]
    figures = "".join([*panels.shares(checks), *panels.distances(found), panels.draws(report, found)])
    charts = f'{_KEY}<div class="charts">{figures}</div>\n' if figures else ""
    return (
        f'<article class="card" id="target-{n}">\n<div class="head"><h3>Target <code>{safe(target.id)}</code></h3>'
        f"{_pill(target.verdict)}</div>\n<p>{safe(target.reason)}</p>\n{charts}{_checks(checks)}</article>\n"
    )


def _rest(report: Report) -> str:
    """What must stay, of the whole model and beside each target."""
    bars = panels.rest(report)
    table = _checks([check for check in report.checks if check.target is None])
    key = '<p class="quiet">Dashed: the threshold, its wanted side tinted. Thin ticks: the other figures named.</p>'
    charts = f'{key}\n<div class="charts">{bars}</div>\n' if bars else ""
    return f'<div class="card">\n{charts}{table}</div>\n' if charts or table else ""


def _checks(checks: Sequence[Check]) -> str:
    """A table of checks, worst first; open where it has something to say."""
    heads = ("outcome", "check", "figure", "base", "candidate", "wanted", "margin")
    opened = " open" if any(check.outcome in ("failed", "inconclusive") for check in checks) else ""
    table = _table("Checks", heads, map(_row, worst_first(checks)), figures=3)
    return f"<details{opened}><summary>Checks: {tally(checks)}</summary>\n{table}</details>\n" if checks else ""


def _row(check: Check) -> tuple[str, ...]:
    bounds = check.low is not None or check.high is not None
    interval = f"{number(check.low)} to {number(check.high)}" if bounds else ""
    return (
        _pill(check.outcome) + _small("borderline" * check.borderline),
        safe(check.name) + _small(check.note),
        safe(check.figure),
        number(check.base),
        number(check.candidate) + _small(interval),
        wanted(check),
        margin(check),
    )


def _robustness(report: Report) -> str:
    items = "".join(
        f"<li>{safe(r.sentence)} <code>{safe(r.target)}</code> {_small(r.probe)}</li>\n" for r in report.robustness
    )
    return f'<div class="card">\n<ul>{items}</ul></div>\n' if items else ""


def _pictures(rows: Pictures) -> str:
    if not rows:
        return '<p class="quiet">Left out, for they would show the target. --save-images adds them.</p>\n'
    return "".join(
        f'<div class="card">\n<h3>{safe(heading)}</h3>\n'
        f'<div class="pictures">{"".join(_picture(image, caption) for image, caption in pictures)}</div>\n</div>\n'
        for heading, pictures in rows
    )


def _picture(image: Tensor, caption: str) -> str:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    height, width = image.shape[-2:]
    kind = ' class="small"' if max(height, width) <= _SMALL else ""
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return (
        f'<figure><img{kind} src="{source}" width="{width}" height="{height}" alt="{safe(caption)}">'
        f"<figcaption>{safe(caption)}</figcaption></figure>\n"
    )


def _allow_list(report: Report) -> str:
    rows = [(f"<code>{safe(a.id)}</code>", safe(a.reason), _pill(a.state), safe(a.expires)) for a in report.allowed]
    return _boxed(_table("Allow-list", ("target", "reason", "state", "until"), rows))


def _calibrations(report: Report) -> str:
    rows = [
        (
            f"<code>{safe(c.target)}</code>",
            safe(c.backend),
            number(c.threshold) + _small("capped half way to the surrogate" * c.capped),
            number(c.false_positive_rate),
            str(c.pairs),
        )
        for c in report.calibrations
    ]
    heads = ("target", "similarity", "a near-copy below", "false alarms", "of pairs")
    return _boxed(_table("Calibration", heads, rows, figures=2))


def _provenance(report: Report) -> str:
    table = _table(
        "Provenance", ("what", "which"), ((safe(k), f"<code>{safe(v)}</code>") for k, v in provenance(report))
    )
    return (
        f'<details class="card"><summary>Digests, backends, versions, settings, seconds</summary>\n{table}</details>\n'
    )


def _boxed(table: str) -> str:
    return f'<div class="card">\n{table}</div>\n' if table else ""


def _table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], figures: int = 99) -> str:
    """Rows of HTML; the second column is prose, and from column `figures` on they are numbers."""
    kinds = ["figure" if n >= figures else "text" if n == 1 else "word" for n in range(len(heads))]
    head = "".join(f'<th scope="col" class="{kind}">{title}</th>' for kind, title in zip(kinds, heads, strict=True))
    cells = [f'<td class="{kind}" data-head="{title}">' for kind, title in zip(kinds, heads, strict=True)]
    lines = [
        "<tr>" + "".join(f"{cell}{said}</td>" for cell, said in zip(cells, row, strict=True)) + "</tr>\n"
        for row in rows
    ]
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n</table>\n</div>\n"
        if lines
        else ""
    )


def _small(text: str) -> str:
    return f"<small>{safe(text)}</small>" if text else ""
