"""How many draws decide whether a rate lies under a limit: a sequential test with exact error rates.

Drawing stops at the first look at which the verdict is certain. The boundaries are exact: the distribution of hits is
carried from look to look under the limit and under half of it, and what each look may wrongly pass or fail is taken
from a budget (error spending, Lan and DeMets 1983, doi:10.2307/2336502).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Decision = Literal["passes", "fails"]
HORIZON = 40
"""Longest test, in lengths of the shortest one that can pass: so long that half the limit passes it at 95 %."""
RESERVE = 0.001
"""Share of what may wrongly pass that is left to the looks after the first that can pass."""
GROWTH = 1.3
"""Each look comes after so many times the draws of the one before."""


@dataclass(frozen=True)
class Look:
    """After `drawn` draws, `passes` hits or fewer pass (-1: none do yet) and `fails` or more fail."""

    drawn: int
    passes: int
    fails: int


@dataclass(frozen=True)
class Plan:
    """A test of "the rate is under the limit"."""

    looks: tuple[Look, ...]
    false_pass: float
    """Probability, over all looks, that a model whose rate is the limit passes: 1 - confidence at most."""
    false_fail: float
    """That one whose rate is half of it fails."""

    @property
    def shortest(self) -> int:
        """Draws that pass when none hits: 598 for a rate of 0.5 % at 95 %."""
        return next(look.drawn for look in self.looks if look.passes >= 0)

    def decide(self, hits: NDArray[np.bool_]) -> tuple[int, Decision | None]:
        """Of the draws in order, (N,) of bool: after how many the decision was certain, and which; or N and None."""
        for look in self.looks:
            seen = int(hits[: look.drawn].sum())
            if look.drawn <= len(hits) and not look.passes < seen < look.fails:
                return look.drawn, "passes" if seen <= look.passes else "fails"
        return len(hits), None

    def following(self, drawn: int) -> int:
        """Draws at the look that follows; the last one again at the end."""
        return next((look.drawn for look in self.looks if look.drawn > drawn), self.looks[-1].drawn)


@lru_cache
def plan(max_rate: float, confidence: float) -> Plan:
    """The test for a limit in (0, 1) at a confidence in (0.5, 1).

    The first look that can pass is the exact fixed test: a model at the limit shows no hit in 1 - confidence of all
    runs. That leaves next to nothing, so whoever hits once has to prove a rate well under the limit.
    """
    error, looks = 1 - confidence, list[Look]()
    shortest = math.ceil(math.log(error * (1 - RESERVE)) / math.log1p(-max_rate))
    at_limit, at_half = paths = _Paths(max_rate), _Paths(max_rate / 2)
    first = (1 - max_rate) ** shortest
    for drawn in _looks(shortest):
        share = drawn / (HORIZON * shortest)
        for path in paths:
            path.draw(drawn)
        allowed = 0.0 if drawn < shortest else first + (error - first) * share if drawn > shortest else first
        passes = at_limit.most(allowed)
        fails = passes + 1 if share >= 1 else max(at_half.least(error * share), passes + 1)
        for path in paths:
            path.leave(passes, fails)
        looks.append(Look(drawn, passes, fails))
        if fails == passes + 1:
            break
    return Plan(tuple(looks), at_limit.passed, at_half.failed)


def _looks(shortest: int) -> list[int]:
    """Some before anything can pass, so that a hopeless model fails soon; then to the horizon."""
    early = [math.ceil(shortest / GROWTH**k) for k in range(12, 0, -1)]
    late = [math.ceil(shortest * GROWTH**k) for k in range(math.ceil(math.log(HORIZON) / math.log(GROWTH)))]
    return sorted({n for n in early if n >= 8} | set(late) | {HORIZON * shortest})


class _Paths:
    """Probability of each number of hits among the runs that no look has decided yet."""

    def __init__(self, rate: float) -> None:
        self.rate, self.drawn, self.alive = rate, 0, np.ones(1)
        self.passed = self.failed = 0.0

    def draw(self, drawn: int) -> None:
        more, self.drawn = drawn - self.drawn, drawn
        most = int(binom.isf(1e-15, more, self.rate)) + 1
        self.alive = np.convolve(self.alive, binom.pmf(np.arange(most + 1), more, self.rate))

    def most(self, allowed: float) -> int:
        """Most hits that may pass, so that no more than `allowed` of all runs have passed; -1 for none."""
        return int(np.searchsorted(self.passed + np.cumsum(self.alive), allowed * (1 + 1e-9), side="right")) - 1

    def least(self, allowed: float) -> int:
        """Fewest hits that may fail, so that no more than `allowed` of all runs have failed."""
        tail = self.failed + np.cumsum(self.alive[::-1])[::-1]
        return int((tail > allowed).sum())

    def leave(self, passes: int, fails: int) -> None:
        self.passed += float(self.alive[: passes + 1].sum())
        self.failed += float(self.alive[fails:].sum())
        self.alive = self.alive[:fails].copy()
        self.alive[: passes + 1] = 0
