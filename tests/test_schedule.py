"""diffusers' schedulers are the oracle; the rest are laws."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from unforget.core.schedule import Schedule

KINDS = ["epsilon", "v_prediction", "sample", "flow"]


def make(kind: str):
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DDPMScheduler(prediction_type=kind)


@pytest.fixture(params=KINDS)
def scheduler(request):
    return make(request.param)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return x_0, noise, torch.tensor([1, 10, 250, 500, 900, 999])


@pytest.mark.parametrize("kind", KINDS[:3])
def test_add_noise_is_that_of_diffusers(kind, batch):
    x_0, noise, index = batch
    ours = Schedule.from_diffusers(make(kind)).add_noise(x_0, noise, index)
    torch.testing.assert_close(ours, make(kind).add_noise(x_0, noise, index), rtol=1e-5, atol=1e-6)


def test_velocity_is_that_of_diffusers(batch):
    x_0, noise, index = batch
    ours = Schedule.from_diffusers(make("v_prediction")).target(x_0, noise, index)
    torch.testing.assert_close(ours, make("v_prediction").get_velocity(x_0, noise, index), rtol=1e-5, atol=1e-6)


def test_flow_is_that_of_diffusers(batch):
    x_0, noise, index = batch
    scheduler = make("flow")
    schedule = Schedule.from_diffusers(scheduler)
    # diffusers stores noisy to clean, float32.
    timesteps = scheduler.timesteps.flip(0)[index]
    torch.testing.assert_close(schedule.timesteps[index].float(), timesteps)
    oracle = scheduler.scale_noise(x_0.float(), timesteps, noise.float())
    torch.testing.assert_close(schedule.add_noise(x_0, noise, timesteps).float(), oracle)
    torch.testing.assert_close(schedule.target(x_0, noise, timesteps), noise - x_0)


@pytest.mark.parametrize("ancestral", [False, True])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_step_is_that_of_ddim_with_eta_0_and_1(kind, ancestral, batch):
    x_t, fresh, _ = batch
    sampler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    sampler.set_timesteps(20)
    schedule, answer = Schedule.from_diffusers(sampler), fresh.flip(0)
    for t, then in ((950, 900), (500, 450), (50, 0)):
        theirs = sampler.step(answer, t, x_t, eta=float(ancestral), variance_noise=fresh if ancestral else None)
        levels = [torch.full((6,), level) for level in (t, then)]
        x_0, _ = schedule.split(x_t, answer, levels[0])
        ours = schedule.step(x_0, x_t, *levels, fresh if ancestral else None)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-4, atol=1e-4)


def test_a_step_of_a_flow_is_euler_s(batch):
    x_t, answer, _ = batch
    sampler = make("flow")
    schedule = Schedule.from_diffusers(sampler)
    high, low = (schedule.timesteps[row].expand(6) for row in (800, 600))
    theirs = x_t + (low - high)[0] / 1000 * answer
    torch.testing.assert_close(
        schedule.step(schedule.split(x_t, answer, high)[0], x_t, high, low), theirs, rtol=1e-6, atol=1e-6
    )


def test_an_ancestral_step_leaves_the_noise_level_what_the_schedule_says(scheduler):
    """The marginals are the forward process's: of unit noise and a clean image that is known, for any two levels."""
    schedule = Schedule.from_diffusers(scheduler)
    noise, fresh = torch.randn(2, 1, 1, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_0 = torch.full_like(noise, 0.7)
    for high, low in ((999, 700), (400, 100), (30, 5)):
        timestep, then = (schedule.timesteps[row].reshape(1) for row in (high, low))
        x = schedule.step(x_0, schedule.add_noise(x_0, noise, timestep), timestep, then, fresh)
        clean, level = (schedule.column(name, then, x) * of for name, of in (("alphas", x_0), ("sigmas", 1)))
        assert float((x - clean).std()) == pytest.approx(float(level), rel=0.02)


def test_split_undoes_add_noise_and_target(scheduler, batch):
    x_0, noise, index = batch
    schedule = Schedule.from_diffusers(scheduler)
    back = schedule.split(schedule.add_noise(x_0, noise, index), schedule.target(x_0, noise, index), index)
    torch.testing.assert_close(back[0], x_0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(back[1], noise, rtol=1e-7, atol=1e-7)


def test_saying_the_surrogate_target_gives_the_surrogate(scheduler, batch):
    x_f, noise, index = batch
    schedule = Schedule.from_diffusers(scheduler)
    x_s = x_f.flip(0)
    x_t = schedule.add_noise(x_f, noise, index)
    clean, _ = schedule.split(x_t, schedule.target_towards(x_s, x_t, index), index)
    torch.testing.assert_close(clean, x_s, rtol=1e-7, atol=1e-7)


def test_the_surrogate_target_of_the_target_is_the_usual_one(scheduler, batch):
    x_0, noise, index = batch
    schedule = Schedule.from_diffusers(scheduler)
    ours = schedule.target_towards(x_0, schedule.add_noise(x_0, noise, index), index)
    torch.testing.assert_close(ours, schedule.target(x_0, noise, index), rtol=1e-7, atol=1e-7)


def test_the_paper_s_formula_for_a_network_that_predicts_noise(batch):
    x_f, noise, index = batch
    scheduler = make("epsilon")
    x_s = x_f.flip(0)
    ab = scheduler.alphas_cumprod.double()[index].reshape(-1, 1, 1, 1)
    expected = noise + (ab / (1 - ab)).sqrt() * (x_f - x_s)
    schedule = Schedule.from_diffusers(scheduler)
    ours = schedule.target_towards(x_s, schedule.add_noise(x_f, noise, index), index)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_snr_falls_with_the_index(scheduler):
    schedule = Schedule.from_diffusers(scheduler)
    log_snr = 2 * (schedule.alphas.log() - schedule.sigmas.log())
    inner = log_snr[:-1] if schedule.alphas[-1] == 0 else log_snr
    assert (inner.diff() < 0).all()


def test_x0_scale_is_the_slope_of_split(scheduler, batch):
    x_0, noise, index = batch
    schedule = Schedule.from_diffusers(scheduler)
    x_t, said = schedule.add_noise(x_0, noise, index), schedule.target(x_0, noise, index)
    moved = (schedule.split(x_t, said + 1, index)[0] - schedule.split(x_t, said, index)[0]).abs()[:, 0, 0, 0]
    torch.testing.assert_close(moved, schedule.x0_scale(index), rtol=1e-6, atol=1e-7)


def test_an_unknown_prediction_type_names_the_known_ones():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="dreams")
    with pytest.raises(ValueError, match=r"dreams.*epsilon, v_prediction, sample"):
        Schedule.from_diffusers(scheduler)


def test_a_solver_of_flows_is_a_flow():
    """It has `alphas_cumprod` too, which its sampling does not use (Sana's)."""
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ours = Schedule.from_diffusers(solver)
    euler = Schedule.from_diffusers(FlowMatchEulerDiscreteScheduler(shift=1.0))
    for name, column in vars(euler).items():
        torch.testing.assert_close(getattr(ours, name), column, rtol=1e-6, atol=1e-6)
    assert vars(Schedule.from_diffusers(FlowMatchHeunDiscreteScheduler(shift=3.0)))


@pytest.mark.parametrize("scheduler", [
    EDMEulerScheduler(), DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
])  # fmt: skip
def test_a_schedule_of_another_kind_is_not_taken_for_a_flow(scheduler):
    with pytest.raises(ValueError, match=f"Unknown noise schedule '{type(scheduler).__name__}'"):
        Schedule.from_diffusers(scheduler)
