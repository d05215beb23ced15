"""How many draws decide whether a rate lies under a limit: a sequential test with exact error rates.

Drawing stops at the first look at which the verdict is certain. Both boundaries are lines: so many draws before
anything may pass, and so many more for each hit; so many hits, and more of them the more is drawn, fail. The second is
Wald's, between half of the limit and the limit (doi:10.1214/aoms/1177731118). Where the first goes on after its first
look is found so that a model at the limit passes as seldom as was asked, exactly: the distribution of hits is carried
from look to look.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Decision = Literal["passes", "fails"]
FIRST = 0.22
"""Share of what may wrongly pass that the first look spends: the rest is for those who hit once or more."""
STEP = 1.5
"""Draws that a hit costs, in 1 / limit: more let half of the limit pass later, and what hits seldom sooner."""
HORIZON = 18
"""Longest test, in hits that fail at once: so long that half of the limit nearly always passes before."""
EARLY = 12
"""Looks before anything may pass, so that a hopeless model fails soon."""
GROWTH = 1.3
"""Each of these comes after so many times the draws of the one before."""


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
    mean_at_half: float
    """Draws that this one takes, in the mean."""

    @property
    def shortest(self) -> int:
        """Draws that pass when none hits: 900 for a rate of 0.5 % at 95 %."""
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

    docs/results.md, The rate, has what other lines would cost.
    """
    error, half, step = 1 - confidence, max_rate / 2, math.ceil(STEP / max_rate)
    first = math.ceil(math.log(FIRST * error) / math.log1p(-max_rate))
    a_miss = math.log1p(-half) - math.log1p(-max_rate)  # its log likelihood ratio
    a_hit = math.log(2) + a_miss  # that of a hit in place of a miss, the other way
    most, more = math.log(1 / error - 1) / a_hit, a_miss / a_hit
    longest = math.ceil(HORIZON * most)
    early = sorted({n for k in range(1, EARLY + 1) if (n := math.ceil(first / GROWTH**k)) >= 8})

    def looks(second: int) -> tuple[Look, ...]:
        passing = [first, *range(second, second + longest * step, step)]
        drawn = [(n, -1) for n in early] + [(n, hits) for hits, n in enumerate(passing)]
        made = [Look(n, hits, max(hits + 1, math.ceil(most + more * n))) for n, hits in drawn]
        return (*made[:-1], Look(made[-1].drawn, longest, longest + 1))

    low, high = first, first + 64 * step  # the second look comes after `low` draws: too many would pass; `high`: not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ends(looks(middle), max_rate)[0] > error else (low, middle)
    found = looks(high)
    return Plan(found, ends(found, max_rate)[0], *ends(found, half)[1:])


def ends(looks: Sequence[Look], rate: float) -> tuple[float, float, float]:
    """How a model of this rate ends, exactly: probabilities that it passes and fails, and draws in the mean."""
    alive, drawn, passed, failed, mean = np.ones(1), 0, 0.0, 0.0, 0.0  # alive: of each number of hits, undecided
    for look in looks:
        more, drawn = look.drawn - drawn, look.drawn
        mean += more * float(alive.sum())
        most = int(binom.isf(1e-15, more, rate)) + 1
        alive = np.convolve(alive, binom.pmf(np.arange(most + 1), more, rate))
        passed += float(alive[: look.passes + 1].sum())
        failed += float(alive[look.fails :].sum())
        alive = alive[: look.fails].copy()
        alive[: look.passes + 1] = 0
    return passed, failed, mean
