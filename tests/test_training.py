import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch

from unforget.core.objectives import CleanSpace, PosteriorSwap
from unforget.core.recipe import Recipe
from unforget.core.types import Instance, Pool
from unforget.errors import CannotRun
from unforget.unlearning.compute import Compute, adam, mixed
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
    how = recipe(max_train_steps=60, learning_rate=1e-3, train="full", objective=swap)
    rows, trainer = train(tiny, scene, how)
    first, last = (sum(r["forget"] for r in part) for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first
    assert (trainer.done, trainer.lr_schedule.reached) == (60, False)
    assert [r["step"] for r in rows] == list(range(1, 61))
    assert {"forget", "retain", "cosine", "margin", "learning_rate"} <= rows[0].keys()
    assert not any(p.requires_grad for p in tiny.network.parameters())


@pytest.mark.parametrize("scope", ["bottleneck", "full"])
def test_only_the_weights_in_scope_move(tiny, scene, scope):
    before = tiny.copy().network.state_dict()
    inside = {id(p) for p in tiny.trainable(scope)}
    train(tiny, scene, recipe(train=scope, learning_rate=1e-3))
    for name, p in tiny.network.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) not in inside), name


def test_mixed_precision_answers_in_float32_and_nearly_the_same(tiny):
    x_t, timestep = (
        torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor([300, 600]),
    )
    with torch.no_grad():
        exact, half = (
            tiny.predict(x_t, timestep, timestep),
            mixed(tiny.predict, True, tiny.device)(x_t, timestep, timestep),
        )
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
