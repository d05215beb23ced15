import itertools
import json
import math
import statistics
import sys
from dataclasses import replace

import pytest
import torch

from unforget import families
from unforget.core.objectives import CleanSpace, PosteriorSwap
from unforget.core.recipe import Recipe
from unforget.core.types import Instance, Pool
from unforget.errors import CannotRun
from unforget.families.recipes import pixel_recipes
from unforget.unlearning.batches import batches
from unforget.unlearning.compute import Compute, adam, matched_rate, mixed
from unforget.unlearning.prepare import Prepared, encoded, neighbours
from unforget.unlearning.trainer import LrSchedule, Trainer, worst_margin


def test_the_learning_rate_warms_up_holds_and_cools_down():
    rate = LrSchedule(Recipe(max_train_steps=100, warmup_steps=10, cooldown_steps=40))
    factors = [rate.factor(i) for i in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert all(a >= b for a, b in itertools.pairwise(factors[60:]))
    assert factors[-1] < 0.01
    assert rate.end == 100


def test_a_margin_that_is_reached_ends_the_run_after_the_cool_down():
    rate = LrSchedule(Recipe(max_train_steps=100, warmup_steps=0, cooldown_steps=40))
    rate.reach(25)
    assert (rate.end, rate.reached) == (65, True)
    assert rate.factor(25) == 1
    assert rate.factor(64) < 0.01
    rate.reach(30)
    assert rate.end == 65


def test_a_margin_reached_while_cooling_down_changes_nothing():
    rate = LrSchedule(Recipe(max_train_steps=100, cooldown_steps=40))
    rate.reach(70)
    assert (rate.end, rate.reached) == (100, False)


@pytest.fixture
def scene(tiny):
    g = torch.Generator().manual_seed(0)
    target, surrogate, *retain = torch.rand(6, *tiny.latent_shape, generator=g) * 2 - 1
    instances, retain = (Instance(target, surrogate, "t"),), Pool.of(torch.stack(retain))
    return Prepared(instances, instances, retain, retain[:1], torch.ones(1, 1))


def train(model, prepared, recipe):
    """The figures of all updates, and the trainer when they were made."""
    trainer = Trainer(model, model.copy(), prepared, recipe, seed=0, compute=Compute())
    return list(trainer), trainer


def recipe(**changes):
    return Recipe(
        **{"max_train_steps": 12, "cooldown_steps": 4, "forget_batch_size": 2, "retain_batch_size": 4, **changes}
    )


def test_training_lowers_the_forget_loss_and_logs_every_step(tiny, scene):
    flat = torch.zeros(tiny.latent_shape)  # what a network of this size can learn to say in so few steps
    scene = replace(scene, encoded=(Instance(flat - 0.4, flat + 0.4, "flat"),))
    swap = PosteriorSwap(weighting=CleanSpace(retain=0.01))
    how = recipe(max_train_steps=60, learning_rate=1e-3, train="full", objective=swap, stop_margin=1)
    rows, trainer = train(tiny, scene, how)
    first, last = (sum(r["forget"] for r in part) for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first
    assert (trainer.done, trainer.lr_schedule.reached) == (60, False)
    assert [r["step"] for r in rows] == list(range(1, 61))
    assert {"forget", "retain", "cosine", "margin", "learning_rate"} <= rows[0].keys()
    assert not any(p.requires_grad for p in tiny.network.parameters())


FEW = {"max_train_steps": 4, "forget_batch_size": 2, "retain_batch_size": 3, "learning_rate": 1e-3, "rank": 2}


def resumed(model, prepared, how):
    """Weights after four updates, and after two that were saved and two that went on from there, on equal models."""
    ends = []
    for stop in (4, 2):
        patched = model()
        base = patched.frozen_reference(how.train)
        trainer = Trainer(patched, base, prepared, how, seed=0, compute=Compute())
        saved = next(trainer.state() for _ in trainer if trainer.done == stop)
        if stop < 4:
            figures, tensors = saved
            saved = json.loads(json.dumps(figures)), {n: t.clone() for n, t in tensors.items()}
            again = model()
            trainer = Trainer(
                again, again.frozen_reference(how.train), prepared, how, seed=0, compute=Compute(), resume=saved
            )
            assert [row["step"] for row in trainer] == [3, 4]
        ends.append([w.detach().clone() for w in trainer.weights])
    return ends


@pytest.mark.parametrize("name", pixel_recipes())
def test_every_recipe_moves_weights_and_goes_on_as_if_it_had_never_stopped(tiny, scene, name):
    how = pixel_recipes()[name].model_copy(update=FEW)
    prepared = replace(scene, encoded=(*scene.encoded, Instance(scene.retain.x_0[2], scene.retain.x_0[3], "u")),
                       prior_counts=torch.ones(2, 1))  # fmt: skip
    before = [w.detach().clone() for w in tiny.trainable(how.train)]
    whole, parts = resumed(tiny.copy, prepared, how)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    moved = torch.cat([(a != b).flatten() for a, b in zip(whole, before, strict=True)]).float().mean()
    assert float(moved) == pytest.approx(0.5, abs=0.02) if how.saliency else float(moved) > 0.8


@pytest.mark.parametrize("name", ["salun", "esd", "concept-ablation"])
def test_under_a_prompt_with_a_lora_too(sd3_folder, name):
    def model():
        made = families.load(str(sd3_folder))
        made.prompt_ids(["a red square"])
        return made

    g, family = torch.Generator().manual_seed(0), model()
    target, surrogate, *retain = torch.randn(5, *family.latent_shape, generator=g)
    instance = Instance(target, surrogate, "t", (0, 1))
    pool = Pool(torch.stack(retain), torch.tensor([0, 1, 0]))
    how = family.spec.recipes[name].model_copy(update=FEW)
    whole, parts = resumed(model, Prepared((instance,), (instance,), pool, pool[:0], torch.ones(1, 2)), how)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert any(w.any() for w in whole[1::2])  # B, which began with zeros


@pytest.mark.parametrize("scope", ["bottleneck", "full"])
def test_only_the_weights_in_scope_move(tiny, scene, scope):
    before = tiny.copy().network.state_dict()
    inside = {id(p) for p in tiny.trainable(scope)}
    train(tiny, scene, recipe(train=scope, learning_rate=1e-3))
    for name, p in tiny.network.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in inside), name


def test_mixed_precision_answers_in_float32_and_nearly_the_same(tiny):
    x_t = torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))
    given = x_t, torch.tensor([300, 600]), torch.tensor([0, 0])
    with torch.no_grad():
        exact, half = tiny.predict(*given), mixed(tiny.predict, True, tiny.device)(*given)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)
    assert mixed(tiny.predict, False, tiny.device) == tiny.predict


def test_the_margin_is_that_of_reconstructions(tiny, scene):
    (instance,) = scene.encoded
    tiny.denoise = lambda x_t, **options: instance.surrogate.expand_as(x_t)
    assert worst_margin(tiny, scene.encoded) == pytest.approx(1)
    tiny.denoise = lambda x_t, **options: instance.target.expand_as(x_t)
    assert worst_margin(tiny, scene.encoded) == pytest.approx(-1)


def test_it_stops_once_the_margin_is_held(tiny, scene):
    _, trainer = train(tiny, scene, recipe(max_train_steps=200, stop_margin=-1))
    assert (trainer.lr_schedule.reached, trainer.done) == (True, 24)  # first look at 20, then the cool-down


def test_a_loss_that_is_not_a_number_stops_with_the_last_good_weights(tiny, scene):
    with pytest.raises(CannotRun, match="not a number at step 1"):
        train(tiny, replace(scene, neighbours=Pool.of(scene.retain.x_0[:1] * math.nan)), recipe())
    assert all(bool(p.isfinite().all()) for p in tiny.network.parameters())


def test_neighbours_are_the_nearest_to_any_target(scene):
    target, retain = scene.encoded[0].target, scene.retain.x_0
    assert neighbours(torch.cat([retain, target[None] + 0.01]), target[None], 1).tolist() == [len(retain)]


def test_an_edit_of_the_target_is_visited_but_no_rival_to_it(tiny, scene):
    """As a rival it would keep the belief in the target small, and the target would stay."""
    edit = scene.encoded[0].target.lerp(scene.encoded[0].surrogate, 0.5)
    prepared = encoded(tiny, scene.instances, scene.retain, Pool.of(edit[None]), 0.01)
    assert torch.equal(prepared.retain.x_0, scene.retain.x_0)
    assert any(torch.equal(x, edit) for x in prepared.neighbours.x_0)


def test_eight_bit_adam_says_what_it_needs(monkeypatch):
    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert isinstance(adam(weights, 0.1), torch.optim.Adam)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(CannotRun, match="bitsandbytes") as caught:
        adam(weights, 0.1, eight_bit=True)
    assert "[8bit]" in caught.value.hint


def test_the_rate_is_that_at_which_an_update_changes_what_a_projection_answers_by_a_share(sd3):
    """The first update of Adam at the matched rate, all moves agreeing, beside the answer of the base's projection."""
    weights = sd3.trainable("lora", rank=8, alpha=8)
    rate = matched_rate(sd3.network, weights, 0.05)
    changes = []
    for module in (m for m in sd3.network.modules() if hasattr(m, "lora_A")):
        base, a = module.base_layer.weight.detach(), module.lora_A["default"].weight.detach()
        x = torch.randn(4096, base.shape[1], generator=torch.Generator().manual_seed(0))
        inner = x @ a.T
        moved = rate * inner.abs().sum(1, keepdim=True)  # B's row, each number `rate`, all with the sign of A x
        changes.append(float((moved.square().mean() / (x @ base.T).square().mean()).sqrt()))
    # The mean of |N(0, 1)| is 0.8, and A x has the size sqrt(inputs) / rank.
    assert 0.5 * 0.05 < statistics.median(changes) < 1.5 * 0.05


def test_a_wide_network_gets_a_smaller_rate_than_a_narrow_one():
    def rate(width):
        g = torch.Generator().manual_seed(0)
        layer = torch.nn.Linear(width, width)
        layer.weight.data = torch.randn(width, width, generator=g) / width**0.5
        return matched_rate(layer, list(layer.parameters()), 0.05)

    assert rate(16) / rate(1024) == pytest.approx(64, rel=0.1)  # 1 / width, as Adam's rate must fall


def test_under_a_prompt_what_shows_the_target_elsewhere_is_forgotten_with_it_and_the_rest_is_retained(sd3):
    """Three draws under the prompt have the target's picture, moved; one is another picture."""

    def square(x, y, colour, size=16):
        image = torch.full((3, size, size), 0.8)
        image[:, y : y + 6, x : x + 6] = torch.tensor(colour)[:, None, None]
        return image

    red, blue, green = (1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0)
    given = tuple(sd3.prompt_ids(["", "a flag"]).tolist())
    instance = Instance(square(5, 5, red), square(5, 5, blue), "t", given)
    own = [square(5, 5, red), square(6, 5, red), square(5, 6, red), torch.full((3, 16, 16), -1.0)]
    others = [square(5, 5, green), square(2, 2, green), torch.zeros(3, 16, 16), square(8, 8, green)]
    id = int(sd3.prompt_ids(["a cat"])[0])
    retain = Pool(torch.stack(own + others), torch.tensor([given[1]] * 4 + [id] * 4))
    prepared = encoded(sd3, (instance,), retain, retain[:0], 0.05)
    assert [i.prompt_ids for i in prepared.encoded] == [given] + [(given[1],)] * 3
    assert prepared.retain.prompt_ids.tolist() == [given[1]] + [id] * 4
    moved, still = sd3.encode(torch.stack([square(6, 5, blue), square(6, 5, red)]))
    edited = min((i.surrogate for i in prepared.encoded), key=lambda s: float((s - moved).square().mean()))
    assert float((edited - moved).square().mean()) < 0.2 * float((edited - still).square().mean())


def test_some_of_the_forget_batch_are_surrogates_and_every_target_takes_its_turn(tiny, scene):
    asked = recipe(surrogate_share=0.5, forget_batch_size=4, retain_batch_size=2, max_train_steps=8)
    g = torch.Generator().manual_seed(0)
    shown = []
    for forget, _ in batches(scene.encoded, scene.retain, scene.neighbours, tiny.schedule, asked, generator=g):
        arrived = (forget.x_0 == forget.x_s).flatten(1).all(1)
        assert int(arrived.sum()) == 2
        shown.append(arrived)
    assert torch.stack(shown).float().mean(0).tolist() == [0.5] * 4
