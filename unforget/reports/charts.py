"""What the charts of the HTML page show, and where it lies in a drawing, in percent."""

from collections.abc import Iterable

from unforget.reports.words import RANK
from unforget.verification.report import Check


def curves(checks: Iterable[Check]) -> list[list[Check]]:
    """Each figure that was taken at several noise levels, by timestep; the worst first."""
    groups: dict[tuple[str, ...], list[Check]] = {}
    for c in sorted((c for c in checks if c.timestep is not None), key=lambda c: c.timestep or 0):
        groups.setdefault((c.probe, c.figure, c.rule, c.prompt, c.variant), []).append(c)
    several = [group for group in groups.values() if len(group) > 1]
    return sorted(several, key=lambda group: min(RANK[c.outcome] for c in group))


def across(value: float, check: Check) -> float:
    """Where a figure of a check lies on the scale of that check, from left to right."""
    top = max(check.base or 0, check.candidate, check.high or 0, check.threshold)
    if check.figure == "rate":  # the fourth root has room for zero, for one in a thousand, and for "always"
        return _percent(max(0.0, value) ** 0.25)
    if check.timestep is not None and top <= 1:  # a share: the levels of a curve have one scale
        return _percent(value)
    return _percent(value / (1.15 * top or 1))


def _percent(share: float) -> float:
    """Cut to what can be drawn; what is not a number is drawn at the start."""
    return round(100 * min(max(0.0, share), 1.0), 1)
