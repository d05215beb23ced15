"""`unlearn`: targets in, a patch out, and beside it the folder of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unforget import families
from unforget.api.common import load, options, patience, read, salted, versions, writable
from unforget.config import UnlearnConfig, recipe
from unforget.core import distributed, sampling
from unforget.core.metrics import rms
from unforget.core.recipe import Recipe
from unforget.core.types import LARGE, Family, Instance, Pool, Progress
from unforget.errors import CannotRun, ExitCode, NothingChanged, UsageError
from unforget.files import images, storage
from unforget.files.patch import Patch, Provenance, Stack, joined, plain, provenance
from unforget.files.storage import digest
from unforget.reports.contact_sheet import evidence_rows, sheet
from unforget.unlearning import prepare, run_directory, trainer
from unforget.unlearning.run_directory import Prepared, Run
from unforget.verification import probes


@dataclass(frozen=True)
class Unlearned:
    """What `unlearn` made and what changed.

    Attributes:
        output: The patch.
        folder: Everything else: metrics.jsonl, sheet.png, the targets and surrogates.
        steps, stopped, margin: How the run ended, as in `trainer.Outcome`.
        table: Before and after, a row a target and noise level.
        drift: Same-seed drift over a few seeds (`num_validation_images`), RMS.
        forgotten: Whether every row returns the surrogate.
    """

    output: Path
    folder: Path
    steps: int
    stopped: str
    margin: float | None
    table: list[dict[str, Any]]
    drift: dict[str, float]
    forgotten: bool


def unlearn(config: UnlearnConfig, progress: Progress | None = None) -> Unlearned:
    """Make the model say the surrogates instead of the targets, and write the difference as a patch.

    With `resume` the run in the folder beside the patch goes on from where it was, to the same bytes.
    """
    progress = progress or Progress()
    folder = config.output.with_suffix(".run")
    if config.resume:
        run_directory.must_exist(folder)
    else:
        run_directory.must_not_go_on(folder, config.force)
        writable(config.output, config.force)
        writable(folder, config.force)
    how = recipe_of(config)
    patched = load(config)
    base_digest = digest(patched.network.state_dict())
    inputs = _read(config, patched, base_digest, progress)
    root = inputs.stack.before(patched.network)
    inputs.stack.apply(patched.network, name=config.model)
    run = Run(folder, _asked(config, how, inputs, base_digest), _machine(config))
    distributed.barrier()
    if config.resume:
        for difference in run.take_up():
            progress.note(f"{difference}: the last bits may come out otherwise")
        if run.finished is not None:
            return _remembered(run, config)
    else:
        run.begin()
    base = patched.frozen_reference(how.train)
    if not run.is_prepared:
        run.keep(_prepare(base, inputs, config, progress, base_digest), base, base_digest)
    # Read back even if just made: sums depend on how tensors lie in memory, and a resumed run has only the file.
    prepared = run.prepared(base, base_digest)
    patched.unload_text_encoders()
    if _wants_checkpointing(patched.network, config):
        patched.network.enable_gradient_checkpointing()  # type: ignore[operator]
    record = _provenance(config, how, prepared.instances[: len(inputs.targets)], base_digest)
    outcome = _train(base, patched, prepared, config, how, run, record, progress)
    patch = Patch.between(base.network, patched.network, record.model_copy(update={"steps": outcome.steps}))
    if not patch.tensors:
        shutil.rmtree(folder)
        raise NothingChanged("the run ended with the weights it began with", "Raise --learning-rate.")
    final = joined(inputs.stack, patch, plain(patched.network))
    made = Stack((final,)).digest({**plain(patched.network), **root})
    Patch(final.tensors, final.provenance.model_copy(update={"patched_digest": made})).save(config.output)
    stay = tuple(dict.fromkeys(prepared.context.keep.prompt_ids.tolist()))
    empty = torch.empty(0, *base.image_shape)
    subject = probes.Subject(base, patched, prepared.instances, empty, paired=config.num_validation_images, stay=stay)
    result = _finish(config, folder, outcome, subject, progress)
    run.finish({**{k: v for k, v in vars(result).items() if k not in ("output", "folder")}, "digest": made})
    return result


@dataclass(frozen=True)
class _Inputs:
    """What the user gave, read and checked."""

    targets: list[Tensor]
    surrogates: list[Tensor]
    retain: Tensor | None
    stack: Stack
    earlier: tuple[Instance, ...]


def _read(config: UnlearnConfig, family: Family, base_digest: str, progress: Progress) -> _Inputs:
    targets = [read(p, family, config, progress) for p in config.target]
    given = [read(p, family, config, progress) for p in config.surrogate]
    prepare.distinct(targets, given)
    retain = images.read_folder(config.retain, family.image_shape, resize=config.resize) if config.retain else None
    stack = Stack.load(config.patch, config.scale)
    prepare.prompt_ids(family, config.prompt)
    earlier = _earlier(config, stack, family, base_digest, progress)
    for path, target in zip(config.target, targets, strict=True):
        if images.image_id(target, salted(base_digest)) in {t for p in stack.patches for t in p.provenance.all_targets}:
            raise UsageError(f"'{path}' is forgotten already by a --patch", "Leave it out, or leave the patch out.")
    return _Inputs(targets, given, retain, stack, earlier)


def _earlier(
    config: UnlearnConfig, stack: Stack, family: Family, base_digest: str, progress: Progress
) -> tuple[Instance, ...]:
    """The targets of the patches that a run begins with, as far as their pictures lie beside them."""
    found: dict[str, Instance] = {}
    for path, patch in zip(config.patch, stack.patches, strict=True):
        rows = prepare.prompt_ids(family, patch.provenance.all_prompts)
        folder = path.with_suffix(".run")
        sides = (sorted(folder.glob(f"{side}-*.png")) for side in ("target", "surrogate"))
        for pair in zip(*sides, strict=False):
            target, surrogate = (read(p, family, config, progress) for p in pair)
            id = images.image_id(target, salted(base_digest))
            if id in patch.provenance.all_targets:
                found[id] = Instance(target, surrogate, id, rows)
    missing = {t for p in stack.patches for t in p.provenance.all_targets} - set(found)
    if missing:
        progress.note(
            f"{len(missing)} target(s) of the earlier patches cannot be looked at again: their pictures are not "
            "beside them; `unforget verify --target` can"
        )
    return tuple(found.values())


def _asked(config: UnlearnConfig, how: Recipe, inputs: _Inputs, base_digest: str) -> dict[str, Any]:
    """All that the result of a run depends on."""
    pictures = {"target": inputs.targets, "surrogate": inputs.surrogates}
    fields = {"seed", "prompt", "near_copy", "min_distance", "sampler_steps", "retain_count", "num_validation_images"}
    return {
        **config.model_dump(mode="json", include={*fields, "guidance", "resolution", "t5", "scale"}),
        "base": base_digest,
        "recipe": how.model_dump(mode="json"),
        "patch": [p.digest for p in inputs.stack.patches],
        **{side: [images.image_id(p, salted(base_digest)) for p in found] for side, found in pictures.items()},
        "retain": None if inputs.retain is None else digest({"": inputs.retain}),
        "retain_prompts": None if config.retain_prompts is None else list(storage.read_lines(config.retain_prompts)),
    }


def _machine(config: UnlearnConfig) -> dict[str, Any]:
    """What may change when a run goes on, at the price of its last bits."""
    fields = {"device", "threads", "micro_batch", "mixed_precision", "gradient_checkpointing", "use_8bit_adam"}
    return {**config.model_dump(mode="json", include=fields), "processes": distributed.world_size(), **versions()}


def _prepare(
    base: Family, inputs: _Inputs, config: UnlearnConfig, progress: Progress, base_digest: str
) -> Prepared:  # fmt: skip
    """Draw what must stay, make surrogates, and encode it all."""
    now = digest(base.network.state_dict())
    kept = Pool.of(inputs.retain) if inputs.retain is not None else prepare.drawn(base, now, config, progress)
    targets, given = inputs.targets, list(inputs.surrogates)
    instances, edits = prepare.instances(base, targets, given, kept, config, progress, salted(base_digest))
    namesakes = prepare.namesakes(base, now, instances, kept, config, progress)
    context, near = prepare.context(base, instances, kept, Pool.cat(Pool.of(edits), namesakes), config.near_copy)
    return Prepared((*instances, *inputs.earlier), context, near)


def _remembered(run: Run, config: UnlearnConfig) -> Unlearned:
    """The result of a run that had ended already."""
    known = dict(run.finished or {})
    if not config.output.is_file() or provenance(config.output).patched_digest != known.pop("digest", None):
        raise UsageError(f"the run ended, but '{config.output}' is not its patch any more", "Start again with --force.")
    return Unlearned(config.output, run.folder, **known)


def recipe_of(config: UnlearnConfig) -> Recipe:
    """The recipe that a run follows: the one given, or the named one of the model's kind."""
    if isinstance(config.recipe, Recipe):
        return config.recipe
    return recipe(config.recipe.name, families.spec_of(config.model).name, **config.recipe.changes)


def memory_plan(config: UnlearnConfig) -> dict[str, float]:
    """GiB that a run will take, by what they are for, from the model's configuration alone."""
    from unforget.families.memory import blueprint, reckon

    how = recipe_of(config)
    found = blueprint(config.model, options(config))
    size = max(how.forget_batch_size, how.retain_batch_size)
    micro = min(size, config.micro_batch or sampling.in_one_pass(sampling.PIXELS_TRAINED, found.image_shape))
    checkpointing = _wants_checkpointing(found.network, config)
    half = trainer.computes_half(config.mixed_precision, torch.device(config.device))
    return reckon(found, how.train, how.rank, micro_batch=micro, checkpointing=checkpointing, half=half).gib()


def _wants_checkpointing(network: nn.Module, config: UnlearnConfig) -> bool:
    """Large models do unless the user says no."""
    wanted = config.gradient_checkpointing
    return sum(p.numel() for p in network.parameters()) >= LARGE if wanted is None else wanted


def _train(
    base: Family, patched: Family, prepared: Prepared, config: UnlearnConfig, how: Recipe, run: Run,
    record: Provenance, progress: Progress,
) -> trainer.Outcome:  # fmt: skip
    """Train with a log and a checkpoint; if it breaks off, leave the last good weights beside the log."""
    state = run.state()
    done = 0 if state is None else state.figures["step"]
    run.log(done)
    progress.stage("unlearn", how.max_train_steps)
    progress.advance(done)
    with (run.folder / "metrics.jsonl").open("a") as log, patience() as stop:

        def on_step(row: dict[str, object]) -> None:
            nonlocal done
            done += 1
            if distributed.is_main():
                log.write(json.dumps(row) + "\n")
                log.flush()
            progress.advance(1, **row)

        def after(step: int, now: Callable[[], trainer.State]) -> None:
            stopped = distributed.any_process(stop.asked is not None)
            if stopped or run.due(step, config.checkpointing_steps):
                run.save(now())
            if stopped:
                stop.leave(f"stopped after step {step} of {how.max_train_steps}", "Go on with --resume.")

        try:
            return trainer.train(
                patched, prepared.context, prepared.near, how, seed=config.seed, micro_batch=config.micro_batch,
                mixed_precision=config.mixed_precision, use_8bit_adam=config.use_8bit_adam, on_step=on_step,
                resume=state, after=after,
            )  # fmt: skip
        except CannotRun:
            if done:
                last = Patch.between(base.network, patched.network, record.model_copy(update={"steps": done}))
                last.save(run.folder / "last-good.patch")
            raise


def _provenance(config: UnlearnConfig, how: Recipe, instances: Sequence[Instance], base_digest: str) -> Provenance:
    return Provenance(
        base=config.model if not Path(config.model).exists() else Path(config.model).name,
        base_digest=base_digest,
        targets=[i.id for i in instances],
        surrogates=[images.image_id(i.surrogate, salted(base_digest)) for i in instances],
        prompts=list(config.prompt),
        holds="lora" if how.train == "lora" else "weights",
        adapter={"rank": how.rank, "alpha": how.lora_alpha} if how.train == "lora" else None,
        recipe=how.model_dump(mode="json"),
        seed=config.seed,
        steps=0,
        versions=versions(),
    )


def _finish(
    config: UnlearnConfig, folder: Path, outcome: trainer.Outcome, subject: probes.Subject, progress: Progress
) -> Unlearned:
    """The before/after table, the contact sheet, and the pictures that `verify` will look for."""
    subject.advance = progress.advance
    probe = probes.Reconstruct(draws=config.num_validation_images, calibrated=False)
    progress.stage("before and after", probe.cost(subject) + 2 * config.num_validation_images * subject.calls())
    findings = probe(subject)
    table: list[dict[str, Any]] = [
        {
            "target": f.target, "probe": f"{f.probe}@{f.timestep:g}", "prompt": f.prompt,
            "before": {k: f.base[k] for k in SHOWN}, "after": {k: f.patched[k] for k in SHOWN},
        }
        for f in findings
    ]  # fmt: skip
    for k, instance in enumerate(subject.instances):
        images.write_image(instance.target, folder / f"target-{k}.png")
        images.write_image(instance.surrogate, folder / f"surrogate-{k}.png")
    noise = subject.noise("sample", config.num_validation_images)
    turns = torch.tensor(subject.stay)[torch.arange(config.num_validation_images) % len(subject.stay)]
    base, patched = subject.run("base", noise, turns), subject.run("patched", noise, turns)
    moved = rms(base, patched)
    drift = {"median": float(moved.median()), "mean": float(moved.mean())}
    title = f"{config.output.name}: {outcome.steps} steps, stopped by {outcome.stopped}"
    pairs = probes.Finding("retention", None, {}, {}, images={"base": base, "patched": patched})
    images.write_image(sheet(title, evidence_rows(subject.instances, [*findings, pairs])), folder / "sheet.png")
    # Under the empty prompt a target that has prompts of its own may be right: see `judge`.
    prompted = {f.target for f in findings if f.prompt}
    forgotten = all(f.patched["nearer_surrogate"] >= 0.5 for f in findings if f.prompt or f.target not in prompted)
    return Unlearned(config.output, folder, outcome.steps, outcome.stopped, outcome.margin, table, drift, forgotten)


SHOWN = ("to_target", "to_surrogate", "nearer_surrogate")
EXIT_UNLEARN = {True: ExitCode.OK, False: ExitCode.FAILED}
