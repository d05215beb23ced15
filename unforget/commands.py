"""The Python API: what the commands do, under the same names and with the same defaults.

Each takes a configuration of `unforget.config` and an optional `Listener`, writes its artefact, and returns what it
found. Nothing here prints.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unforget import data, families, prepare, probes, report, training
from unforget.config import EditConfig, ExportConfig, ModelConfig, Recipe, UnlearnConfig, VerifyConfig, recipe
from unforget.domain import Family, Instance, Listener, Pool
from unforget.editors import Canvas
from unforget.errors import CannotRun, ExitCode, NothingChanged, UsageError
from unforget.metrics import rms
from unforget.objectives import Context
from unforget.patch import Patch, Provenance, digest
from unforget.sheets import candidate_sheet, evidence_sheet


@dataclass(frozen=True)
class Edited:
    """What `edit_surrogate` made: the surrogate's file, the sheet of all candidates, and their scores, best first."""

    output: Path
    sheet: Path
    picked: int
    candidates: list[dict[str, Any]]


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


def edit_surrogate(config: EditConfig, listener: Listener | None = None) -> Edited:
    """Make candidates for a target's surrogate, rank them, write the best one and a contact sheet."""
    listener = listener or Listener()
    shown = config.output.with_suffix(".sheet.png")
    _writable(config.output, config.force)
    family = _load(config)
    target = _read(config.target, family, config, listener)
    donor = _read(config.donor, family, config, listener) if config.donor else None
    mask = prepare.mask(config, family)
    drawn = prepare.drawn(family, digest(family.network.state_dict()), config, listener)
    row = prepare.conditions(family, config.prompt)[-1]
    canvas = Canvas(family, target, mask, donor, config.seed, drawn.x_0, row, listener.note)
    ranked = prepare.candidates(canvas, config.editor, config, listener)
    number = config.pick or 1
    if number > len(ranked):
        raise UsageError(f"there is no candidate {number}, only {len(ranked)}", f"Give --pick 1 to {len(ranked)}.")
    data.write_image(ranked[number - 1].image, config.output)
    data.write_image(candidate_sheet(target, ranked, number), shown)
    if not ranked[number - 1].accepted:
        listener.note("the candidate is too near the target or of another quality; look at the sheet before using it")
    rows = [{"pick": i, **{k: v for k, v in asdict(c).items() if k != "image"}} for i, c in enumerate(ranked, 1)]
    return Edited(config.output, shown, number, rows)


def unlearn(config: UnlearnConfig, listener: Listener | None = None) -> Unlearned:
    """Make the model say the surrogates instead of the targets, and write the difference as a patch."""
    listener = listener or Listener()
    folder = config.output.with_suffix(".run")
    _writable(config.output, config.force)
    _writable(folder, config.force)
    how = recipe_of(config)
    patched = _load(config)
    targets = [_read(p, patched, config, listener) for p in config.target]
    given = [_read(p, patched, config, listener) for p in config.surrogate]
    prepare.distinct(targets, given)
    retain = data.read_folder(config.retain, patched.picture, resize=config.resize) if config.retain else None
    base_digest = digest(patched.network.state_dict())
    prepare.conditions(patched, config.prompt)
    base = patched.reference(how.train)
    kept = Pool.of(retain) if retain is not None else prepare.drawn(base, base_digest, config, listener)
    instances, edits = prepare.instances(base, targets, given, kept, config, listener)
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
    patch.save(config.output)
    subject = probes.Subject(
        base, patched, instances, torch.empty(0, *base.picture), config.near_copy,
        stay=tuple(dict.fromkeys(context.keep.condition.tolist())),
    )  # fmt: skip
    return _finish(config, folder, outcome, subject, listener)


def recipe_of(config: UnlearnConfig) -> Recipe:
    """The recipe that a run follows: the one given, or the named one of the model's kind."""
    if isinstance(config.recipe, Recipe):
        return config.recipe
    return recipe(config.recipe.name, families.kind(config.model), **config.recipe.changes)


PRIVATE = {
    "model", "patch", "candidate", "target", "surrogate", "keep", "prompt", "retain_prompts", "pipeline_config",
    "report", "sheet", "force", "threads", "device",
}  # fmt: skip
"""Settings of `verify` that name files, prompts or the machine: they stay out of the report."""


def verify(config: VerifyConfig, listener: Listener | None = None) -> report.Report:
    """Put base and candidate side by side and judge: is every target gone, is the rest still there?"""
    listener = listener or Listener()
    for path in (config.report, config.sheet):
        if path is not None:
            _writable(path, config.force)
    base = _load(config)
    candidate = _candidate(config, base)
    instances, known = _read_instances(config, base, listener)
    keep = [_read(p, base, config, listener) for p in config.keep]
    listed = data.read_lines(config.retain_prompts) if config.retain_prompts else base.retain_prompts
    gone = set(instances[0].conditions[1:])
    stay = tuple(r for r in dict.fromkeys(base.condition(listed).tolist()) if r not in gone)
    candidate.condition(base.prompts)  # the same rows in both tables
    subject = probes.Subject(
        base, candidate, instances, torch.stack(keep) if keep else torch.empty(0, *base.picture), config.near_copy,
        config.sampler_steps, config.seed, listener.advance, stay,
    )  # fmt: skip
    suite: tuple[probes.Probe, ...] = (
        probes.Reconstruct(levels=config.levels, draws=config.draws),
        probes.Sample(count=config.samples),
        probes.Retain(count=config.samples),
    )
    findings = probes.collect(suite, subject, listener.stage)
    judged = report.checks(findings, config, surrogate_known=known)
    verdict, targets, summary = report.judge(judged, findings)
    result = report.Report(
        verdict=verdict,
        exit_code=report.EXIT[verdict],
        summary=summary,
        targets=targets,
        checks=judged,
        findings=[{"probe": f.probe, "target": f.target, "base": f.base, "candidate": f.patched} for f in findings],
        settings=config.model_dump(mode="json", exclude=PRIVATE),
        base_digest=digest(base.network.state_dict()),
        candidate_digest=digest(candidate.network.state_dict()),
        versions=_versions(),
    )  # fmt: skip
    if config.report:
        result.save(config.report)
    if config.sheet:
        data.write_image(evidence_sheet(summary, instances, findings), config.sheet)
    return result


def export(config: ExportConfig, listener: Listener | None = None) -> Path:
    """Write base plus patch as a checkpoint, or the patch as a LoRA, that the stock loader opens, and open it."""
    listener = listener or Listener()
    _writable(config.output, config.force)
    patch = Patch.load(config.patch)
    if config.format == "lora" and patch.provenance.adapter is None:
        raise UsageError("the patch holds whole weights, not a LoRA", "Unlearn with --train lora, or export diffusers.")
    family = _load(config)
    base = family.copy() if config.format == "lora" else None
    patch.apply(family.network, name=config.model)
    beside = config.output.with_name(f".{config.output.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        listener.stage("export", 2)
        if base is None:
            family.save(beside)
            again = families.load(str(beside), _options(config, family))
        else:
            assert patch.provenance.adapter is not None
            base.save_lora(beside, patch.tensors, **patch.provenance.adapter)
            again = base.load_lora(beside)
        listener.advance(1)
        _same(again, family, config.seed, exact=base is None)
        listener.advance(1)
        if config.output.exists():
            shutil.rmtree(config.output)
        os.replace(beside, config.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return config.output


def _same(again: Family, family: Family, seed: int, *, exact: bool) -> None:
    """Refuse a checkpoint that was not read back as what was written: weights, and the picture drawn from one seed."""
    noise = data.random_noise(1, family.shape, seed, "export")
    prompt = family.retain_prompts[:1]
    pictures = [data.draw(f, noise, steps=4, condition=f.condition(prompt)) for f in (again, family)]
    weights = [digest(f.network.state_dict()) if exact else "" for f in (again, family)]
    # Equal weights may still be added up in another order (kernels depend on how memory is aligned), and a LoRA beside
    # a weight rounds otherwise than one merged into it.
    if weights[0] != weights[1] or float(rms(*pictures)) > (1e-3 if exact else 1e-2):
        raise CannotRun("the checkpoint does not read back as it was written", "Nothing was kept; check the disk.")


def _load(config: ModelConfig) -> Family:
    if config.threads:
        torch.set_num_threads(config.threads)
    return families.load(config.model, _options(config))


def _options(config: ModelConfig, like: Family | None = None) -> families.Options:
    """How to open a model; another one to be compared with `like` draws with the same guidance."""
    guidance = config.guidance or (like.guidance if like else None)
    return families.Options(
        config.allow_pickle, config.device, config.resolution, guidance, config.pipeline_config, config.t5
    )


def memory_plan(config: UnlearnConfig) -> dict[str, float]:
    """GiB that a run will take, by what they are for, from the model's configuration alone."""
    from unforget.families.plan import blueprint, reckon

    how = recipe_of(config)
    found = blueprint(config.model, _options(config))
    size = max(how.forget_batch_size, how.retain_batch_size)
    micro = min(size, config.micro_batch or data.in_one_pass(data.PIXELS_TRAINED, found.picture))
    checkpointing = _wants_checkpointing(found.network, config)
    half = training.computes_half(config.mixed_precision, torch.device(config.device))
    return reckon(found, how.train, how.rank, micro_batch=micro, checkpointing=checkpointing, half=half).gib()


LARGE = 500_000_000
"""Weights from which on gradients are checkpointed unless the user says no."""


def _wants_checkpointing(network: nn.Module, config: UnlearnConfig) -> bool:
    wanted = config.gradient_checkpointing
    return sum(p.numel() for p in network.parameters()) >= LARGE if wanted is None else wanted


def _read(path: Path, family: Family, config: ModelConfig, listener: Listener) -> Tensor:
    return data.read_image(path, family.picture, resize=config.resize, note=listener.note)


def _writable(path: Path, force: bool) -> None:
    """Refuse before any work what could not be written after it."""
    if path.exists() and not force:
        raise UsageError(f"'{path}' exists", "Say --force to overwrite it, or give another --output.")
    home = path.parent
    if not home.is_dir():
        raise UsageError(f"there is no folder '{home}'", "Make it first.")
    if not os.access(home, os.W_OK):
        raise UsageError(f"the folder '{home}' cannot be written", "Give another --output.")


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
        surrogates=[data.image_id(i.surrogate) for i in instances],
        prompts=list(config.prompt),
        adapter={"rank": how.rank, "alpha": how.lora_alpha} if how.train == "lora" else None,
        recipe=how.model_dump(mode="json"),
        seed=config.seed,
        steps=0,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {"unforget": version("unforget-diffusion"), "torch": torch.__version__, "diffusers": version("diffusers")}


def _finish(
    config: UnlearnConfig, folder: Path, outcome: training.Outcome, subject: probes.Subject, listener: Listener
) -> Unlearned:
    """The before/after table, the contact sheet, and the pictures that `verify` will look for."""
    suite: tuple[probes.Probe, ...] = (
        probes.Reconstruct(draws=config.preview),
        probes.Retain(count=config.preview, neighbours=1),
    )
    subject.advance = listener.advance
    findings = probes.collect(suite, subject, listener.stage)
    table: list[dict[str, Any]] = [
        {"target": f.target, "probe": f.probe, "before": f.base, "after": f.patched}
        for f in findings
        if f.probe.startswith("reconstruct")
    ]
    for k, instance in enumerate(subject.instances):
        data.write_image(instance.target, folder / f"target-{k}.png")
        data.write_image(instance.surrogate, folder / f"surrogate-{k}.png")
    drift = next(f.patched for f in findings if f.probe == "retain")
    title = f"{config.output.name}: {outcome.steps} steps, stopped by {outcome.stopped}"
    data.write_image(evidence_sheet(title, subject.instances, findings), folder / "sheet.png")
    forgotten = all(
        f.patched["nearer_surrogate"] >= 0.5 for f in report.decisive(findings) if f.probe.startswith("reconstruct")
    )
    return Unlearned(config.output, folder, outcome.steps, outcome.stopped, outcome.margin, table, drift, forgotten)


def _candidate(config: VerifyConfig, base: Family) -> Family:
    """The model to judge: the base with the patch on, or an exported checkpoint of the same architecture."""
    if config.patch is not None:
        family = base.copy()
        Patch.load(config.patch).apply(family.network, name=config.model)
        return family
    family = families.load(str(config.candidate), _options(config, base))
    shapes = [{n: t.shape for n, t in m.network.state_dict().items()} for m in (base, family)]
    if shapes[0] != shapes[1] or base.picture != family.picture:
        raise CannotRun(f"'{config.candidate}' has another architecture than {config.model}", "Give its own base.")
    if not torch.equal(base.schedule.alphas, family.schedule.alphas):
        raise CannotRun(f"'{config.candidate}' has another noise schedule than {config.model}", "Give its own base.")
    return family


def _read_instances(config: VerifyConfig, base: Family, listener: Listener) -> tuple[tuple[Instance, ...], bool]:
    """The targets with their surrogates, and whether those are known."""
    targets, surrogates = list(config.target), list(config.surrogate)
    beside = config.patch.with_suffix(".run") if config.patch else None
    if not targets and beside is not None:
        targets, surrogates = sorted(beside.glob("target-*.png")), sorted(beside.glob("surrogate-*.png"))
    if not targets:
        raise UsageError("no target to look for", "Give --target FILE; the patch holds only digests of its targets.")
    pictures = [_read(p, base, config, listener) for p in targets]
    replaced = [_read(p, base, config, listener) for p in surrogates]
    prompts: Sequence[str] = config.prompt
    if config.patch is not None:
        made = Patch.load(config.patch).provenance
        known, prompts = set(made.targets), prompts or made.prompts
        for path, picture in zip(targets, pictures, strict=True):
            if data.image_id(picture) not in known:
                listener.note(f"{path} is not among the targets that the patch was made for")
    pairs = zip(pictures, replaced or pictures, strict=True)
    rows = prepare.conditions(base, prompts)
    return tuple(Instance(t, s, data.image_id(t), rows) for t, s in pairs), bool(replaced)


EXIT_UNLEARN = {True: ExitCode.OK, False: ExitCode.FAILED}
