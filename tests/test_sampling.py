"""Noise, batches of noise levels, and draws."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from unforget.core import passes, sampling
from unforget.core.recipe import Recipe
from unforget.core.schedule import Schedule
from unforget.core.types import Instance, Pool, Trajectory
from unforget.families import samplers
from unforget.unlearning.batches import batches

SHAPE = (3, 16, 16)


def test_noise_of_a_seed_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(sampling.random_noise(5, SHAPE, 3, "a")[:2], sampling.random_noise(2, SHAPE, 3, "a"))
    others = [sampling.random_noise(5, SHAPE, seed, purpose) for seed, purpose in ((3, "a"), (4, "a"), (3, "b"))]
    assert len({float(row.sum()) for noise in others for row in noise}) == 15


def test_drawing_in_batches_changes_nothing(tiny, monkeypatch):
    noise = sampling.random_noise(3, tiny.latent_shape, 0, "test")
    whole = sampling.draw(tiny, noise, steps=3)
    monkeypatch.setattr(passes, "PIXELS_DRAWN", 1)
    parts = sampling.draw(tiny, noise, steps=3)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_a_draw_without_decoding_is_what_was_decoded(tiny):
    noise = sampling.random_noise(3, tiny.latent_shape, 0, "test")
    start = sampling.visited(tiny, 500, steps=4)
    assert start in tiny.sampling_timesteps(4)
    x_t = sampling.add_noise(tiny, noise.clamp(-1, 1), noise, start)
    assert torch.equal(x_t, sampling.add_noise(tiny, tiny.encode(noise.clamp(-1, 1)), noise, start, encoded=True))
    x_0 = sampling.draw(tiny, x_t, steps=4, start=start, decode=False)
    assert torch.equal(tiny.decode(x_0), sampling.draw(tiny, x_t, steps=4, start=start))


@pytest.mark.parametrize("start", [None, 250, 999])
def test_irregular_timesteps(tiny, start):
    """They begin where they must, fall, have about as many steps, lie anywhere, and depend on the key alone."""
    usual = [t for t in tiny.sampling_timesteps(20) if start is None or t <= start]
    ways = [sampling.irregular(tiny, str(k), steps=20, start=start).tolist() for k in range(200)]
    assert all(way[0] == (start or 950) and way == sorted(set(way), reverse=True) for way in ways)
    assert all(0.7 * len(usual) - 1 <= len(way) <= 1.25 * len(usual) + 1 for way in ways)
    assert sum(map(len, ways)) / 200 == pytest.approx(len(usual), rel=0.1)
    visited = {t for way in ways for t in way}
    assert len(visited) > 0.6 * (start or 950), "nearly every timestep comes up in some way"
    assert ways[3] == sampling.irregular(tiny, "3", steps=20, start=start).tolist()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("ancestral", [False, True])
def test_a_trajectory_is_that_of_a_second_order_solver(kind, ancestral, monkeypatch):
    """Diffusers' own, whose noise it is given, with a network that says something else everywhere."""
    monkeypatch.setattr(samplers, "STEEPEST", 99)
    solver = DPMSolverMultistepScheduler(
        prediction_type=kind, algorithm_type="sde-dpmsolver++" if ancestral else "dpmsolver++", solver_order=2,
        solver_type="midpoint", final_sigmas_type="zero", use_flow_sigmas=kind == "flow_prediction",
    )  # fmt: skip
    solver.set_timesteps(8)
    schedule, seeds = Schedule.from_diffusers(solver), torch.tensor([4, 5]) if ancestral else None
    along = samplers.Along(schedule, Trajectory(solver.timesteps.double(), seeds), clipped=False)
    fresh = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    x_t = sampling.random_noise(2, SHAPE, 0, "test")
    theirs = x_t.clone()
    for t in solver.timesteps:
        noise = torch.stack([torch.randn(SHAPE, generator=g) for g in fresh])
        theirs = solver.step((3 * theirs).sin(), t, theirs, variance_noise=noise).prev_sample
        x_t = along.step((3 * x_t).sin(), t.double(), x_t).prev_sample
        near = 1e-2 if kind == "flow_prediction" else 2e-3  # of a flow, theirs rounds the timesteps and not the sigmas
        torch.testing.assert_close(x_t, theirs, rtol=near, atol=near)
        x_t = theirs  # what such a network says would grow their rounding


def test_a_long_step_after_a_short_one_is_not_led_far(tiny):
    """Two timesteps side by side and then a long step: the solver's own weight would be in the hundreds."""
    way = Trajectory(torch.tensor([900, 501, 500, 20], dtype=torch.float64))
    drawn = tiny.denoise(sampling.random_noise(4, tiny.latent_shape, 0, "test"), steps=way)
    usual = tiny.denoise(sampling.random_noise(4, tiny.latent_shape, 0, "test"), steps=4)
    assert float(drawn.std()) < 2 * float(usual.std())


def test_the_usual_timesteps_are_rows_of_the_schedule(tiny):
    assert sampling.regular(tiny, steps=20).tolist() == tiny.sampling_timesteps(20)
    assert sampling.regular(tiny, steps=5, through=330).tolist() == [800, 600, 400, 330, 165, 0]
    assert sampling.regular(tiny, steps=20, through=500).tolist() == tiny.sampling_timesteps(20)
    most = sampling.regular(tiny, steps=1000)
    assert len(most) == len(most.unique())


def test_a_part_of_a_trajectory():
    way = Trajectory(torch.tensor([900.0, 500.0, 100.0]), torch.tensor([1]))
    assert way.between(500).timesteps.tolist() == [500, 100]
    assert way.between(None, 100).timesteps.tolist() == [900, 500]


def test_ancestral_draws_depend_on_their_own_seeds_alone(tiny):
    noise = sampling.random_noise(3, tiny.latent_shape, 0, "test")
    way = Trajectory(torch.tensor([900.0, 500.0, 100.0]), torch.tensor([5, 6, 5]))
    whole = sampling.draw(tiny, noise, steps=way)
    alone = sampling.draw(tiny, noise[1:2], steps=way.of(torch.tensor([1])))
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)
    same = sampling.draw(tiny, noise[:1].expand(3, -1, -1, -1), steps=way)
    torch.testing.assert_close(same[0], same[2])
    assert not torch.allclose(same[0], same[1], atol=1e-2)


@pytest.fixture
def schedule():
    return Schedule.from_diffusers(DDPMScheduler())


def draws(schedule, seed=0, **changes):
    target, surrogate, *keep = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    options = {"max_train_steps": 3, "forget_batch_size": 8, "retain_batch_size": 6, "forget_range": (200, 500)}
    instances = [Instance(target, surrogate, "t"), Instance(surrogate, target, "u")]
    keep = Pool.of(torch.stack(keep))
    generator = torch.Generator().manual_seed(seed)
    pairs = batches(instances, keep, keep[:1], schedule, Recipe(**{**options, **changes}), generator=generator)
    return list(pairs), instances, keep


def test_batches_pair_targets_with_their_own_surrogates(schedule):
    pairs, instances, _ = draws(schedule)
    for forget, _ in pairs:
        for x_0, x_s in zip(forget.x_0, forget.x_s, strict=True):
            assert any(torch.equal(x_0, i.target) and torch.equal(x_s, i.surrogate) for i in instances)
        assert sum(torch.equal(x, instances[0].target) for x in forget.x_0) == 4
        assert torch.equal(forget.x_t, schedule.add_noise(forget.x_0, forget.noise, forget.timestep))


def test_levels_cover_their_range_evenly(schedule):
    pairs, _, _ = draws(schedule)
    for forget, retain in pairs:
        assert forget.timestep.min() >= 200
        assert forget.timestep.max() < 500
        assert len(set(((forget.timestep - 200) * 8 // 300).tolist())) >= 7
        assert retain.timestep.max() > 500


def test_half_of_the_retain_batch_is_near_a_target(schedule):
    pairs, _, keep = draws(schedule)
    for _, retain in pairs:
        assert all(torch.equal(x, keep.x_0[0]) for x in retain.x_0[:3])


def test_batches_are_those_of_their_seed(schedule):
    first, again, other = (draws(schedule, seed=seed)[0][0][0] for seed in (0, 0, 1))
    assert torch.equal(first.x_t, again.x_t)
    assert not torch.equal(first.x_t, other.x_t)


def test_forget_and_retain_have_noise_levels_of_their_own(schedule):
    forget, retain = draws(schedule, retain_batch_size=8, forget_range=(1, 1000))[0][0]
    assert not torch.equal(forget.timestep, retain.timestep)
