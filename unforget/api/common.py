"""What every command needs: a model, an image, a place to write, and strategies in the place of flat options."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import TypeAdapter
from torch import Tensor

from unforget import families
from unforget.config import (
    Config,
    EditConfig,
    ImageConfig,
    ModelConfig,
    RecipeOptions,
    UnlearnConfig,
    VerifyConfig,
    check_paths,
    outputs,
    run_folder,
)
from unforget.config.base import option_of
from unforget.core import distributed
from unforget.core.devices import spoken
from unforget.core.objectives import BaseObjective, Objective
from unforget.core.recipe import Recipe
from unforget.core.surgery import FixedNorm
from unforget.core.types import Family, Progress
from unforget.errors import UnforgetError, UsageError, redacted
from unforget.files import cache, images
from unforget.files.locks import claimed
from unforget.surrogate.editors import Editor


@contextmanager
def holding_outputs(config: Config) -> Iterator[None]:
    """Refuse (`UsageError`) what cannot be written in the end, and keep other processes from writing it meanwhile."""
    check_paths(config)
    with claimed([path for path, kind in outputs(config) if kind not in ("appended", "part")]):
        yield


@contextmanager
def noted(progress: Progress, what: object) -> Iterator[None]:
    """A failure to write is a note where a verdict stands: that is told all the same."""
    try:
        yield
    except Exception as error:
        reason = error.message if isinstance(error, UnforgetError) else getattr(error, "strerror", None) or repr(error)
        progress.note(f"{what} could not be written: {redacted(str(reason))}")


def load(config: ModelConfig, progress: Progress) -> Family:
    """The model that a configuration names, on the device and on as many threads as it says."""
    cache.limit()  # a wrong one is told before any work
    if config.threads:
        torch.set_num_threads(config.threads)
    return families.load(config.model, options(config, progress=progress))


def options(config: ModelConfig, like: Family | None = None, progress: Progress | None = None) -> families.Options:
    """How to open a model; another one to be compared with `like` draws with the same guidance.

    UsageError if the device is not there. With `progress` the user is told of one that is not the CPU.
    """
    guidance, device = config.guidance or (like.guidance if like else None), distributed.start(config.device)
    progress = progress or Progress()
    if device != "cpu":
        progress.note(f"computing on {spoken(device)}")
    if device == "cpu" and config.cpu_offload:
        progress.note("--cpu-offload changes nothing where there is no card")
    fields = config.model_dump(
        include={"allow_pickle", "resolution", "pipeline_config", "text_encoder", "t5", "batch_size", "cpu_offload"}
    )
    networks = 2 if isinstance(config, VerifyConfig) else 1
    return families.Options(**fields, device=device, guidance=guidance, note=progress.note, networks=networks)


def read(path: Path, family: Family, config: ImageConfig, progress: Progress) -> Tensor:
    """An image of the model's size, (C, H, W) in [-1, 1]."""
    return images.read_image(path, family.image_shape, resize=config.resize, note=progress.note)


def recipe_of(config: UnlearnConfig, objective: BaseObjective | None = None) -> Recipe:
    """The recipe that a run follows: the named one of the model's family, with the changes of the configuration.

    An objective of your own takes the place of the recipe's. UsageError if the two do not fit together, or if the
    objective forgets a prompt and none is given.
    """
    spec = families.spec_of(config.model)
    recipe = resolve_recipe(spec.recipes, config)
    if objective is not None:
        recipe = recipe.model_copy(update={"objective": _own(objective, config)})
    if recipe.objective.needs_prompt and not config.prompt:
        kind = recipe.objective.kind
        raise UsageError(f"{kind} forgets a prompt, and none is given", "Give --prompt, or another --recipe.")
    if config.max_train_steps is None:
        recipe = _for_all(recipe, len(config.target), cooldown=config.cooldown_steps is None)
    if not recipe.objective.needs_surrogate and not config.surrogate:
        recipe = _without_surrogates(recipe, config)
    families.check_scope(spec, recipe.train)
    return recipe


def _for_all(recipe: Recipe, targets: int, *, cooldown: bool) -> Recipe:
    """As many updates for each of so many targets, one after another or, by our objective, side by side."""
    if not (recipe.sequential or recipe.objective.kind == "posterior-swap"):
        return recipe
    names = ("max_train_steps", *(["cooldown_steps"] if cooldown else []))
    return recipe.model_copy(update={name: getattr(recipe, name) * targets for name in names})


def _without_surrogates(recipe: Recipe, config: UnlearnConfig) -> Recipe:
    """Batches show none."""
    if config.surrogate_share:
        raise UsageError("surrogate_share needs a surrogate, and none is given", "Give --surrogate, or leave it out.")
    return recipe.model_copy(update={"surrogate_share": 0.0})


def _own(objective: BaseObjective, config: RecipeOptions) -> BaseObjective:
    """An objective from Python, if nothing else was said of objectives and its name is not one of ours."""
    if not isinstance(objective, BaseObjective):
        raise UsageError(f"{objective!r} is no objective", "Give an instance of a subclass of unforget.BaseObjective.")
    named = {"objective", "weighting"}
    for name in RecipeOptions.model_fields:
        which = option_of(RecipeOptions.model_fields[name]).of[:1] or (name,)
        if which[0] in named and getattr(config, name) is not None:
            raise UsageError(f"{name} is said of another objective than the one given", f"Leave {name} out.")
    known = {kind.model_fields["kind"].default: kind for kind in get_args(get_args(Objective)[0])}
    if known.get(objective.kind, type(objective)) is not type(objective):
        raise UsageError(f"the kind '{objective.kind}' is that of another objective", "Give it another kind.")
    return objective


FIELDS = {
    "surgery_eta": "eta", "surgery_share": "share", "weighting_beta": "beta", "weighting_cap": "cap",
    "retain_weight": "retain", "train_batch_size": "forget_batch_size",
}  # fmt: skip
"""What a recipe and its strategies call an option, where it is not the same."""


def resolve_recipe(recipes: Mapping[str, Recipe], config: RecipeOptions) -> Recipe:
    """The recipe of a family that a configuration names, with what it changes.

    A strategy that is the recipe's own keeps the recipe's options; another one begins with its defaults.
    """
    if config.recipe not in recipes:
        raise UsageError(f"there is no recipe '{config.recipe}' for this model", f"Known: {', '.join(recipes)}.")
    given = {n: v for n in RecipeOptions.model_fields if n != "recipe" and (v := getattr(config, n)) is not None}
    values = recipes[config.recipe].model_dump()
    _choose(values, "objective", given)
    # With its own weighting, where another one was chosen.
    values["objective"] = Recipe.model_validate(values).objective.model_dump()
    _choose(values["objective"], "weighting", given)
    _choose(values, "surgery", given)
    objective, surgery = values["objective"], values["surgery"]
    parts = {"objective": objective, "weighting": objective["weighting"], "surgery": surgery}
    kinds = {name: part["kind"] for name, part in parts.items()}
    if wrong := config.misplaced({**kinds, "train": given.get("train", values["train"])}):
        raise UsageError(wrong, "See `unforget unlearn --help`.")
    for name, value in given.items():
        which = option_of(RecipeOptions.model_fields[name]).of[:1]
        parts.get(which[0] if which else "", values)[FIELDS.get(name, name)] = value
    if "rank" in given and "lora_alpha" not in given:
        values["lora_alpha"] = values["rank"]
    if "update_share" in given and "learning_rate" not in given:
        values["learning_rate"] = None
    recipe = Recipe.model_validate(values)
    if isinstance(recipe.surgery, FixedNorm) and getattr(recipe.objective, "distil", False):
        sentence = "nothing would move: fixed-norm scales by the retain gradient, which --distil makes none at first"
        raise UsageError(sentence, "Leave out --distil, or give another --surgery.")
    return recipe


def _choose(values: dict[str, Any], name: str, given: dict[str, Any]) -> None:
    """Put the chosen strategy in the place of another one, with its defaults."""
    chosen = given.pop(name, values[name]["kind"])
    if chosen != values[name]["kind"]:
        values[name] = {"kind": chosen}


def editor_of(config: EditConfig) -> Editor:
    """The editor that a configuration names."""
    said = {
        "strengths": config.strength, "seeds": config.candidates, "steps": config.editor_steps,
        "instruction": config.instruction, "model": config.editor_model if config.method == "instruct" else None,
    }  # fmt: skip
    given = {name: value for name, value in said.items() if value}
    editor: Editor = TypeAdapter(Editor).validate_python({"kind": config.method, **given})
    return editor


def pictures(patch: Path) -> list[tuple[Path, Path | None]]:
    """The targets in the folder of the run that made a patch, each with its surrogate, if it has one."""
    targets = sorted(run_folder(patch).glob("target-*.png"))
    pairs = ((t, t.with_name(t.name.replace("target", "surrogate", 1))) for t in targets)
    return [(target, surrogate if surrogate.is_file() else None) for target, surrogate in pairs]


def salted(base_digest: str) -> str:
    """The salt of the ids of images: the base, and $UNFORGET_SALT where a team keeps a secret.

    Ids of one image differ from base to base; with a secret nobody without it can tell which image an id names.
    """
    return f"{base_digest}/{os.environ.get('UNFORGET_SALT', '')}/"


def versions() -> dict[str, str]:
    """Of what computes, for the record."""
    return {"unforget": version("unforget-diffusion"), "torch": torch.__version__, "diffusers": version("diffusers")}
