"""The baselines: each loss by its paper's formula on pictures of two pixels, and what it takes of the batches."""

import math
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from unforget.core import engine, objectives
from unforget.core.objectives import (
    ESD,
    SISS,
    ConceptAblation,
    Context,
    NegGrad,
    RandomSurrogate,
    ReTrack,
    Surrogate,
    Uniform,
    UniformNoise,
)
from unforget.core.recipe import Recipe
from unforget.core.schedule import Schedule
from unforget.core.surgery import Gram, RetainOnly, Sum
from unforget.core.types import UNCONDITIONAL, Instance, Noised, Pool
from unforget.families import FAMILIES
from unforget.families.recipes import PAPER, pixel_recipes
from unforget.unlearning.batches import batches
from unforget.unlearning.saliency import masks

KINDS = typing.get_args(typing.get_args(objectives.Objective)[0])
RETAIN = torch.tensor([[0.5, -0.25], [-0.75, 1.0], [0.0, 0.25]], dtype=torch.float64).reshape(3, 1, 1, 2)
TARGET = torch.tensor([0.25, -0.5], dtype=torch.float64).reshape(1, 1, 2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["epsilon", "v_prediction", "flow_prediction"])
def scene(request):
    """Pictures of two pixels, and a base that answers differently under each prompt."""
    kind = request.param
    scheduler = FlowMatchEulerDiscreteScheduler() if "flow" in kind else DDPMScheduler(prediction_type=kind)

    def base(x_t, timestep, prompt_ids):
        return 0.5 * x_t + prompt_ids.to(x_t).reshape(-1, 1, 1, 1)

    instance = Instance(TARGET, -TARGET, "f", (0, 1))
    keep = Pool(RETAIN, torch.tensor([0, 2, 2]))
    return Context(Schedule.from_diffusers(scheduler), base, (instance,), keep, torch.ones(1, 3))


def noised(context, x_0, prompt_ids, seed=1, timesteps=(150.0, 500.0, 900.0)):
    noise = torch.randn(x_0.shape, generator=generator(seed), dtype=x_0.dtype)
    t = torch.tensor(timesteps[: len(x_0)], dtype=torch.float64)
    x_t = context.schedule.add_noise(x_0, noise, t)
    return Noised(x_0, noise, t, x_t, -x_0, torch.tensor(prompt_ids))


@pytest.fixture
def pair(scene):
    """As they come from `batches`: targets under two prompts, retain images under theirs."""
    return noised(scene, TARGET.expand(3, 1, 1, 2), [0, 1, 1]), noised(scene, RETAIN, [0, 2, 2], seed=2)


def said(x_t, timestep, prompt_ids):
    return 0.3 * x_t - 0.1


def each(schedule, batch):
    """Rows as floats: (x_0, x_s, noise, x_t, alpha, sigma, answer of `said`), pictures as lists of two."""
    columns = [getattr(batch, name).flatten(1).tolist() for name in ("x_0", "x_s", "noise", "x_t")]
    scales = (schedule.column(name, batch.timestep, batch.x_0).flatten().tolist() for name in ("alphas", "sigmas"))
    answers = said(batch.x_t, None, None).flatten(1).tolist()
    return zip(*columns, *scales, answers, strict=True)


def goal(schedule, x, noise, alpha, sigma):
    """What a network is trained to say of a picture and its noise, by each parameterization's own definition."""
    if schedule.target_noise[0] == 1 and schedule.target_x0[0] == 0:
        return noise
    if schedule.target_noise[0] == 1:
        return [n - v for v, n in zip(x, noise, strict=True)]
    return [alpha * n - sigma * v for v, n in zip(x, noise, strict=True)]


def off(answer, goal):
    return sum((a - g) ** 2 for a, g in zip(answer, goal, strict=True)) / len(goal)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_neggrad_climbs_the_usual_loss_and_naive_deletion_is_what_is_left_without(scene, pair):
    forget, retain = pair
    usual = mean(off(y, goal(scene.schedule, x, n, a, s)) for x, _, n, _, a, s, y in each(scene.schedule, forget))
    assert float(NegGrad().forget(said, forget, scene)) == pytest.approx(-usual)
    kept = mean(off(y, goal(scene.schedule, x, n, a, s)) for x, _, n, _, a, s, y in each(scene.schedule, retain))
    assert float(NegGrad().retain(said, retain, scene)) == pytest.approx(kept)
    assert (RetainOnly()(Gram(1, 2, 3)), RetainOnly.uses) == ((0, 1), ("retain",))


def test_a_loss_that_the_surgery_does_not_use_is_not_computed():
    weight = torch.nn.Parameter(torch.ones(1))
    batch = Noised(*[torch.zeros(2, 1)] * 5, torch.zeros(2, dtype=torch.long))
    sgd = engine.Optimization(torch.optim.SGD([weight], lr=0.5))
    (step,) = engine.run([(batch, batch)], None, lambda b: weight.sum(), surgery=RetainOnly(), optimization=sgd)
    assert (step.forget, step.retain, step.gram) == (0, 1, (0, 0, 1))
    assert weight.item() == pytest.approx(0.5)


def test_erasediff_asks_for_uniform_noise_at_the_noised_target(scene, pair):
    objective = UniformNoise()
    forget, retain = objective.pair(*pair, scene, generator())
    assert torch.equal(forget.x_t, pair[0].x_t)
    assert retain is pair[1]
    assert ((forget.noise >= 0) & (forget.noise < 1)).all()
    by_hand = mean(off(y, goal(scene.schedule, x, u, a, s)) for x, _, u, _, a, s, y in each(scene.schedule, forget))
    assert float(objective.forget(said, forget, scene)) == pytest.approx(by_hand)
    many = noised(scene, TARGET.expand(1000, 1, 1, 2), [0] * 1000, timesteps=[500.0] * 1000)
    drawn = objective.pair(many, retain, scene, generator())[0].noise
    assert float(drawn.mean()) == pytest.approx(1 / 2, abs=0.02)
    assert float(drawn.var()) == pytest.approx(1 / 12, abs=0.01)


def density(m, x, alpha, sigma):
    return math.prod(math.exp(-((v - alpha * w) ** 2) / (2 * sigma**2)) / sigma for v, w in zip(m, x, strict=True))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_siss_is_its_paper_s_loss(scene, pair, share):
    """Equation by equation, with the densities themselves, where they are not too small for that."""
    objective = SISS(mixture=share)
    forget, retain = objective.pair(*pair, scene, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(vars(forget).values(), vars(retain).values(), strict=True))
    deletion, naive = [], []
    for r, f, _, m, alpha, sigma, y in each(scene.schedule, retain):
        q_f, q_r = density(m, f, alpha, sigma), density(m, r, alpha, sigma)
        mixed = (1 - share) * q_r + share * q_f
        of_f, of_r = ([(v - alpha * w) / sigma for v, w in zip(m, x, strict=True)] for x in (f, r))
        deletion.append(q_f / mixed * off(y, goal(scene.schedule, f, of_f, alpha, sigma)))
        naive.append(q_r / mixed * off(y, goal(scene.schedule, r, of_r, alpha, sigma)))
    assert float(objective.forget(said, forget, scene)) == pytest.approx(-mean(deletion))
    assert float(objective.retain(said, retain, scene)) == pytest.approx(mean(naive))
    w_f, w_r = objective.importance(forget, scene)
    torch.testing.assert_close(share * w_f + (1 - share) * w_r, torch.ones_like(w_f))


def test_siss_noises_the_target_as_often_as_it_says_and_takes_its_prompt_along(scene):
    count = 2000
    forget = noised(scene, TARGET.expand(count, 1, 1, 2), [1] * count, timesteps=[500.0] * count)
    retain = noised(scene, RETAIN[:1].expand(count, 1, 1, 2), [2] * count, seed=2, timesteps=[20.0] * count)
    mixed = SISS(mixture=0.3).pair(forget, retain, scene, generator())[0]
    is_target = mixed.prompt_ids == 1
    assert float(is_target.double().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(mixed.timestep, retain.timestep)
    own = mixed.x_s.where(is_target[:, None, None, None], mixed.x_0)
    assert torch.equal(mixed.x_t, scene.schedule.add_noise(own, mixed.noise, mixed.timestep))
    # Importance weights are no bias: what is noised as r, weighted, counts as often as if all were.
    w_f, w_r = SISS(mixture=0.3).importance(mixed, scene)
    assert [float(w.mean()) for w in (w_f, w_r)] == pytest.approx([1, 1], abs=0.1)


def test_siss_of_batches_of_two_sizes_keeps_them(scene, pair):
    forget, retain = SISS().pair(pair[0][:1], pair[1], scene, generator())
    assert [len(b.x_0) for b in (forget, retain)] == [1, 3]
    assert torch.equal(retain.x_s, TARGET.expand(3, 1, 1, 2))


def test_retrack_is_its_paper_s_loss_but_for_what_no_weight_changes(scene, pair):
    """The loss over the two nearest of three retain images, at two answers: their difference is the paper's."""
    forget = pair[0]

    def paper(answer):
        total = []
        for x, _, _, m, alpha, sigma, _ in each(scene.schedule, forget):
            near = sorted(RETAIN.flatten(1).tolist(), key=lambda r: math.dist(r, x))[:2]
            noises = [[(v - alpha * w) / sigma for v, w in zip(m, r, strict=True)] for r in near]
            scores = [math.exp(-sum(n * n for n in noise) / 2) for noise in noises]
            goals = [goal(scene.schedule, r, n, alpha, sigma) for r, n in zip(near, noises, strict=True)]
            y = [answer * v for v in m]
            total.append(sum(p * off(y, g) for p, g in zip(scores, goals, strict=True)) / sum(scores))
        return mean(total)

    def ours(answer):
        return float(ReTrack(nearest=2).forget(lambda x_t, t, c: answer * x_t, forget, scene))

    assert ours(0.3) - ours(-0.7) == pytest.approx(paper(0.3) - paper(-0.7))
    assert ours(0.3) != pytest.approx(float(ReTrack(nearest=3).forget(lambda x_t, t, c: 0.3 * x_t, forget, scene)))


def test_a_random_surrogate_is_a_retain_image_and_another_one_at_each_update(scene):
    objective, draws = RandomSurrogate(weighting=Uniform()), generator()
    forget = noised(scene, TARGET.expand(300, 1, 1, 2), [0] * 300, timesteps=[500.0] * 300)
    retain = noised(scene, RETAIN, [0, 2, 2])
    first, second = (objective.pair(forget, retain, scene, draws)[0] for _ in range(2))
    which = [(first.x_s == r).flatten(1).all(1) for r in RETAIN]
    assert torch.stack(which).sum(0).tolist() == [1] * 300
    assert all(70 < int(w.sum()) < 130 for w in which)
    assert not torch.equal(first.x_s, second.x_s)
    same = Surrogate(weighting=Uniform())
    assert float(objective.forget(said, first, scene)) == float(same.forget(said, first, scene))


def test_the_paper_has_one_timestep_and_one_noise_an_update(scene, pair):
    forget, retain = Surrogate(one_noise=True).pair(*pair, scene, generator())
    for batch, before in ((forget, pair[0]), (retain, pair[1])):
        assert batch.timestep.unique().tolist() == [150]
        assert (batch.noise == pair[0].noise[:1]).all()
        assert torch.equal(batch.x_0, before.x_0)
        assert torch.equal(batch.x_t, scene.schedule.add_noise(before.x_0, batch.noise, batch.timestep))
    assert Surrogate().pair(*pair, scene, generator()) == pair
    assert (PAPER.objective.one_noise, PAPER.forget_batch_size, PAPER.sequential) == (True, 1, True)


def test_the_paper_forgets_one_target_after_another(scene):
    """Those of one target, in all its places and under all its prompts, before those of the next."""
    one, two = torch.full((1, 1, 2), 1.0), torch.full((1, 1, 2), 2.0)
    instances = [Instance(one, one, "a", (0, 1)), Instance(two, two, "b"), Instance(one + 0.5, one, "a")]
    recipe = Recipe(sequential=True, forget_batch_size=1, retain_batch_size=1, max_train_steps=10)
    pool = Pool.of(RETAIN.float())
    shown = batches(instances, pool, pool[:0], scene.schedule, recipe, generator=generator())
    seen = [(float(f.x_0[0, 0, 0, 0]), int(f.prompt_ids)) for f, _ in shown]
    assert set(seen[:5]) == {(1.0, 0), (1.0, 1), (1.5, 0)}
    assert set(seen[5:]) == {(2.0, 0)}


def test_esd_leads_away_from_the_prompt_and_says_the_same_under_none(scene, pair):
    """base(x, c) = x / 2 + c, so base(x, 0) - eta (base(x, c) - base(x, 0)) = x / 2 - eta c."""
    forget = pair[0]
    for eta in (1.0, 2.5):
        expected = 0.5 * forget.x_t - eta * forget.prompt_ids.reshape(-1, 1, 1, 1)
        torch.testing.assert_close(ESD(negative_guidance=eta).goal(forget, scene), expected)
        by_hand = (said(forget.x_t, None, None) - expected).square().mean()
        torch.testing.assert_close(ESD(negative_guidance=eta).forget(said, forget, scene), by_hand)


def test_concept_ablation_says_under_the_prompt_what_the_base_says_under_none_at_images_of_none(scene, pair):
    objective = ConceptAblation()
    forget, _ = objective.pair(*pair, scene, generator())
    anchor = scene.retain.x_0[scene.retain.prompt_ids == UNCONDITIONAL]
    assert torch.equal(forget.x_0, anchor.expand_as(forget.x_0))
    assert torch.equal(forget.x_t, scene.schedule.add_noise(forget.x_0, forget.noise, forget.timestep))
    assert torch.equal(forget.prompt_ids, pair[0].prompt_ids)
    by_hand = (said(forget.x_t, None, None) - 0.5 * forget.x_t).square().mean()
    torch.testing.assert_close(objective.forget(said, forget, scene), by_hand)
    other = replace(scene, retain=scene.retain[1:])  # none under the empty prompt
    assert torch.isfinite(objective.pair(*pair, other, generator())[0].x_t).all()


@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_what_an_objective_says_that_it_needs_is_what_it_takes(kind, distil, scene, pair):
    """Passes of the base, which `--dry-run` counts, and the surrogate, which is not made where none is needed."""
    objective = kind(**({"distil": distil} if "distil" in kind.model_fields else {}))
    asked = []
    context = replace(scene, base=lambda x_t, t, c: asked.append(len(x_t)) or scene.base(x_t, t, c))
    if not kind.needs_surrogate:
        nothing = torch.full_like(TARGET, torch.nan)
        context = replace(context, instances=(Instance(TARGET, nothing, "f", (0, 1)),))
        pair = (replace(pair[0], x_s=pair[0].x_s * torch.nan), pair[1])
    forget, retain = objective.pair(*pair, context, generator())
    assert [len(b.x_0) for b in (forget, retain)] == [3, 3]
    for loss, batch, answers in zip(
        (objective.forget, objective.retain), (forget, retain), objective.base_passes(), strict=True
    ):
        asked.clear()
        assert torch.isfinite(loss(said, batch, context))
        assert sum(asked) == answers * len(batch.x_0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_a_batch_in_parts_is_the_whole_batch(kind, scene, pair):
    objective = kind()
    shown = objective.pair(*pair, scene, generator())
    for loss, batch in zip((objective.forget, objective.retain), shown, strict=True):
        weight = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def measured(part, loss=loss, weight=weight):
            return loss(lambda x_t, t, c: weight * x_t, part, scene)

        whole, parts = (engine.gradient(measured, batch, [weight], size) for size in (None, 1))
        assert parts[0] == pytest.approx(whole[0])
        torch.testing.assert_close(parts[1], whole[1])


def test_the_mask_is_the_weights_that_the_targets_move_most():
    """Of an answer that the first number changes a hundred times as much as the second, and the third not at all."""
    schedule = Schedule.from_diffusers(DDPMScheduler())
    target = torch.zeros(1, 1, 2)
    weights = [torch.nn.Parameter(torch.tensor([3.0, 3.0])), torch.nn.Parameter(torch.tensor([1.0]))]

    def predict(x_t, timestep, prompt_ids):  # the last one has no gradient at all, as A of a LoRA
        return (weights[0][0] * 1.0 + weights[0][1] * 0.01 + 0 * weights[1]).expand_as(x_t)

    for share in (0.5, 1e-300):  # one moves at least
        found = masks(predict, weights, [Instance(target, target, "t")], schedule, share, seed=0, micro_batch=10)
        assert [m.tolist() for m in found] == [[True, False], [True]]
    everything = masks(predict, weights, [Instance(target, target, "t")], schedule, 1.0, seed=0, micro_batch=None)
    assert [m.tolist() for m in everything] == [[True, True], [True]]


def test_masked_weights_do_not_move():
    weight = torch.nn.Parameter(torch.ones(4))
    batch = Noised(*[torch.ones(2, 4)] * 5, torch.zeros(2, dtype=torch.long))
    mask = [torch.tensor([True, False, True, False])]
    adam = engine.Optimization(torch.optim.Adam([weight], lr=0.1), masks=mask)

    def loss(b):
        return (weight * b.x_0).square().mean()

    for step in engine.run([(batch, batch)] * 3, loss, loss, surgery=Sum(), optimization=adam):
        assert step.gram.ff == pytest.approx(step.gram.fr)
    assert (weight != 1).tolist() == mask[0].tolist()


@pytest.mark.parametrize("spec", FAMILIES, ids=lambda s: s.name)
def test_every_row_has_every_baseline_that_fits_it(spec):
    by_prompt = {"esd", "concept-ablation"} if spec.prompted else set()
    assert set(spec.recipes) == set(pixel_recipes()) | by_prompt
    for name, recipe in spec.recipes.items():
        assert recipe.train in spec.scopes
        assert Recipe.model_validate(recipe.model_dump()) == recipe, name
        if name not in ("default", "paper", "random-surrogate"):
            assert recipe.learning_rate is None  # by `update_share`


def test_the_page_of_recipes_names_them_all():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    for name in {name for spec in FAMILIES for name in spec.recipes}:
        assert f"| `{name}`" in page, name
