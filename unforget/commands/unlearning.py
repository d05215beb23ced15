"""`unlearn`: targets in, a patch out, and beside it the folder of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unforget import data, families, prepare, probes, training
from unforget.commands.common import load, options, read, salted, versions, writable
from unforget.config import Recipe, UnlearnConfig, recipe
from unforget.domain import LARGE, Family, Instance, Listener, Pool
from unforget.errors import CannotRun, ExitCode, NothingChanged
from unforget.metrics import rms
from unforget.objectives import Context
from unforget.patch import Patch, Provenance, Stack, joined, plain
from unforget.sheets import evidence_rows, sheet
from unforget.storage import digest


@dataclass(frozen=True)
class Unlearned:
    """What `unlearn` made and what changed.

    Attributes:
        output: The patch.
        folder: Everything else: metrics.jsonl, sheet.png, the targets and surrogates.
        steps, stopped, margin: How the run ended, as in `training.Outcome`.
        table: Before and after, a row a target and noise level.
        drift: Same-seed drift over a few seeds (`preview`), RMS.
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


def unlearn(config: UnlearnConfig, listener: Listener | None = None) -> Unlearned:
    """Make the model say the surrogates instead of the targets, and write the difference as a patch."""
    listener = listener or Listener()
    folder = config.output.with_suffix(".run")
    writable(config.output, config.force)
    writable(folder, config.force)
    how = recipe_of(config)
    patched = load(config)
    targets = [read(p, patched, config, listener) for p in config.target]
    given = [read(p, patched, config, listener) for p in config.surrogate]
    prepare.distinct(targets, given)
    retain = data.read_folder(config.retain, patched.picture, resize=config.resize) if config.retain else None
    base_digest = digest(patched.network.state_dict())
    stack = Stack.load(config.patch, config.scale)
    root = {n: t.clone() for n, t in patched.network.state_dict().items() if n in set(stack.names())}
    stack.apply(patched.network, name=config.model)
    prepare.conditions(patched, config.prompt)
    base = patched.reference(how.train)
    kept = Pool.of(retain) if retain is not None else prepare.drawn(base, base_digest, config, listener)
    instances, edits = prepare.instances(base, targets, given, kept, config, listener, salted(base_digest))
    namesakes = prepare.namesakes(base, base_digest, instances, kept, config, listener)
    context, near = prepare.context(base, instances, kept, Pool.cat(Pool.of(edits), namesakes), config.near_copy)
    patched.release()
    if _wants_checkpointing(patched.network, config):
        patched.network.enable_gradient_checkpointing()  # type: ignore[operator]
    _empty_run(folder)
    record = _provenance(config, how, instances, base_digest)
    outcome = _train(base, patched, context, near, config, how, folder, record, listener)
    patch = Patch.between(base.network, patched.network, record.model_copy(update={"steps": outcome.steps}))
    if not patch.tensors:
        shutil.rmtree(folder)
        raise NothingChanged("the run ended with the weights it began with", "Raise --learning-rate.")
    final = joined(stack, patch, plain(patched.network))
    made = Stack((final,)).digest({**plain(patched.network), **root})
    Patch(final.tensors, final.provenance.model_copy(update={"patched_digest": made})).save(config.output)
    stay = tuple(dict.fromkeys(context.keep.condition.tolist()))
    subject = probes.Subject(base, patched, instances, torch.empty(0, *base.picture), paired=config.preview, stay=stay)
    return _finish(config, folder, outcome, subject, listener)


def recipe_of(config: UnlearnConfig) -> Recipe:
    """The recipe that a run follows: the one given, or the named one of the model's kind."""
    if isinstance(config.recipe, Recipe):
        return config.recipe
    return recipe(config.recipe.name, families.kind(config.model), **config.recipe.changes)


def memory_plan(config: UnlearnConfig) -> dict[str, float]:
    """GiB that a run will take, by what they are for, from the model's configuration alone."""
    from unforget.families.plan import blueprint, reckon

    how = recipe_of(config)
    found = blueprint(config.model, options(config))
    size = max(how.forget_batch_size, how.retain_batch_size)
    micro = min(size, config.micro_batch or data.in_one_pass(data.PIXELS_TRAINED, found.picture))
    checkpointing = _wants_checkpointing(found.network, config)
    half = training.computes_half(config.mixed_precision, torch.device(config.device))
    return reckon(found, how.train, how.rank, micro_batch=micro, checkpointing=checkpointing, half=half).gib()


def _wants_checkpointing(network: nn.Module, config: UnlearnConfig) -> bool:
    """Large models do unless the user says no."""
    wanted = config.gradient_checkpointing
    return sum(p.numel() for p in network.parameters()) >= LARGE if wanted is None else wanted


def _empty_run(folder: Path) -> None:
    """Make the folder of a run, without what an earlier run of that name left."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("target-*.png", "surrogate-*.png", "sheet.png", "metrics.jsonl", "last-good.patch"):
        for path in folder.glob(pattern):
            path.unlink()


def _train(
    base: Family, patched: Family, context: Context, near: Pool, config: UnlearnConfig, how: Recipe, folder: Path,
    record: Provenance, listener: Listener,
) -> training.Outcome:  # fmt: skip
    """Train with a log; if it breaks off, leave the last good weights beside the log."""
    listener.stage("unlearn", how.max_train_steps)
    done = 0
    with (folder / "metrics.jsonl").open("w") as log:

        def on_step(row: dict[str, object]) -> None:
            nonlocal done
            done += 1
            log.write(json.dumps(row) + "\n")
            log.flush()
            listener.advance(1, **row)

        try:
            return training.train(
                patched, context, near, how, seed=config.seed, micro_batch=config.micro_batch,
                mixed_precision=config.mixed_precision, use_8bit_adam=config.use_8bit_adam, on_step=on_step,
            )  # fmt: skip
        except CannotRun:
            if done:
                last = Patch.between(base.network, patched.network, record.model_copy(update={"steps": done}))
                last.save(folder / "last-good.patch")
            raise


def _provenance(config: UnlearnConfig, how: Recipe, instances: Sequence[Instance], base_digest: str) -> Provenance:
    return Provenance(
        base=config.model if not Path(config.model).exists() else Path(config.model).name,
        base_digest=base_digest,
        targets=[i.id for i in instances],
        surrogates=[data.image_id(i.surrogate, salted(base_digest)) for i in instances],
        prompts=list(config.prompt),
        holds="lora" if how.train == "lora" else "weights",
        adapter={"rank": how.rank, "alpha": how.lora_alpha} if how.train == "lora" else None,
        recipe=how.model_dump(mode="json"),
        seed=config.seed,
        steps=0,
        versions=versions(),
    )


def _finish(
    config: UnlearnConfig, folder: Path, outcome: training.Outcome, subject: probes.Subject, listener: Listener
) -> Unlearned:
    """The before/after table, the contact sheet, and the pictures that `verify` will look for."""
    subject.advance = listener.advance
    probe = probes.Reconstruct(draws=config.preview, calibrated=False)
    listener.stage("before and after", probe.cost(subject) + 2 * config.preview * subject.calls())
    findings = probe(subject)
    table: list[dict[str, Any]] = [
        {
            "target": f.target, "probe": f"{f.probe}@{f.level}", "prompt": f.prompt,
            "before": {k: f.base[k] for k in SHOWN}, "after": {k: f.patched[k] for k in SHOWN},
        }
        for f in findings
    ]  # fmt: skip
    for k, instance in enumerate(subject.instances):
        data.write_image(instance.target, folder / f"target-{k}.png")
        data.write_image(instance.surrogate, folder / f"surrogate-{k}.png")
    noise = subject.noise("sample", config.preview)
    turns = torch.tensor(subject.stay)[torch.arange(config.preview) % len(subject.stay)]
    base, patched = subject.run("base", noise, turns), subject.run("patched", noise, turns)
    moved = rms(base, patched)
    drift = {"median": float(moved.median()), "mean": float(moved.mean())}
    title = f"{config.output.name}: {outcome.steps} steps, stopped by {outcome.stopped}"
    pairs = probes.Finding("retain", None, {}, {}, images={"base": base, "patched": patched})
    data.write_image(sheet(title, evidence_rows(subject.instances, [*findings, pairs])), folder / "sheet.png")
    # Under the empty prompt a target that has prompts of its own may be right: see `judge`.
    prompted = {f.target for f in findings if f.prompt}
    forgotten = all(f.patched["nearer_surrogate"] >= 0.5 for f in findings if f.prompt or f.target not in prompted)
    return Unlearned(config.output, folder, outcome.steps, outcome.stopped, outcome.margin, table, drift, forgotten)


SHOWN = ("to_target", "to_surrogate", "nearer_surrogate")
EXIT_UNLEARN = {True: ExitCode.OK, False: ExitCode.FAILED}
