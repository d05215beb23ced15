"""One export: the base opened, patches put on, written, and opened again by the stock loader to be compared."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from unforget import families
from unforget.core import sampling
from unforget.core.metrics import exact_rms
from unforget.core.types import Family, Progress
from unforget.errors import CannotRun, UsageError
from unforget.exports.formats import FORMATS, Format, Job
from unforget.exports.manifest import AppliedPatch, ExportManifest, Verified, called
from unforget.exports.merging import Merge, MergeStats, precision
from unforget.exports.placement import check_room
from unforget.exports.rounding import DTYPES, NAMES, judge
from unforget.families import Options, weights
from unforget.families.spec import FamilySpec
from unforget.files.patch import Stack
from unforget.files.storage import open_tensors, write_tensors

SIDE = 16
"""Width and height of the latents that a large model draws to be compared."""


@dataclass(frozen=True)
class ExportRequest:
    """What is to be exported, and how."""

    model: str
    options: Options
    stack: Stack
    format: str
    dtype: str | None
    max_shard_size: str
    seed: int
    force_rounding: bool
    verified: Verified | None
    """The verdict that was given."""
    report: Path
    """Where one lies that was not given."""
    versions: Mapping[str, str]
    """For the record."""


@dataclass(frozen=True)
class Ready:
    """An export of which everything is known and nothing written."""

    form: Format
    job: Job
    family: Family
    """With the patches on."""
    manifest: ExportManifest
    bytes: int
    """That it takes on the disk, about."""


def ready(request: ExportRequest, out: Path, progress: Progress) -> Ready:
    """Open the base, put the patches on, and judge the rounding; `out` is not there yet.

    UsageError if the family has no such format, or the verdict is about other weights; CannotRun if the base is another
    one, the disk has no room, or rounding loses the change.
    """
    form = FORMATS[request.format](request.stack, DTYPES.get(request.dtype or ""))
    with weights.quiet():  # T5 stays where it is: the images that are compared need none
        family = weights.load(request.model, replace(request.options, t5=False))
    job = _job(request, family, form, out, progress)
    size = form.size(job)
    check_room(out.parent, size)
    family.prompt_ids(family.retain_prompts[:1])
    family.unload_text_encoders()
    progress.stage("merge", len(job.merge.base))
    stats = job.merge.apply(family.network)
    families.trim_memory(job.numbers)
    return Ready(form, job, family, _manifest(request, form, job, stats, progress), size)


def write_export(request: ExportRequest, out: Path, progress: Progress) -> tuple[ExportManifest, FamilySpec]:
    """Write base plus patches to `out`, which is not there yet; returns what it says of itself, and the family's row.

    Errors as of `ready`, and CannotRun if the export does not read back.
    """
    made = ready(request, out, progress)
    form, job, family, manifest = made.form, made.job, made.family, made.manifest
    del made
    noise, prompt = _noise(family, request.seed), family.retain_prompts[:1]
    meant = sampling.draw(family, noise, steps=4, prompt_ids=family.prompt_ids(prompt))
    family.set_network(None)
    del family
    families.trim_memory(job.numbers)
    progress.stage("write", len(job.merge.base))
    form.write(job, manifest, out)
    families.trim_memory(job.numbers)
    progress.stage("check", 1)
    with weights.quiet():
        again = form.reopen(job, manifest, out)
    drawn = sampling.draw(again, noise, steps=4, prompt_ids=again.prompt_ids(prompt))
    # Equal weights may still be added up in another order (kernels depend on how memory is aligned), and a LoRA beside
    # a weight rounds otherwise than one merged into it.
    if not float(exact_rms(meant, drawn)) <= (1e-2 if form.is_adapter else 1e-3):
        raise CannotRun("the export does not draw what it should", "Nothing was kept; check the disk.")
    progress.advance(1)
    return manifest, job.family


def _job(request: ExportRequest, family: Family, form: Format, out: Path, progress: Progress) -> Job:
    """The base, checked to be the one that the patches are for, and what is to be done with it."""
    row, state = family.spec, family.network.state_dict()
    if request.format not in row.formats:
        raise UsageError(f"a {row.name} has no {request.format}", f"It has the formats {', '.join(row.formats)}.")
    request.stack.check(family.network, request.model, request.options.note)
    origin = weights.source(request.model, family, request.options.pipeline_config)
    if not origin.tensors:
        # Pickled, or under names that the loader translated: laid down once as they are in memory.
        file = out.with_name(f".{out.name}.network")
        write_tensors(state, {}, file)
        laid = open_tensors(file).tensors
        origin = replace(origin, tensors={name: laid[name] for name in state})
    computed = {name: tensor.dtype for name, tensor in state.items()}
    compute = next(family.network.parameters()).dtype
    dtype = compute if form.is_adapter else form.dtype or precision(origin.tensors, computed)
    return Job(
        request.model, replace(request.options, t5=False, guidance=family.guidance), row, origin,
        weights.network_config(family.network), (family.image_shape[2], family.image_shape[1]),
        family.scheduler_config.get("prediction_type", "flow"),
        Merge(request.stack, origin.tensors, computed, dtype, progress.advance), compute, request.max_shard_size,
    )  # fmt: skip


def _noise(family: Family, seed: int) -> Tensor:
    """Of the image that is compared, (1, C, H, W)."""
    channels, height, width = family.latent_shape
    most = SIDE if weights.large(family) else max(height, width)
    return sampling.random_noise(1, (channels, min(height, most), min(width, most)), seed, "export")


def _manifest(request: ExportRequest, form: Format, job: Job, stats: MergeStats, progress: Progress) -> ExportManifest:
    """What the export says of itself; CannotRun if rounding loses the change."""
    patches = [
        AppliedPatch(scale=s, provenance=p.provenance.model_copy(update={"base": called(p.provenance.base)}))
        for p, s in request.stack.pairs()
    ]
    manifest = ExportManifest(
        format=form.kind, dtype=NAMES[form.dtype or job.merge.dtype], base=called(request.model),
        base_digest=patches[0].provenance.base_digest, patched_digest=stats.patched, digest=form.digest(stats),
        patches=patches, verified=_verdict(request, stats, progress), versions=dict(request.versions), sealed=True,
    )  # fmt: skip
    if form.is_adapter:
        return manifest
    lora = "lora" in job.family.formats and all(p.provenance.adapter is not None for p in patches)
    rounding = judge(stats.meter, manifest, lora=lora, force=request.force_rounding, note=progress.note)
    return manifest.model_copy(update={"rounding": rounding})


def _verdict(request: ExportRequest, stats: MergeStats, progress: Progress) -> Verified | None:
    """The verdict of `unforget verify`, if it is about these weights; UsageError if one was given that is not."""
    found, beside = request.verified, request.report
    if found is None and beside.is_file():
        try:
            found = Verified.of(beside)
        except UsageError as error:
            progress.note(error.message)
    if found is None:
        return None
    if found.candidate_digest != stats.patched:
        sentence = f"the report is about {found.candidate_digest[:12]}, this is {stats.patched[:12]}"
        if request.verified is not None:
            raise UsageError(sentence, "Run `unforget verify` with the same patches and scales.")
        progress.note(f"{sentence}: not verified")
        return None
    if found.verdict not in ("forgotten", "allowed"):
        progress.note(f"`unforget verify` said {found.verdict}: {found.summary}")
    return found
