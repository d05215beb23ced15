"""`unlearn`: targets in, a patch out, and beside it the folder of the run."""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from unforget.api.common import holding_outputs, load, noted, pictures, read, recipe_of, salted, versions
from unforget.api.computing import compute_of
from unforget.api.tracking import tracked
from unforget.config import Policy, UnlearnConfig, run_folder
from unforget.core import distributed
from unforget.core.devices import chosen
from unforget.core.metrics import rms
from unforget.core.objectives import BaseObjective
from unforget.core.passes import Count, is_large
from unforget.core.recipe import Recipe
from unforget.core.registration import misfit
from unforget.core.types import UNCONDITIONAL, Family, Instance, Progress
from unforget.errors import ExitCode, UsageError
from unforget.files import images, storage
from unforget.files.patch import Patch, Provenance, Stack, joined, plain, provenance
from unforget.files.storage import digest
from unforget.reports.contact_sheet import evidence_rows, sheet
from unforget.unlearning.compute import Compute
from unforget.unlearning.prepare import RunInputs, prompt_ids
from unforget.unlearning.run import Trained, run
from unforget.unlearning.run_directory import RunDirectory, check_start
from unforget.verification.context import Finding, Role, VerifyContext, known_surrogate
from unforget.verification.probes.reconstruct import Reconstruct
from unforget.verification.probes.replaced import Replaced, as_drawn, what_is_shown

DRAWN = {"seed", "sampler_steps", "retain_count"}
NEARER = 0.5
"""Least share of a judged row's reconstructions that are nearer to the surrogate."""
SHOWN = ("to_target", "to_surrogate", "nearer_surrogate")


@dataclass(frozen=True)
class Unlearned:
    """What `unlearn` made and what changed; how the run ended is as in `run.Trained`."""

    output: Path
    """The patch."""
    folder: Path
    """Everything else: metrics.jsonl, sheet.png, the targets and surrogates."""
    steps: int
    stopped: str
    margin: float | None
    table: list[dict[str, Any]]
    """Before and after, a row a target and noise level."""
    drawn: list[dict[str, Any]]
    """Shares of what is drawn under each given prompt, before and after."""
    drift: dict[str, float]
    """Median and mean RMS of pixels in [-1, 1], base to patched, over a few equal seeds."""
    forgotten: bool
    """Whether every row returns the surrogate, and no draw under a given prompt is the target."""
    replaced: bool
    """Whether what is drawn under each given prompt is the surrogate, if there is one."""

    @property
    def code(self) -> ExitCode:
        """How the command ends."""
        return ExitCode.OK if self.forgotten and self.replaced else ExitCode.FAILED


def unlearn(
    config: UnlearnConfig, progress: Progress | None = None, *, objective: BaseObjective | None = None
) -> Unlearned:
    """Make the model generate the surrogates instead of the targets, and write the difference as a patch.

    An `objective` of your own takes the place of the recipe's; the patch and the run record its kind and its fields.
    UsageError if a file or an option is wrong; CannotRun if the model cannot be loaded, no surrogate that it makes is
    accepted, the loss is not a number, or memory is out. A target that is still generated is no error: see `forgotten`.
    """
    with holding_outputs(config):
        check_start(config.folder, resume=config.resume, force=config.force)
        recipe = recipe_of(config, objective)
        with tracked(config, progress or Progress()) as shown:
            return _unlearned(config, recipe, shown)


def _unlearned(config: UnlearnConfig, recipe: Recipe, progress: Progress) -> Unlearned:
    patched = load(config, progress)
    compute = compute_of(config, patched.network)
    base_digest = digest(patched.network.state_dict())
    stack = Stack.load(config.patch, config.scale)
    inputs = read_inputs(config, patched, stack, salted(base_digest), progress)
    inputs = replace(inputs, needs_surrogate=recipe.objective.needs_surrogate)
    if not inputs.replaces:
        progress.note("no surrogate: what comes back is compared with the nearest other image of the retain set")
    for path, target, surrogate in zip(config.surrogate, inputs.targets, inputs.surrogates, strict=False):
        _note_what_is_lost(path, target, surrogate, patched, progress)
    root = stack.before(patched.network)
    stack.apply(patched.network, name=config.model, note=progress.note)
    promised = _recorded(config, recipe, inputs, stack, base_digest)
    directory = RunDirectory(config.folder, promised, _environment(config, compute), config.checkpointing_steps)
    distributed.barrier()
    if config.resume:
        for difference in directory.take_up():
            progress.note(f"{difference}: the last bits may come out otherwise")
        if directory.finished is not None:
            return _remembered(directory.finished, config.output)
    record = _provenance(config, recipe, inputs, base_digest)
    with nullcontext() if config.resume else directory.begun():
        trained = run(patched, inputs, recipe, compute, directory, record, progress)
    final = joined(stack, trained.patch, plain(patched.network))
    made = Stack((final,)).digest({**plain(patched.network), **root})
    Patch(final.tensors, final.provenance.model_copy(update={"patched_digest": made})).save(config.output)
    ended: dict[str, Any] = {"steps": trained.steps, "stopped": trained.stopped, "margin": trained.margin}
    ended |= _before_and_after(trained, patched, config, progress)
    with noted(progress, "the record of the run's end"):
        directory.finish({**ended, "digest": made})
    return Unlearned(config.output, config.folder, **ended)


def read_inputs(config: UnlearnConfig, family: Family, stack: Stack, salt: str, progress: Progress) -> RunInputs:
    """All files of a run, read and checked; of the family nothing but shapes and prompts is asked."""
    targets = tuple(read(p, family, config, progress) for p in config.target)
    forgotten = {t for p in stack.patches for t in p.provenance.all_targets}
    prompt_ids(family, config.prompt)  # the rows of the table before those of earlier patches
    inputs = RunInputs(
        targets, tuple(read(p, family, config, progress) for p in config.surrogate), config.prompt,
        images.read_folder(config.retain, family.image_shape, resize=config.resize, note=progress.note)
        if config.retain else None,
        storage.read_lines(config.retain_prompts) if config.retain_prompts else (),
        **config.model_dump(include=DRAWN | {"near_copy", "min_distance", "allow_near_copy"}),
        salt=salt, earlier=_earlier(config, stack, family, salt, progress),
    )  # fmt: skip
    for path, target in zip(config.target, targets, strict=True):
        if images.image_id(target, salt) in forgotten:
            raise UsageError(f"'{path}' is forgotten already by a --patch", "Leave it out, or leave the patch out.")
    return inputs


def _note_what_is_lost(path: Path, target: Tensor, surrogate: Tensor, family: Family, progress: Progress) -> None:
    """Say so before the work if a model's autoencoder loses half as much of a surrogate as the edit is."""
    lost, edit = misfit(torch.stack([as_drawn(family, surrogate), target]), surrogate).tolist()
    if lost > edit / 2:
        progress.note(
            f"the model's autoencoder returns '{path}' with an error of {lost:.2f} (RMS; the edit is {edit:.2f}), and "
            "no training can draw what it does not hold: a surrogate of larger shapes comes out sharper"
        )


def _earlier(
    config: UnlearnConfig, stack: Stack, family: Family, salt: str, progress: Progress
) -> tuple[Instance, ...]:
    """The targets of the patches that a run begins with, as far as their images lie beside them."""
    found: dict[str, Instance] = {}
    for path, patch in zip(config.patch, stack.patches, strict=True):
        rows = prompt_ids(family, patch.provenance.all_prompts)
        whole = [(target, surrogate) for target, surrogate in pictures(path) if surrogate]
        for pair in whole:
            target, surrogate = (read(p, family, config, progress) for p in pair)
            id = images.image_id(target, salt)
            if id in patch.provenance.all_targets:
                found[id] = Instance(target, surrogate, id, rows)
    missing = {t for p in stack.patches for t in p.provenance.all_targets} - set(found)
    if missing:
        progress.note(
            f"{len(missing)} target(s) of the earlier patches cannot be looked at again: their pictures are not "
            "beside them; `unforget verify --target` can"
        )
    return tuple(found.values())


def _recorded(
    config: UnlearnConfig, recipe: Recipe, inputs: RunInputs, stack: Stack, base_digest: str
) -> dict[str, Any]:
    """All that the result of a run depends on, as JSON."""
    fields = DRAWN | {"prompt", "near_copy", "min_distance", "num_validation_images"}
    return {
        **config.model_dump(mode="json", include=fields | {"guidance", "resolution", "t5", "scale"}),
        "base": base_digest, "recipe": recipe.model_dump(mode="json"), "patch": [p.digest for p in stack.patches],
        "target": _ids(inputs.targets, inputs.salt), "surrogate": _ids(inputs.surrogates, inputs.salt),
        "retain": None if inputs.retain is None else digest({"": inputs.retain}),
        "retain_prompts": list(inputs.retain_prompts) or None,
    }  # fmt: skip


def _ids(pictures: tuple[Tensor, ...], salt: str) -> list[str]:
    return [images.image_id(p, salt) for p in pictures]


def _environment(config: UnlearnConfig, compute: Compute) -> dict[str, Any]:
    """What may change when a run goes on, at the price of its last bits."""
    machine = {
        "device": chosen(config.device),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
    }
    return {**asdict(compute), **machine, **versions()}


def _provenance(config: UnlearnConfig, recipe: Recipe, inputs: RunInputs, base_digest: str) -> Provenance:
    """What is known of the patch before the run."""
    lora = recipe.train == "lora"
    return Provenance(
        base=config.model if not Path(config.model).exists() else Path(config.model).name, base_digest=base_digest,
        targets=_ids(inputs.targets, inputs.salt), surrogates=[], prompts=list(config.prompt),
        holds="lora" if lora else "weights",
        adapter={"rank": recipe.rank, "alpha": recipe.lora_alpha} if lora else None,
        recipe=recipe.model_dump(mode="json"), seed=config.seed, steps=0, versions=versions(),
    )  # fmt: skip


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Shown(_Record):
    to_target: float
    to_surrogate: float
    nearer_surrogate: float


class _Row(_Record):
    target: str
    probe: str
    prompt: str
    before: _Shown
    after: _Shown
    judged: bool = True


class _Shares(_Record):
    target: str
    prompt: str
    before: dict[str, float]
    after: dict[str, float]


class _Ended(_Record):
    """What a run notes of its end: `Unlearned` without paths, and the digest of the patched network."""

    steps: int
    stopped: str
    margin: float | None
    table: list[_Row]
    drawn: list[_Shares]
    drift: dict[Literal["median", "mean"], float]
    forgotten: bool
    replaced: bool
    digest: str


def _remembered(ended: dict[str, Any], output: Path) -> Unlearned:
    """The result of a run that had ended already."""
    try:
        known = _Ended.model_validate(ended).model_dump()
    except ValidationError:
        raise UsageError("the record of the run's end is of another version", "Start again with --force.") from None
    if not output.is_file() or provenance(output).patched_digest != known.pop("digest", None):
        raise UsageError(f"the run ended, but '{output}' is not its patch any more", "Start again with --force.")
    return Unlearned(output, run_folder(output), **known)


def shown_count(asked: int | None, model: Any) -> int:
    """Reconstructions for each timestep, and seeds, that are shown at the end; `model` is a family, loaded or not."""
    return asked or (4 if is_large(model.image_shape) else 8)


def shown_passes(context: VerifyContext, count: int) -> Count:
    """Network passes of what is shown at the end."""
    turns = context.retain_turns(count).tolist()
    own = [id for _, id in _prompted(context) for _ in range(_drawn_count(count))]
    return _shown_probe(count).cost(context) + Count.of(2 * context.passes(turns + own))


def _prompted(context: VerifyContext) -> list[tuple[Instance, int]]:
    """The targets under each given prompt."""
    return [(instance, id) for instance, id in context.cases if id != UNCONDITIONAL]


def _shown_probe(count: int) -> Reconstruct:
    return Reconstruct(draws=count, calibrated=False)


def _before_and_after(trained: Trained, patched: Family, config: UnlearnConfig, progress: Progress) -> dict[str, Any]:
    """The table, the drift, and whether all is forgotten; writes the contact sheet, and the images for `verify`."""
    base = trained.base
    stay = tuple(dict.fromkeys(trained.prepared.retain.prompt_ids.tolist()))
    context = VerifyContext(base, patched, trained.prepared.instances, retain_prompt_ids=stay, advance=progress.advance)
    count = shown_count(config.num_validation_images, base)
    progress.stage("before and after", shown_passes(context, count).least)
    findings = _shown_probe(count)(context)
    noise, turns = context.noise("sample", count), context.retain_turns(count)
    before, after = (context.run(family, noise, turns) for family in context.models.values())
    pairs = Finding("retention", None, {}, {}, images={"base": before, "candidate": after})
    cases = _prompted(context)
    unrelated = before[~torch.isin(turns, torch.tensor([id for _, id in cases], dtype=torch.long))]
    drawn = [_drawn(context, case, _drawn_count(count), unrelated) for case in cases]
    made = trained.patch.provenance
    unknown = () if made.surrogates else made.targets  # those of earlier patches have theirs
    instances = [replace(i, surrogate=i.target) if i.id in unknown else i for i in context.instances]
    with noted(progress, f"the pictures in '{config.folder}'"):
        for k, instance in enumerate(instances):
            images.write_image(instance.target, config.folder / f"target-{k}.png")
            for surrogate in known_surrogate(instance):
                images.write_image(surrogate, config.folder / f"surrogate-{k}.png")
        title = f"{config.output.name}: {trained.steps} updates"
        rows = evidence_rows(instances, [*findings, *drawn, pairs])
        images.write_image(sheet(title, rows), config.folder / "sheet.png")
    return {**judged(findings, drawn, unknown), "drift": _spread(rms(before, after))}


def _drawn_count(count: int) -> int:
    """Draws under each given prompt, by the number of images that are shown."""
    return max(8, 2 * count)


def _drawn(context: VerifyContext, case: tuple[Instance, int], count: int, unrelated: Tensor) -> Finding:
    """What base and patched model draw under a prompt, from the same noise."""
    (instance, prompt_id), noise = case, context.noise("drawn", count)
    base, after = (context.run(family, noise, prompt_id) for family in context.models.values())
    figures = what_is_shown(base, after, unrelated, instance, as_drawn(context.base, instance.surrogate))
    made: dict[Role, Tensor] = {"base": base, "candidate": after}
    return Finding(Replaced.kind, instance.id, *figures, prompt=context.prompt(prompt_id), images=made)


def judged(findings: list[Finding], drawn: list[Finding], unknown: Collection[str] = ()) -> dict[str, Any]:
    """The tables, and what they come to; nothing takes the place of a target whose surrogate is `unknown`."""
    # Under the empty prompt a target that has prompts of its own may be right: see `verdict`.
    prompted = {f.target for f in findings if f.prompt}
    table: list[dict[str, Any]] = [{
        "target": f.target, "probe": f"{f.probe}@{f.timestep:g}", "prompt": f.prompt,
        "before": {k: f.base[k] for k in SHOWN}, "after": {k: f.candidate[k] for k in SHOWN},
        "judged": bool(f.prompt) or f.target not in prompted,
    } for f in findings]  # fmt: skip
    shares = [{"target": f.target, "prompt": f.prompt, "before": f.base, "after": f.candidate} for f in drawn]
    counted = [row["after"]["nearer_surrogate"] for row in table if row["judged"]]
    gone = all(share >= NEARER for share in counted) and not any(f.candidate["target"] for f in drawn)
    checks = (c for f in drawn if f.target not in unknown for c in Replaced().judge(f, Policy(), known=True))
    replaced = all(check.outcome != "failed" for check in checks)
    return {"table": table, "drawn": shares, "forgotten": gone, "replaced": replaced}


def _spread(drift: Tensor) -> dict[str, float]:
    return {"median": float(drift.median()), "mean": float(drift.mean())}
