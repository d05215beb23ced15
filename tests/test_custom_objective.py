"""Objectives that a user brings, through `unforget.unlearn`, as examples/custom_objective.py does."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from conftest import stop_at

from unforget import families
from unforget.api import recipe_of, unlearn
from unforget.core.objectives import BaseObjective, NegGrad, Surrogate
from unforget.core.recipe import Recipe
from unforget.core.types import Instance, Pool
from unforget.errors import Interrupted, UsageError
from unforget.files.patch import Patch
from unforget.unlearning.compute import Compute
from unforget.unlearning.prepare import Prepared
from unforget.unlearning.trainer import Trainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_objective.py"


@pytest.fixture(scope="module")
def example():
    found = importlib.util.spec_from_file_location("custom_objective", EXAMPLE)
    module = importlib.util.module_from_spec(found)
    sys.modules["custom_objective"] = module
    found.loader.exec_module(module)
    return module


class Lean(BaseObjective):
    """No more than must be: two losses."""

    kind: Literal["lean"] = "lean"
    lean: float = 0.5

    def forget(self, patched, batch, context):
        return self.lean * self.retain(patched, batch, context)

    def retain(self, patched, batch, context):
        return (patched(batch.x_t, batch.timestep, batch.prompt_ids) - batch.noise).square().mean()


FEW = {"max_train_steps": 3, "cooldown_steps": 1, "stop_margin": None, "surgery": "sum"}


def test_it_is_trained_recorded_and_resumed_to_the_same_bytes(config, example, monkeypatch):
    """The example's, which draws by chance: another resume, another objective or other fields of it are refused."""
    objective, options = example.Fade(width=4), {**FEW, "surrogate": ()}
    whole = unlearn(config("whole", **options), objective=objective)
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        unlearn(config(**options), objective=objective)
    monkeypatch.undo()
    for other in (None, example.Fade(width=2), NegGrad()):
        with pytest.raises(UsageError, match="another one: it differs in recipe"):
            unlearn(config(resume=True, **options), objective=other)
    unlearn(config(resume=True, **options), objective=example.Fade(width=4))
    assert config().output.read_bytes() == config("whole").output.read_bytes()
    said = Patch.load(whole.output).provenance.recipe
    written = json.loads((whole.folder / "run.json").read_text())["asked"]["recipe"]
    for recipe in (said, written):
        assert recipe["objective"] == {
            "kind": "fade", "width": 4, "grain": 0.1, "distil": False, "weighting": {"kind": "uniform", "retain": 1.0}
        }  # fmt: skip
        assert recipe["surgery"] == {"kind": "sum"}


def test_it_trains_as_one_of_ours_with_the_same_losses(tiny):
    """NegGrad's, written as a user would, beside NegGrad; with another field it is something else."""
    target, surrogate, *keep = torch.rand(5, *tiny.latent_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    instances, pool = (Instance(target, surrogate, "t"),), Pool.of(torch.stack(keep))
    prepared = Prepared(instances, instances, pool, pool[:0], torch.ones(1, 1))

    def trained(objective):
        how = Recipe(max_train_steps=2, cooldown_steps=0, forget_batch_size=2, retain_batch_size=2, stop_margin=None)
        how, model = how.model_copy(update={"objective": objective}), tiny.copy()
        trainer = Trainer(model, tiny, prepared, how, seed=0, compute=Compute())
        assert len(list(trainer)) == 2
        return torch.cat([w.flatten() for w in trainer.weights])

    assert torch.equal(trained(Lean(lean=-1)), trained(NegGrad()))
    assert not torch.equal(trained(Lean(lean=-2)), trained(NegGrad()))


class Impostor(Surrogate):
    """Another objective by a name of ours."""

    def retain(self, patched, batch, context):
        return 0 * super().retain(patched, batch, context)


class Prompted(Lean):
    """Nothing without a prompt."""

    kind: Literal["prompted"] = "prompted"
    needs_prompt: ClassVar[bool] = True


@pytest.mark.parametrize(("objective", "options", "sentence"), [
    (Impostor(), {}, "the kind 'surrogate' is that of another objective"),
    ("siss", {}, "'siss' is no objective"),
    (Lean, {}, "is no objective"),
    (Prompted(), {}, "prompted forgets a prompt, and none is given"),
    (Lean(), {"objective": "siss"}, "objective is said of another objective than the one given"),
    (Lean(), {"taper": (5, 9)}, "taper is said of another objective"),
    (Lean(), {"weighting": "uniform"}, "weighting is said of another objective"),
    (Lean(), {"retain_weight": 3}, "retain_weight is said of another objective"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_loaded(config, monkeypatch, objective, options, sentence):
    monkeypatch.setattr(families, "load", lambda *a, **k: 1 / 0)
    with pytest.raises(UsageError, match=sentence):
        unlearn(config(**options), objective=objective)
    assert not config().output.with_suffix(".run").exists()


def test_other_options_of_the_recipe_apply(config):
    recipe = recipe_of(config(recipe="paper", surgery="pcgrad", learning_rate=0.5), Lean())
    assert (recipe.objective, recipe.surgery.kind, recipe.learning_rate) == (Lean(), "pcgrad", 0.5)
    assert recipe.sequential


@pytest.mark.slow
def test_the_example_runs(example, tmp_path, capsys, monkeypatch, few):
    for name, kind in few.items():
        monkeypatch.setattr(example, name, kind)
    assert example.main(tmp_path, 3) in (0, 1, 4)
    assert "3 steps with Fade(" in capsys.readouterr().out
    assert (tmp_path / "3.patch").is_file()
