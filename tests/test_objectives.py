"""The ideal denoiser of a handful of pictures, in closed form, is the oracle."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler

from unforget.core.objectives import CleanSpace, Context, Linear, PosteriorSwap, Surrogate, Uniform
from unforget.core.schedule import Schedule
from unforget.core.types import Instance, Noised, Pool

SHAPE = (3, 4, 4)


def ideal(schedule: Schedule, pictures: torch.Tensor, counts: torch.Tensor, answers: torch.Tensor | None = None):
    """The denoiser of a measure with atoms `pictures`: the posterior mean of `answers` (the pictures themselves)."""
    answers = pictures if answers is None else answers

    def predict(x_t, index, prompt_ids=None):
        a, s = schedule.column("alphas", index, x_t), schedule.column("sigmas", index, x_t)
        far = ((x_t[:, None] - a[:, None] * pictures) / s[:, None]).square().sum((2, 3, 4))
        belief = torch.softmax(counts.log() - far / 2, 1)
        return schedule.target_towards(torch.einsum("bm,mchw->bchw", belief, answers), x_t, index)

    return predict


@pytest.fixture(params=["epsilon", "v_prediction", "sample"])
def scene(request):
    schedule = Schedule.from_diffusers(DDPMScheduler(prediction_type=request.param))
    g = torch.Generator().manual_seed(0)
    f, s, *rest = torch.randn(7, *SHAPE, generator=g, dtype=torch.float64)
    keep = torch.stack([f + 0.3 * rest[0], *rest[1:]])  # the first is a look-alike
    counts = torch.cat([torch.tensor([3.0]), torch.ones(len(keep))]).double()
    base = ideal(schedule, torch.cat([f[None], keep]), counts)
    return Context(schedule, base, (Instance(f, s, "f"),), Pool.of(keep), torch.tensor([[3.0]]))


def noised(context: Context, x_0, x_s, index, seed=1) -> Noised:
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed), dtype=x_0.dtype)
    index = torch.as_tensor(index)
    return Noised(x_0, noise, index, context.schedule.add_noise(x_0, noise, index), x_s, torch.zeros_like(index))


def forget_batch(context, index):
    instance = context.instances[0]
    return noised(
        context, instance.target.expand(len(index), *SHAPE), instance.surrogate.expand(len(index), *SHAPE), index
    )


LEVELS = [5, 100, 300, 500, 700, 999]
EXACT = PosteriorSwap(target_prior=1, taper=(999.9, 1000))
"""No bias on either side: the very denoiser of the model whose target became its surrogate."""


def test_the_swap_is_the_ideal_denoiser_whose_target_became_its_surrogate(scene):
    f, s = scene.instances[0].target, scene.instances[0].surrogate
    counts = torch.cat([scene.prior_counts[0], torch.ones(len(scene.retain.x_0))]).double()
    swapped = ideal(
        scene.schedule, torch.cat([f[None], scene.retain.x_0]), counts, torch.cat([s[None], scene.retain.x_0])
    )
    batch = forget_batch(scene, LEVELS)
    goal = EXACT.goal(batch, scene)
    torch.testing.assert_close(goal, swapped(batch.x_t, batch.timestep), rtol=1e-6, atol=1e-6)
    retain = noised(scene, scene.retain.x_0, scene.retain.x_0, [300] * len(scene.retain.x_0))
    torch.testing.assert_close(EXACT.goal(retain, scene), swapped(retain.x_t, retain.timestep), rtol=1e-6, atol=1e-6)


def test_the_target_s_share_is_certain_when_clean_and_its_frequency_when_not(scene):
    shares = EXACT.posterior(forget_batch(scene, LEVELS), scene)[0]
    assert shares[0] == pytest.approx(1, abs=1e-6)
    assert shares[-1] == pytest.approx(3 / (3 + len(scene.retain.x_0)), abs=0.15)
    kept = EXACT.posterior(noised(scene, scene.retain.x_0, scene.retain.x_0, [5] * len(scene.retain.x_0)), scene)[0]
    assert kept.max() < 1e-6


def test_the_swapped_model_has_no_loss(scene):
    f, s = scene.instances[0].target, scene.instances[0].surrogate
    counts = torch.cat([scene.prior_counts[0], torch.ones(len(scene.retain.x_0))]).double()
    swapped = ideal(
        scene.schedule, torch.cat([f[None], scene.retain.x_0]), counts, torch.cat([s[None], scene.retain.x_0])
    )
    batch = forget_batch(scene, LEVELS)
    assert float(EXACT.forget(swapped, batch, scene)) < 1e-9
    assert float(EXACT.forget(scene.base, batch, scene)) > 1e-2


def test_surrogate_equal_to_the_target_is_the_ordinary_denoising_loss(scene):
    f = scene.instances[0].target.expand(len(LEVELS), *SHAPE)
    batch = noised(scene, f, f, LEVELS)
    said = torch.zeros_like(f)
    objective = Surrogate(weighting=Uniform())
    usual = (said - scene.schedule.target(batch.x_0, batch.noise, batch.timestep)).square().mean()
    torch.testing.assert_close(objective.forget(lambda x, i, c: said, batch, scene), usual, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(objective.retain(lambda x, i, c: said, batch, scene), usual, rtol=1e-6, atol=1e-8)


def test_following_the_forget_loss_leads_to_the_surrogate(scene):
    batch = forget_batch(scene, [300])
    said = torch.zeros(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([said], lr=5.0)
    for _ in range(400):
        optimizer.zero_grad()
        Surrogate(weighting=Uniform()).forget(lambda x, i, c: said, batch, scene).backward()
        optimizer.step()
    clean, _ = scene.schedule.split(batch.x_t, said.detach(), batch.timestep)
    instance = scene.instances[0]
    assert (clean - instance.surrogate).abs().max() < 1e-3 < (clean - instance.target).abs().max()


def test_distillation_keeps_the_base(scene):
    batch = noised(scene, scene.retain.x_0, scene.retain.x_0, [400] * len(scene.retain.x_0))
    objective = Surrogate(weighting=CleanSpace(), distil=True)
    assert float(objective.retain(scene.base, batch, scene)) == 0
    assert float(Surrogate(weighting=CleanSpace()).retain(scene.base, batch, scene)) > 0


def test_the_paper_s_weights(scene):
    batch = forget_batch(scene, [0, 500, 999])
    forget, retain = Linear(beta=2e-4)(scene.schedule, batch)
    assert retain.flatten().tolist() == pytest.approx([1, 1 - 0.1, 1 - 2e-4 * 999])
    assert (forget + retain).flatten().tolist() == pytest.approx([1, 1, 1])


def test_clean_space_weights_an_error_by_its_worth_in_the_clean_image(scene):
    batch = forget_batch(scene, [200])
    weight, _ = CleanSpace(cap=1e9)(scene.schedule, batch)
    said = scene.schedule.target(batch.x_0, batch.noise, batch.timestep)
    off = said + 0.01
    clean = [scene.schedule.split(batch.x_t, y, batch.timestep)[0] for y in (said, off)]
    torch.testing.assert_close(weight.flatten()[0] * 0.01**2, (clean[1] - clean[0]).square().mean(), rtol=1e-6, atol=0)


def test_the_target_prior_leans_towards_forgetting_and_never_past_certainty(scene):
    batch = forget_batch(scene, LEVELS)
    exact, cautious = (o.posterior(batch, scene) for o in (EXACT, PosteriorSwap(target_prior=30, taper=(999.9, 1000))))
    assert (cautious >= exact).all()
    assert cautious.max() <= 1
    assert cautious[0, -1] > exact[0, -1] + 0.1


def test_at_the_highest_levels_the_goal_is_what_the_base_says(scene):
    batch = forget_batch(scene, [650, 700, 999])
    torch.testing.assert_close(PosteriorSwap().goal(batch, scene), scene.base(batch.x_t, batch.timestep))
    low, high = (float(PosteriorSwap().posterior(forget_batch(scene, [t]), scene)) for t in (540, 640))
    assert low > 5 * high > 0


def test_two_targets_move_apart(scene):
    g, u = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    both = Context(
        scene.schedule, scene.base, (*scene.instances, Instance(g, u, "g")), scene.retain, torch.tensor([[3.0], [1.0]])
    )
    shares = PosteriorSwap().posterior(forget_batch(both, [50]), both)
    assert shares[:, 0].tolist() == pytest.approx([1, 0], abs=1e-6)


def test_a_target_counts_only_under_its_own_prompts_and_against_what_they_draw(scene):
    """Row 1 draws three of the pictures beside the target, row 2 draws nothing but it, row 3 is not to forget it."""
    keep = Pool(scene.retain.x_0, torch.tensor([1, 1, 1, 3, 3]))
    asked = Context(scene.schedule, scene.base, scene.instances, keep, torch.tensor([[3.0, 3.0, 3.0, 0.0]]))
    f, s = scene.instances[0].target.expand(4, *SHAPE), scene.instances[0].surrogate.expand(4, *SHAPE)

    def shares(level, objective=EXACT):
        batch = replace(noised(scene, f, s, [level] * 4), prompt_ids=torch.arange(4))
        return objective.posterior(batch, asked)[0].tolist()

    noise = shares(999)
    assert noise[0] == pytest.approx(3 / 8, abs=0.15)  # without a prompt, everything competes
    assert noise[1] == pytest.approx(3 / 6, abs=0.15)
    assert noise[2:] == [1, 0]
    assert shares(5) == pytest.approx([1, 1, 1, 0], abs=1e-6)
    faded = shares(900, PosteriorSwap())
    assert faded[0] == 0  # five others without a prompt
    assert faded[1:] == pytest.approx([faded[1], 1, 0])
    assert faded[1] > 0.5  # three others are no more than the target itself


def test_a_recipe_is_made_without_torch():
    """It is part of a configuration, which a usage error must not wait for torch to see."""
    code = (
        "import sys\n"
        "from unforget.core.recipe import Recipe\n"
        "Recipe(objective={'kind': 'surrogate'}, surgery={'kind': 'erasediff', 'eta': 0.5})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_lies_at_a_surrogate_becomes_it_whatever_the_base_says(scene):
    """The base never drew the surrogate, but answers it where it stands: to add the edit there would overshoot."""
    s, f = scene.instances[0].surrogate, scene.instances[0].target
    base = ideal(scene.schedule, torch.stack([f, s]), torch.ones(2).double())
    local = replace(scene, base=base, retain=scene.retain[:0], surrogates=True)
    batch = noised(local, s[None], s[None], [100])
    there, over = (
        local.schedule.split(batch.x_t, EXACT.goal(batch, context), batch.timestep)[0][0]
        for context in (local, replace(local, surrogates=False))
    )
    torch.testing.assert_close(there, s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(over, 2 * s - f, rtol=1e-4, atol=1e-4)


def test_with_surrogates_a_target_still_becomes_its_surrogate_and_the_rest_stays(scene):
    scene = replace(scene, surrogates=True)
    batch = forget_batch(scene, [5, 100])
    clean = scene.schedule.split(batch.x_t, EXACT.goal(batch, scene), batch.timestep)[0]
    torch.testing.assert_close(clean, batch.x_s, rtol=1e-4, atol=1e-4)
    keep = scene.retain.x_0
    kept = noised(scene, keep, keep, [5] * len(keep))
    torch.testing.assert_close(EXACT.goal(kept, scene), scene.base(kept.x_t, kept.timestep), rtol=1e-5, atol=1e-5)


def test_where_a_prompt_draws_the_target_alone_pure_noise_leads_to_the_surrogate(scene):
    base = ideal(scene.schedule, scene.instances[0].target[None], torch.ones(1).double())
    alone = replace(scene, surrogates=True, retain=scene.retain[:0], base=base)
    batch = forget_batch(alone, [999, 500, 5])
    clean = alone.schedule.split(batch.x_t, EXACT.goal(batch, alone), batch.timestep)[0]
    torch.testing.assert_close(clean, batch.x_s, rtol=1e-4, atol=1e-4)


def test_the_belief_of_large_images_is_that_of_small_ones():
    """Each number of a 32x32 image nine times: a list of images would be certain, what a network has learnt is not."""
    g, schedule = torch.Generator().manual_seed(0), Schedule.from_diffusers(DDPMScheduler())
    f, s, other, noise = torch.randn(4, 3, 32, 32, generator=g, dtype=torch.float64)

    def posterior(factor):
        target, surrogate, look_alike, eps = (
            x.repeat_interleave(factor, 1).repeat_interleave(factor, 2) for x in (f, s, f + 0.1 * other, noise)
        )
        context = Context(schedule, None, (Instance(target, surrogate, "f"),), Pool.of(look_alike[None]),
                          torch.tensor([[1.0]]))  # fmt: skip
        index = torch.tensor([800])
        x_t = schedule.add_noise(target[None], eps[None], index)
        batch = Noised(target[None], eps[None], index, x_t, surrogate[None], torch.zeros(1, dtype=torch.long))
        return float(EXACT.posterior(batch, context))

    assert 0.3 < posterior(1) < 0.999
    assert posterior(3) == pytest.approx(posterior(1), abs=1e-6)


@pytest.mark.parametrize("factor", [0.001, 0.1, 7])
def test_a_small_edit_weighs_as_much_as_a_large_one_where_losses_are_in_units_of_the_edit(scene, factor):
    """With a model that still answers as the base, what is missing is the edit."""
    target = scene.instances[0].target
    edit = factor * (scene.instances[0].surrogate - target)
    scaled = replace(scene, instances=(Instance(target, target + edit, "f"), Instance(target + 90, target - 90, "g")),
                     prior_counts=torch.tensor([[3.0], [1.0]]))  # fmt: skip
    batch = forget_batch(scaled, [5, 5])
    objective = EXACT.model_copy(update={"weighting": CleanSpace(cap=1e9), "normalize_edit": True})
    missing = float(edit.square().mean()) / 0.35  # a large edit is not damped
    assert float(objective.forget(scene.base, batch, scaled)) == pytest.approx(max(1, missing), rel=1e-3)
