"""`--dry-run`: what a command will cost, from a model's configuration alone, and how long here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from unforget import families
from unforget.api.common import editor_of, options, recipe_of
from unforget.api.computing import compute_of, memory_plan
from unforget.api.unlearning import shown_count, shown_passes
from unforget.api.verifying import retain_prompt_ids
from unforget.config import EditConfig, ModelConfig, UnlearnConfig, VerifyConfig
from unforget.core import devices, passes
from unforget.core.passes import Count
from unforget.core.sampling import seconds_a_pass
from unforget.core.types import Family, Instance
from unforget.families.memory import RUNTIME, Blueprint, blueprint, weights_of
from unforget.files import storage
from unforget.files.patch import provenance
from unforget.surrogate.editors import EDITS, counted
from unforget.unlearning.passes import Work, run_passes
from unforget.unlearning.prepare import prompt_ids, retain_turns
from unforget.verification import passes as verification
from unforget.verification import probes
from unforget.verification.context import VerifyContext
from unforget.verification.probes.base import Probe

Model = Family | Blueprint


def plan_unlearn(config: UnlearnConfig) -> dict[str, Any]:
    """Memory, network passes by stage, and time of a run."""
    found = blueprint(config.model, options(config))
    return {"memory_gib": memory_plan(config), **_costs(config, found, unlearn_passes(config, found))}


def unlearn_passes(config: UnlearnConfig, model: Model) -> dict[str, Count]:
    """Network passes of a run by stage; what the cache holds is counted, the targets of earlier patches are not."""
    listed = storage.read_lines(config.retain_prompts) if config.retain_prompts else ()
    work = Work(
        len(config.target), config.prompt, bool(config.surrogate), config.retain is not None, listed,
        config.retain_count, config.sampler_steps,
    )  # fmt: skip
    ids = prompt_ids(cast(Family, model), config.prompt)
    again = compute_of(config, model.network).gradient_checkpointing
    stages = run_passes(model, work, recipe_of(config), checkpointing=again)
    turns = [""] if work.retain else retain_turns(model, config.prompt, listed, config.retain_count)
    stay = tuple(dict.fromkeys(model.prompt_ids(turns).tolist()))
    context = _context(model, work.targets, ids, retain_prompt_ids=stay)
    return {**stages, "before and after": shown_passes(context, shown_count(config.num_validation_images, model))}


def plan_edit(config: EditConfig) -> dict[str, Any]:
    """Memory, network passes by stage, and time of making candidates; of some editors nobody counts the passes."""
    found, editor = blueprint(config.model, options(config)), editor_of(config)
    model = cast(Family, found)
    listed = storage.read_lines(config.retain_prompts) if config.retain_prompts else ()
    ids = model.prompt_ids(retain_turns(model, config.prompt, listed, config.retain_count)).tolist()
    drawn = passes.drawn(model, ids, passes.calls(model, config.sampler_steps))
    edits = counted(editor, model, prompt_ids(model, config.prompt)[-1])
    stages = {"retain set": Count.of(drawn), **({EDITS: Count.of(edits)} if edits else {})}
    memory = {"runtime": RUNTIME, "weights": found.held(parts=True) + found.beside}
    costs = _costs(config, found, stages)
    return {"memory_gib": _gib(memory, found), "not_counted": [] if edits else [EDITS], **costs}


def plan_verify(config: VerifyConfig) -> dict[str, Any]:
    """Memory, network passes by probe, and time of a judgement."""
    found = blueprint(config.model, options(config))
    context, suite = _judged(config, found)
    copies = 3 if any(probe.kind in ("quantization", "relearning") for probe in suite) else 2
    memory = {
        "runtime": RUNTIME, "weights": copies * found.held(parts=True) + found.beside,
        "draws": verification.kept_bytes(suite, context),
    }  # fmt: skip
    return {"memory_gib": _gib(memory, found), **_costs(config, found, verification.passes(suite, context))}


def _gib(memory: Mapping[str, float], found: Blueprint) -> dict[str, float]:
    """GiB by what they are for, and the peak: all together, or what embedding the prompts takes if that is more."""
    peak = max(sum(memory.values()), RUNTIME + found.embedding())
    return {name: round(value / 2**30, 3) for name, value in {**memory, "peak": peak}.items()}


def verify_passes(config: VerifyConfig, model: Model) -> dict[str, Count]:
    """Network passes of a judgement by probe; what the cache holds is counted."""
    context, suite = _judged(config, model)
    return verification.passes(suite, context)


def _judged(config: VerifyConfig, model: Model) -> tuple[VerifyContext, tuple[Probe, ...]]:
    made = [provenance(path) for path in config.patch]
    ids = prompt_ids(cast(Family, model), config.prompt or [p for m in made for p in m.all_prompts])
    count = len(config.target) or len({t for m in made for t in m.all_targets})
    stay = retain_prompt_ids(config, cast(Family, model), ids)
    own = {"seed": config.seed, "nonce": config.nonce or ""}
    context = _context(model, count, ids, policy=config, retain_prompt_ids=stay, **own)
    return context, probes.suite(config, prompted=len(ids) > 1)


def _context(model: Model, targets: int, ids: tuple[int, ...], **more: Any) -> VerifyContext:
    """A context of which nothing but the cost is asked."""
    nothing, family = torch.zeros(0), cast(Family, model)
    return VerifyContext(family, family, tuple(Instance(nothing, nothing, str(k), ids) for k in range(targets)), **more)


def _costs(config: ModelConfig, found: Blueprint, stages: Mapping[str, Count]) -> dict[str, Any]:
    """Passes by stage with their sum, and hours by the time that a pass takes here, if the model can be timed."""
    counts = {**stages, "in all": sum(stages.values(), Count())}
    said: dict[str, Any] = {"passes": {name: [count.least, count.most] for name, count in counts.items()}}
    if (seconds := _seconds_a_pass(config, found)) is not None:
        said["seconds_a_pass"] = seconds
        said["hours"] = [round(n * seconds / 3600, 3) for n in said["passes"]["in all"]]
    return said


def _seconds_a_pass(config: ModelConfig, found: Blueprint) -> float | None:
    """Seconds of a pass here, if the weights lie in a folder and take no more than half of the free memory."""
    folder = Path(found.source)
    held = folder.is_dir() and any((folder / found.spec.network).glob("*.safetensors"))
    if not held or 2 * (weights_of(found.network) + found.beside) > devices.room("cpu")[0]:
        return None
    return seconds_a_pass(families.load(config.model, options(config)))
