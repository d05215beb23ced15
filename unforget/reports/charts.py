"""Small SVG drawings of figures against their thresholds; the colours are the page's."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from unforget.reports.words import number, printable

WIDTH = 380
"""Of every drawing, in its own units: a page scales it to its column."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, WIDTH - 14, 20, 150
_ZERO, _FIRST = 14, 64
"""Where a logarithmic axis has zero, and its first decade."""


def safe(text: object) -> str:
    """Text for HTML, in which nothing is markup."""
    return html.escape(printable(str(text)))


@dataclass(frozen=True)
class Limit:
    """A threshold, and the side of it that is wanted."""

    at: float
    rule: str
    words: str = ""
    """What it is called, if not by its rule."""

    def __str__(self) -> str:
        return f"{self.words or self.rule} {number(self.at)}"


@dataclass(frozen=True)
class Point:
    """A noise level of a curve."""

    timestep: float
    base: float | None
    candidate: float
    low: float | None = None
    high: float | None = None
    failed: bool = False
    floor: float | None = None
    """A threshold of this level alone."""


@dataclass(frozen=True)
class Rate:
    """How often a model drew a picture, with exact bounds."""

    at: float
    low: float
    high: float


def curve(points: Iterable[Point], label: str, limit: Limit | None, top: float | None = None) -> str:
    """Base and candidate over the noise levels; the vertical axis ends at `top`, else above the largest figure."""
    points = sorted(points, key=lambda point: point.timestep)
    top = top or _above([f for p in points for f in (p.base, p.candidate, p.floor)] + [limit.at if limit else 0.0])
    span = points[-1].timestep - points[0].timestep

    def x(timestep: float) -> float:
        return _LEFT + 20 + (_RIGHT - _LEFT - 40) * ((timestep - points[0].timestep) / span if span else 0.5)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * _within(value / top)

    base = [(x(p.timestep), y(p.base)) for p in points if p.base is not None]
    candidate = [(x(p.timestep), y(p.candidate)) for p in points]
    drawn = [_band(limit, y) if limit else ""]
    drawn += [_line("grid", _LEFT, y(v), _RIGHT, y(v)) + _text(_LEFT - 6, y(v) + 4, number(v), "end") for v in
              (0.0, top / 2, top)]  # fmt: skip
    drawn += [_path("base", base), _path("candidate", candidate), *(_dot("base", *place) for place in base)]
    bounded = [p for p in points if (p.low, p.high) != (None, None)]
    drawn += [
        _whisker("candidate", x(p.timestep), y(p.low or 0), y(top if p.high is None else p.high)) for p in bounded
    ]
    drawn += [_dot("failed" if p.failed else "candidate", *xy) for p, xy in zip(points, candidate, strict=True)]
    drawn += [_text(x(t), _BOTTOM + 16, f"{t:g}", "middle") for t in _thinned([p.timestep for p in points])]
    drawn.append(_text((_LEFT + _RIGHT) / 2, _BOTTOM + 33, "timestep", "middle"))
    if limit:
        drawn.append(_line("threshold", _LEFT, y(limit.at), _RIGHT, y(limit.at)))
        drawn.append(_text(_RIGHT, _TOP - 8, str(limit), "end", "limit"))
    floors = [(x(p.timestep), y(p.floor)) for p in points if p.floor is not None]
    if floors:
        drawn.append(_path("threshold", floors))
        drawn.append(_text(_RIGHT, _TOP - 8, "what it never saw stays above", "end", "limit"))
    said = "; ".join(f"t = {p.timestep:g}: base {number(p.base)}, candidate {number(p.candidate)}" for p in points)
    return _svg(_BOTTOM + 40, f"{label}. {said}." + (f" Threshold: {limit}." if limit else ""), drawn)


def _band(limit: Limit, y: Callable[[float], float]) -> str:
    """The side of the threshold that is wanted."""
    top, bottom = (_TOP, y(limit.at)) if limit.rule == "at least" else (y(limit.at), _BOTTOM)
    return _rect("wanted", _LEFT, top, _RIGHT - _LEFT, bottom - top)


class Decades:
    """A logarithmic axis of rates up to one, with a place of its own for zero; the tracks of a panel share it."""

    def __init__(self, values: Iterable[float]) -> None:
        least = min((value for value in values if value > 0), default=0.01)
        self.first = max(-7, min(-1, math.floor(math.log10(least))))

    def x(self, rate: float) -> float:
        """Where a rate lies; one below the first decade lies at it."""
        if rate <= 0:
            return _ZERO
        return _FIRST + (_RIGHT - _FIRST) * (1 - math.log10(max(rate, 10.0**self.first)) / self.first)

    def track(self, base: Rate | None, candidate: Rate, limit: Limit | None, label: str, *, failed: bool) -> str:
        """The intervals of both models, the threshold across."""
        drawn = [_rect("wanted", self.x(0), 0, self.x(limit.at) - self.x(0), 34)] if limit else []
        drawn += [_line("grid", self.x(v), 0, self.x(v), 34) for v in self._ticks()]
        for rate, kind, height in ((base, "base", 9), (candidate, "candidate", 25)):
            if rate:
                ends = self.x(rate.low), self.x(rate.high)
                drawn.append(_line(f"whisker {kind}", ends[0], height, ends[1], height))
                drawn += [_line(f"whisker {kind}", end, height - 4, end, height + 4) for end in ends]
                drawn.append(_dot("failed" if failed and kind == "candidate" else kind, self.x(rate.at), height))
        if limit:
            drawn.append(_line("threshold", self.x(limit.at), 0, self.x(limit.at), 34))
        return _svg(34, label, drawn)

    def scale(self, limit: Limit | None) -> str:
        """The numbers below the tracks."""
        drawn = [_text(self.x(v), 12, f"{v:g}", "middle") for v in self._ticks()]
        if limit:
            drawn.append(_text(min(max(self.x(limit.at), 44), WIDTH - 44), 29, str(limit), "middle", "limit"))
        return _svg(34, "Scale of the rates, logarithmic", drawn)

    def _ticks(self) -> list[float]:
        return [0.0, *(10.0**decade for decade in range(self.first, 1))]


def bar(value: float, limit: Limit, others: Sequence[float], label: str, *, failed: bool) -> str:
    """A figure of the whole model on its own scale, other figures of the same kind as ticks."""
    top = 1.15 * max(value, limit.at, *others, 1e-9)

    def x(figure: float) -> float:
        return 2 + (WIDTH - 4) * _within(figure / top)

    wanted = (x(limit.at), x(top)) if limit.rule == "at least" else (x(0), x(limit.at))
    drawn = [
        _rect("trough", x(0), 6, x(top) - x(0), 12),
        _rect("wanted", wanted[0], 6, wanted[1] - wanted[0], 12),
        _rect("bar failed" if failed else "bar", x(0), 9, x(value) - x(0), 6),
        *(_line("tick", x(other), 6, x(other), 18) for other in others),
        _line("threshold", x(limit.at), 1, x(limit.at), 23),
    ]
    return _svg(24, label, drawn)


def _above(figures: Iterable[float | None]) -> float:
    """A round number above all figures."""
    most = max([f for f in figures if f is not None and math.isfinite(f)], default=0.0) or 1.0
    unit = 10.0 ** math.floor(math.log10(most))
    return next(step * unit for step in (1, 2, 4, 6, 8, 10, 20) if step * unit > most)


def _within(share: float) -> float:
    """Cut to what can be drawn; not a number is drawn at the start."""
    return min(max(share, 0.0), 1.0) if share == share else 0.0


def _thinned(timesteps: Sequence[float], most: int = 7) -> Sequence[float]:
    return timesteps[:: -(-len(timesteps) // most)]


def _svg(height: int, label: str, drawn: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{safe(label)}">{"".join(drawn)}</svg>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"/>'


def _path(kind: str, places: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="curve {kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>'


def _whisker(kind: str, x: float, *ends: float) -> str:
    caps = "".join(_line(f"whisker {kind}", x - 4, y, x + 4, y) for y in ends)
    return _line(f"whisker {kind}", x, ends[0], x, ends[1]) + caps


def _dot(kind: str, x: float, y: float) -> str:
    """A disc; a failed one is a square on its corner, so that colour is not all that says it."""
    if kind == "failed":
        return f'<path class="dot failed" d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6-6z"/>'
    return f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(text)}</text>'
