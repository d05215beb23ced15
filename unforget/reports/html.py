"""The report as one HTML file that needs nothing else: no network, no script."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from unforget.errors import printable
from unforget.files.images import to_pil
from unforget.reports.contact_sheet import Row
from unforget.reports.rendering import template
from unforget.surrogate.ranking import Candidate
from unforget.verification.report import Report

SMALL = 128
"""Pixels of a side up to which an image is enlarged in squares."""


def page(report: Report, rows: Sequence[Row] = ()) -> str:
    """The whole report for a reader; a target is shown only where `rows` hold it: images (C, H, W) in [-1, 1]."""
    groups: list[tuple[str, list[list[dict[str, Any]]]]] = []
    for heading, row in rows:
        if heading or not groups:
            groups.append((heading, []))
        groups[-1][1].append([
            {
                "source": _source(image), "caption": caption, "small": max(image.shape[-2:]) <= SMALL,
                "alt": f"{caption}: {groups[-1][0]}, image {k} of {len(row)}",
            }
            for k, (image, caption) in enumerate(row, 1)
        ])  # fmt: skip
    return _rendered("report", report=report, images=groups)


def picker(target: Tensor, ranked: Sequence[Candidate], picked: int, command: Callable[[int, Candidate], str]) -> str:
    """All candidates for a target's surrogate, best first, with the command that takes each."""
    rows = [(number, c, _source(c.image), command(number, c)) for number, c in enumerate(ranked, 1)]
    return _rendered("candidates", target=_source(target), size=target.shape[-2:], rows=rows, picked=picked)


def _rendered(name: str, **values: Any) -> str:
    return template(f"{name}.html.jinja", lambda text: html.escape(printable(text))).render(values)


def _source(image: Tensor) -> str:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
