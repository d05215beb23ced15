import math
import statistics

import pytest
import torch
from scipy.stats import binomtest

from unforget.core import metrics
from unforget.core.metrics import (
    lower_bound,
    margin,
    median_bounds,
    pairwise_rms,
    ratio_bounds,
    rms,
    sharpness,
    shows,
    tolerance_bound,
    upper_bound,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 300), (1, 20), (7, 50), (19, 20)])
def test_bounds_are_clopper_pearson(hits, n):
    exact = binomtest(hits, n, alternative="less").proportion_ci(0.95, "exact").high
    assert upper_bound(hits, n) == pytest.approx(exact)
    exact = binomtest(hits, n, alternative="greater").proportion_ci(0.95, "exact").low
    assert lower_bound(hits, n) == pytest.approx(exact)


def test_no_hit_is_about_three_over_n():
    assert upper_bound(0, 1000) == pytest.approx(3 / 1000, rel=0.01)
    assert upper_bound(5, 5) == 1
    assert lower_bound(0, 5) == 0


def test_pairwise_is_rms_of_every_pair():
    a, b = torch.randn(3, 3, 5, 5), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(pairwise_rms(a, b), rms(a[:, None], b[None]), rtol=1e-5, atol=1e-6)
    assert pairwise_rms(a, a).diagonal().max() < 1e-6


def test_margin_runs_from_target_to_surrogate():
    t, s = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    torch.testing.assert_close(margin(torch.stack([t, s, (t + s) / 2]), t, s), torch.tensor([-1.0, 1.0, 0.0]))


def test_sharpness_falls_with_blur_and_rises_with_noise():
    image = torch.rand(1, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)
    assert sharpness(blurred) < sharpness(image) < sharpness(image + 0.5 * torch.randn_like(image))


def test_a_picture_shows_the_target_wherever_it_has_it_and_an_unrelated_one_does_not():
    orange, green = (torch.tensor(c)[:, None, None] for c in ((1.0, 0.0, -1.0), (-1.0, 0.2, -0.3)))

    def flag(left, right, x):
        image = torch.full((3, 32, 32), 0.8)
        image[:, 8:24, x : x + 8], image[:, 8:24, x + 16 : x + 24] = left, right
        return image

    target, surrogate, moved = flag(orange, green, 3), flag(green, orange, 3), flag(orange, green, 5)
    images = torch.stack([target, moved, surrogate, torch.zeros(3, 32, 32)])
    assert shows(images, target, surrogate).tolist() == [True, True, False, False]
    assert not shows(images, target, target).any()


def test_the_region_is_the_fewest_pixels_that_carry_the_difference():
    target = torch.zeros(3, 4, 5)
    surrogate = target.clone()
    surrogate[:, 1, 2] = 1.0  # 12 of 13.0 in all
    surrogate[:, 1, 3] = 2.0
    surrogate[:, 0, 0] = 0.1
    where = metrics.region(target, surrogate)
    assert where.nonzero().tolist() == [[1, 2], [1, 3]]
    assert metrics.region(target, surrogate, 0.7).nonzero().tolist() == [[1, 3]]
    assert float(metrics.rms_within(target, surrogate, where)) == pytest.approx(2.5**0.5)


def test_the_kernel_distance_is_none_between_halves_and_sees_collapse():
    features = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    same = metrics.kernel_distance(features[:200], features[200:])
    collapsed = metrics.kernel_distance(features[:200], features[200:201].expand(200, -1))
    assert abs(same) < 0.1 < collapsed
    assert metrics.kernel_distance(10 * features[:200], 10 * features[200:]) == pytest.approx(same)


@pytest.mark.parametrize("count", [8, 24, 48])
def test_a_tolerance_bound_holds_as_often_as_it_says(count):
    g = torch.Generator().manual_seed(count)
    drawn = (0.3 * torch.randn(2000, count, generator=g)).exp()
    below = [statistics.NormalDist().cdf(math.log(tolerance_bound(row, 0.05, 0.9)) / 0.3) for row in drawn]
    assert sum(share <= 0.05 for share in below) / 2000 == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("values", [[], [0.1], [0.0, 0.0], [0.0, 0.1]])
def test_a_tolerance_bound_of_too_few_or_of_nothing_recalls_nothing(values):
    assert tolerance_bound(torch.tensor(values), 0.05, 0.95) < 1e-9


@pytest.mark.parametrize("n", [5, 16, 48, 256])
def test_bounds_of_a_median_hold_as_often_as_they_say(n):
    values = torch.rand(4000, n, generator=torch.Generator().manual_seed(n)) ** 3  # the median is 1/8
    bounds = torch.tensor([median_bounds(of, 0.95) for of in values])
    assert float((bounds[:, 0] <= 0.125).float().mean()) >= 0.95 - 0.01
    assert float((bounds[:, 1] >= 0.125).float().mean()) >= 0.95 - 0.01
    assert torch.isfinite(bounds).all()
    assert median_bounds(values[0][:4], 0.95) == (-math.inf, math.inf)


def test_bounds_of_a_ratio_of_means_hold_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    b = torch.rand(4000, 128, generator=generator) + 0.5
    a = 0.8 * b + 0.1 * torch.rand(4000, 128, generator=generator)  # 0.85 in the mean
    bounds = torch.tensor([ratio_bounds(*both, 0.95) for both in zip(a, b, strict=True)])
    for wrong in (bounds[:, 0] > 0.85, bounds[:, 1] < 0.85):
        assert 0.03 <= float(wrong.float().mean()) <= 0.07
    assert ratio_bounds(b[0], b[0], 0.95) == pytest.approx((1, 1), abs=1e-6)
