"""The drawings of the HTML page: which figures of a report go into which chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from unforget.reports.charts import Decades, Limit, Point, Rate, bar, curve, safe
from unforget.reports.words import RANK, number, one_line, seen, wanted, worst_first
from unforget.verification.report import Check, Place, Report, Seen

P = TypeVar("P", bound=Place)

MOST = 6
"""Charts of one sort in a card, and rows of a panel; the tables have the rest."""


def shares(checks: Iterable[Check]) -> list[str]:
    """Which picture comes back from each noise level; whether it is recalled where no surrogate is known."""
    levelled = [check for check in checks if check.probe == "reconstruct" and check.timestep is not None]
    known = [check for check in levelled if check.figure == "nearer_surrogate"]
    title = "Nearer to the surrogate" if known else "Recalled"
    groups = _alike(known or [check for check in levelled if check.figure == "recall"])
    groups.sort(key=lambda group: (min(RANK[check.outcome] for check in group), not group[0].prompt))
    return [_share(title, group) for group in groups[:MOST]]


def _share(title: str, group: Sequence[Check]) -> str:
    points = [
        Point(c.timestep or 0, c.base, c.candidate, c.low, c.high, failed=c.outcome == "failed") for c in group
    ]  # fmt: skip
    drawn = curve(points, f"{title}, share of reconstructions", Limit(group[0].threshold, group[0].rule), top=1.0)
    return _figure(title, _under("share of reconstructions", group[0]), drawn)


def distances(found: Iterable[Seen]) -> list[str]:
    """How far from the target the reconstructions are, and how near a model returns what it never saw."""
    title = "Mean distance to the target"
    levelled = [s for s in found if s.probe == "reconstruct" and s.timestep is not None and "to_target" in s.candidate]
    return [
        _figure(
            title,
            _under("of reconstructions", group[0]),
            curve([_distance(s) for s in group], title, None),
        )
        for group in sorted(_alike(levelled), key=lambda group: not group[0].prompt)[:MOST]
    ]


def _distance(s: Seen) -> Point:
    return Point(s.timestep or 0, s.base.get("to_target"), s.candidate["to_target"], floor=s.candidate.get("floor"))


def draws(report: Report, found: Iterable[Seen]) -> str:
    """How often both models drew a target of their own accord, with exact intervals."""
    rates = [(s, rate) for s in found if (rate := _rate(s.candidate))]
    if not rates:
        return ""
    checks = {_place(check): check for check in report.checks if check.figure == "rate"}
    rates.sort(key=lambda pair: (_outcome(checks, pair[0]), -pair[1].high))
    most = report.settings.get("max_rate")
    limit = Limit(float(most), "at most") if isinstance(most, int | float) else None
    axis = Decades([v for _, rate in rates for v in (rate.at, rate.high)] + ([limit.at] if limit else []))
    tracks = [_track(axis, limit, s, rate, failed=_outcome(checks, s) == RANK["failed"]) for s, rate in rates[:MOST]]
    tracks.append(f'<div class="draw"><span></span><div>{axis.scale(limit)}</div></div>')
    more = f'<p class="quiet">{len(rates) - MOST} more in the table</p>' if len(rates) > MOST else ""
    under = "how often a model draws it of its own accord, with the exact interval of the rate"
    return _figure("Draws that are near-copies", under, "".join(tracks) + more, "wide")


def _track(axis: Decades, limit: Limit | None, s: Seen, rate: Rate, *, failed: bool) -> str:
    interval = f"{number(rate.low)} to {number(rate.high)}"
    said = f"{s.name}: candidate {_times(s.candidate)}, rate {interval}; base {_times(s.base)}"
    drawn = axis.track(_rate(s.base), rate, limit, one_line(said), failed=failed)
    return (
        f'<div class="draw"><div><h4>{safe(one_line(s.name))}</h4><p class="quiet">base {_times(s.base)}, '
        f"candidate {_times(s.candidate)}<br>rate of the candidate {interval}</p></div><div>{drawn}</div></div>"
    )


def rest(report: Report) -> str:
    """A bar for every figure of the whole model, and the look-alikes kept beside each target."""
    checks = [c for c in worst_first(report.checks) if c.target is None or c.probe == "neighbours"]
    spread = {_place(s): s.candidate for s in report.findings}
    return "".join(_bar(check, spread.get(_place(check), {})) for check in checks)


def _bar(check: Check, figures: dict[str, float]) -> str:
    others = {name: figures[name] for name in ("mean", "p90") if name in figures and check.figure == "median"}
    ticks = "".join(f" · {name} {number(value)}" for name, value in others.items())
    name = one_line(check.name) + (f" {check.target}" if check.target else "")
    called = "median drift" if check.figure == "median" else check.figure
    label = f"{name}, {called}: {seen(check)}, wanted {wanted(check)}, {check.outcome}"
    drawn = bar(
        check.candidate, Limit(check.threshold, check.rule), list(others.values()), label,
        failed=check.outcome == "failed",
    )  # fmt: skip
    return (
        f"<figure><h4>{safe(name)} · {safe(called)}</h4>{drawn}"
        f'<figcaption class="quiet">{seen(check)}, wanted {wanted(check)}{ticks}</figcaption></figure>'
    )


def _figure(title: str, under: str, drawn: str, kind: str = "narrow") -> str:
    caption = f'<figcaption><h4>{title}</h4><p class="quiet">{safe(under)}</p></figcaption>'
    return f'<figure class="{kind}">{caption}{drawn}</figure>\n'


def _under(what: str, place: Place) -> str:
    """A line below a title: what is drawn, and where it was seen."""
    prompt = f"under '{one_line(place.prompt, 80)}'" if place.prompt else ""
    return ", ".join(part for part in (what, place.variant, prompt) if part)


def _alike(places: Iterable[P]) -> list[list[P]]:
    """What differs in its noise level alone, together: the points of one curve."""
    groups: dict[tuple[str, str], list[P]] = {}
    for place in places:
        groups.setdefault((place.prompt, place.variant), []).append(place)
    return list(groups.values())


def _place(place: Place) -> tuple[object, ...]:
    return place.probe, place.target, place.timestep, place.prompt, place.variant


def _outcome(checks: dict[tuple[object, ...], Check], place: Place) -> int:
    check = checks.get(_place(place))
    return RANK[check.outcome] if check else RANK["informational"]


def _rate(figures: dict[str, float]) -> Rate | None:
    if not {"hits", "drawn", "rate_low", "rate_high"} <= figures.keys():
        return None
    return Rate(figures["hits"] / max(figures["drawn"], 1), figures["rate_low"], figures["rate_high"])


def _times(figures: dict[str, float]) -> str:
    return f"{number(figures.get('hits'))} of {figures.get('drawn', 0):.0f}"
