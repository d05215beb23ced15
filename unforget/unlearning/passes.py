"""What a run of `unlearn` costs until its end is shown: network passes by stage, before any weight is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unforget.core import passes
from unforget.core.passes import WITH_GRADIENTS, Count
from unforget.core.recipe import Recipe
from unforget.core.sampling import visited
from unforget.surrogate.editors import EDITS, automatic_passes
from unforget.unlearning import preconditioner, saliency
from unforget.unlearning.prepare import ALIKE, lookalikes, retain_turns
from unforget.unlearning.trainer import CHECK_EVERY, DRAWS, MARGIN_AT, STEPS


@dataclass(frozen=True)
class Work:
    """What a run is to do, as far as its cost depends on it; fields as in `prepare.RunInputs`."""

    targets: int
    prompts: tuple[str, ...] = ()
    surrogates: bool = False  # whether they are given
    retain: bool = False
    retain_prompts: Sequence[str] = ()
    retain_count: int | None = None
    sampler_steps: int = 20


def run_passes(model: Any, work: Work, recipe: Recipe, *, checkpointing: bool) -> dict[str, Count]:
    """Passes by stage; `model` is a family, loaded or not. What the cache holds is counted.

    Variants of a target that the base draws under its prompts add margin checks, which nobody knows before.
    """
    calls = passes.calls(model, work.sampler_steps)
    given = tuple(dict.fromkeys(model.prompt_ids(["", *work.prompts]).tolist()))
    turns = retain_turns(model, work.prompts, work.retain_prompts, work.retain_count)
    drawn = 0 if work.retain else passes.drawn(model, model.prompt_ids(turns).tolist(), calls)
    alike = len(set(turns) - set(work.prompts) - {""}) if len(given) > 1 and not work.retain else 0
    # One id stands for all that are not empty: guidance asks no more.
    most = passes.drawn(model, [1] * min(ALIKE, alike) * lookalikes(model), calls)
    made = work.targets * (recipe.objective.needs_surrogate and not work.surrogates)
    edits = made * automatic_passes(model, given[-1]) if made else Count()
    return {
        "retain set": Count.of(drawn), EDITS: edits, "look-alikes to retain": Count(0, most),
        "training": _trained(recipe, checkpointing), "margin": _margins(model, recipe, work.targets, given),
    }  # fmt: skip


def _steps(recipe: Recipe) -> Count:
    """Updates: two looks at the margin may be enough to cool down."""
    cooled = 2 * CHECK_EVERY + recipe.cooldown_steps
    few = recipe.max_train_steps if recipe.stop_margin is None else min(recipe.max_train_steps, cooled)
    return Count(few, recipe.max_train_steps)


def _trained(recipe: Recipe, checkpointing: bool) -> Count:
    """What surgery and objective ask of both batches in every update, and saliency and preconditioner once."""
    sizes = {"forget": recipe.forget_batch_size, "retain": recipe.retain_batch_size}
    answers = dict(zip(sizes, recipe.objective.base_passes(), strict=True))
    trained = WITH_GRADIENTS + checkpointing
    update = sum(sizes[side] * (trained + answers[side]) for side in recipe.surgery.uses)
    once = 0 if recipe.saliency is None else saliency.IMAGES * trained
    once += 0 if recipe.damping is None else preconditioner.IMAGES
    return update * _steps(recipe) + Count.of(once)


def _margins(model: Any, recipe: Recipe, targets: int, given: tuple[int, ...]) -> Count:
    """Looks at the margin: before, now and then, and after."""
    if recipe.stop_margin is None:
        return Count()
    ids = [id for _ in range(targets) for id in given for _ in range(DRAWS)]
    starts = (visited(model, timestep, steps=STEPS) for timestep in MARGIN_AT)
    once = sum(passes.drawn(model, ids, passes.calls(model, STEPS, start)) for start in starts)
    steps = _steps(recipe)
    return Count(*((2 + n // CHECK_EVERY) * once for n in (steps.least, steps.most)))
