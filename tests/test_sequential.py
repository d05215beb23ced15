"""The test of a rate: its error rates, by another route than the one that computes them."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binom

from unforget.core.metrics import upper_bound
from unforget.verification.sequential import FIRST, ends, plan

LIMITS = [(0.005, 0.95), (0.02, 0.95), (0.05, 0.9), (0.001, 0.99)]


@pytest.mark.parametrize(("max_rate", "confidence"), LIMITS)
def test_without_a_hit_the_exact_bound_is_under_the_limit(max_rate, confidence):
    shortest = plan(max_rate, confidence).shortest
    assert upper_bound(0, shortest, confidence) < max_rate
    assert (1 - max_rate) ** shortest == pytest.approx(FIRST * (1 - confidence), rel=0.03)


def test_half_a_percent_at_95_takes_900_draws_and_a_hit_costs_hundreds():
    p = plan(0.005, 0.95)
    one, two = np.zeros(3000, bool), np.zeros(3000, bool)
    one[5] = two[[5, 50]] = True
    assert p.decide(np.zeros(899, bool)) == (899, None)
    assert [p.decide(hits) for hits in (np.zeros(3000, bool), one, two)] == [
        (900, "passes"), (1350, "passes"), (1650, "passes")]  # fmt: skip


@pytest.mark.parametrize(("max_rate", "confidence"), LIMITS)
def test_over_all_looks_it_errs_no_more_than_it_says(max_rate, confidence):
    p = plan(max_rate, confidence)
    assert p.false_pass <= (1 - confidence) * (1 + 1e-6)
    assert p.false_fail <= 1 - confidence


@pytest.mark.parametrize(("share", "passes"), [(1.0, False), (0.5, True)])
def test_the_stated_error_rates_are_those_of_simulated_runs(share, passes):
    """At the limit no more than one run of twenty passes; at half of it, no more than one fails."""
    p, rng, runs = plan(0.02, 0.95), np.random.default_rng(0), 4000
    verdicts = [p.decide(rng.random(p.looks[-1].drawn) < 0.02 * share)[1] for _ in range(runs)]
    wrong = sum(v != ("passes" if passes else "fails") for v in verdicts)
    stated = p.false_fail if passes else p.false_pass
    assert binom.cdf(wrong, runs, stated) > 1e-4 < binom.sf(wrong - 1, runs, stated)
    drawn = np.array([p.decide(rng.random(p.looks[-1].drawn) < 0.02 * share)[0] for _ in range(runs // 4)])
    passed, failed, mean = ends(p.looks, 0.02 * share)
    assert passed + failed == pytest.approx(1)
    assert abs(drawn.mean() - mean) < 4 * drawn.std() / len(drawn) ** 0.5


def test_every_run_ends_with_a_verdict_and_boundaries_never_cross():
    p = plan(0.005, 0.95)
    assert p.looks[-1].fails == p.looks[-1].passes + 1
    assert all(a.drawn < b.drawn and a.passes <= b.passes for a, b in pairwise(p.looks))
    assert all(a.fails <= b.fails for a, b in pairwise(p.looks[:-1]))  # the last decides for all that are left
    assert all(look.passes < look.fails for look in p.looks)


def test_a_hopeless_model_fails_soon_and_no_later_draw_counts():
    p = plan(0.005, 0.95)
    hits = np.zeros(600, bool)
    hits[:10] = True
    drawn, verdict = p.decide(hits)
    assert (drawn, verdict) == (p.looks[0].drawn, "fails")
    assert drawn < 40
    assert p.decide(np.concatenate([np.zeros(900, bool), np.ones(50, bool)])) == (900, "passes")


def test_looks_follow_one_another():
    p = plan(0.005, 0.95)
    assert [p.following(n) for n in (0, 900, 10**9)] == [p.looks[0].drawn, 1350, p.looks[-1].drawn]
