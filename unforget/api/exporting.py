"""`export`: base plus patches in a form that stock loaders open, written a tensor at a time and opened again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unforget import families
from unforget.api.common import options, versions, writable
from unforget.config import ExportConfig
from unforget.core import sampling
from unforget.core.metrics import rms
from unforget.core.types import Family, Progress
from unforget.errors import CannotRun, UsageError
from unforget.exports import placing
from unforget.exports.headers import Model
from unforget.exports.lora import DIFFUSERS, PEFT, Factors
from unforget.exports.manifest import FOLDERS, Made, Part, Verified, called
from unforget.exports.merging import Change, Known, Merge, precision
from unforget.exports.rounding import DTYPES, NAMES, judged
from unforget.exports.writing import Job
from unforget.families import weights
from unforget.files.patch import Stack
from unforget.files.storage import BadFile, open_tensors, write_tensors

PREDICTIONS = {"v_prediction": "v"}
"""ModelSpec's words, where they are not diffusers'."""
SIDE = 16
"""Width and height of the latents that a large model draws to be compared."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        output: The file or folder.
        made: What it says of itself.
        url: Where it was uploaded to.
    """

    output: Path
    made: Made
    url: str | None = None


def export(config: ExportConfig, progress: Progress | None = None) -> Exported:
    """Write base plus patches and open it again by the stock loader: same weights, same picture.

    Raises:
        UsageError: If what is asked for does not go together, or a file is not what it should be.
        CannotRun: If the base is another one, rounding loses the change, or the export does not read back.
    """
    progress = progress or Progress()
    writable(config.output, config.force)
    placing.replaceable(config.output, [Path(config.model), *config.patch, *filter(None, [config.report])])
    stack = Stack.load(config.patch, config.scale)
    factors = Factors.of(stack, DTYPES.get(config.dtype or "")) if config.format in ("lora", "peft") else None
    reported = _report(config, progress)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.card_images is not None and not config.card_images.is_dir():
        raise UsageError(f"there is no folder '{config.card_images}'", "Give --card-images a folder of pictures.")
    try:
        with placing.beside(config.output) as work:
            out = work / config.output.name
            meant = _meant(config, stack, factors, reported, work, progress)
            _written(meant, out, progress)
            if config.format in FOLDERS and config.card:
                _card(config, meant.made, out)
            placing.place(out, config.output)
    except BadFile as error:
        raise CannotRun(f"cannot read the model '{config.model}': {error}", "Get the model again.") from None
    return Exported(config.output, meant.made, _pushed(config, meant.made))


@dataclass(frozen=True)
class _Meant:
    """What is to be written, when the network is no longer in memory.

    Attributes:
        job: How.
        known: What one pass over base and patches found.
        made: What the export says of itself.
        noise: Of the picture that is compared.
        prompt: Of it.
        drawn: The picture, (1, 3, H, W).
        rest: The base without its network, where that alone is written.
    """

    job: Job
    known: Known
    made: Made
    noise: Tensor
    prompt: Sequence[str]
    drawn: Tensor
    rest: Family | None


def _opened(config: ExportConfig, stack: Stack, factors: Factors | None, work: Path) -> tuple[Family, Job]:
    """The base, checked to be the one that the patches are for, and what is to be done with it.

    T5 stays where it is: the pictures that are compared need none.
    """
    how = replace(options(config), t5=False)
    with weights.quiet():
        family = weights.load(config.model, how)
    if family.kind == "ddpm" and config.format in ("lora", "peft", "single-file"):
        raise UsageError(f"a DDPM has no {config.format}", "Export the format diffusers or transformer.")
    change: Change = stack
    change.check(family.network, config.model)
    origin = weights.source(config.model, family, config.pipeline_config)
    if not origin.tensors:
        # Pickled, or under names that the loader translated: laid down once as they are in memory.
        write_tensors(family.network.state_dict(), {}, work / "network")
        state = family.network.state_dict()
        laid = open_tensors(work / "network").tensors
        origin = replace(origin, tensors={name: laid[name] for name in state})
    computed = {n: t.dtype for n, t in family.network.state_dict().items()}
    compute = next(family.network.parameters()).dtype
    own = precision(origin.tensors, computed)
    dtype = compute if factors else DTYPES.get(config.dtype or "", own)
    predicts = family.scheduler_config.get("prediction_type", "flow")
    model = Model(
        family.kind, weights.network_config(family.network), (family.image_shape[2], family.image_shape[1]),
        PREDICTIONS.get(predicts, predicts),
    )  # fmt: skip
    how = replace(how, guidance=family.guidance)
    merge = Merge(change, origin.tensors, computed, dtype)
    return family, Job(config.model, how, origin, model, merge, compute, stack, factors, config.max_shard_size)


def _meant(
    config: ExportConfig, stack: Stack, factors: Factors | None, reported: Verified | None, work: Path,
    progress: Progress,
) -> _Meant:  # fmt: skip
    """Put the patches on, in memory, learn all that the export says of itself, and draw a picture.

    Raises:
        CannotRun: If there is no room for the export, or rounding loses the change.
    """
    family, job = _opened(config, stack, factors, work)
    placing.room(config.output, job.size(config.format))
    prompt = family.retain_prompts[:1]
    family.prompt_ids(prompt)
    family.unload_text_encoders()
    progress.stage("merge", len(job.merge.base))
    known = job.merge.put_on(family.network, progress.advance)
    families.trim_memory(job.numbers)
    made = _made(config, job, known, _verified(config, known, reported, progress))
    if job.factors is None:
        lora = family.kind == "sd3" and all(p.provenance.adapter is not None for p in stack.patches)
        rounding = judged(known.meter, made, lora=lora, force=config.force_rounding, note=progress.note)
        made = made.model_copy(update={"rounding": rounding})
    channels, height, width = family.latent_shape
    most = SIDE if weights.large(family) else max(height, width)
    noise = sampling.random_noise(1, (channels, min(height, most), min(width, most)), config.seed, "export")
    drawn = _drawn(family, noise, prompt)
    family.set_network(None)
    return _Meant(job, known, made, noise, prompt, drawn, family if config.format == "transformer" else None)


def _written(meant: _Meant, out: Path, progress: Progress) -> None:
    """Write the export, open it again, and refuse it unless it is what was meant.

    Raises:
        CannotRun: If it is not.
    """
    families.trim_memory(meant.job.numbers)
    progress.stage("write", len(meant.job.merge.base))
    meant.job.write(meant.made, meant.known, out, progress.advance)
    families.trim_memory(meant.job.numbers)
    progress.stage("check", 1)
    with weights.quiet():
        again = meant.job.again(meant.made, out, meant.rest)
    after = _drawn(again, meant.noise, meant.prompt)
    # Equal weights may still be added up in another order (kernels depend on how memory is aligned), and a LoRA beside
    # a weight rounds otherwise than one merged into it.
    if not float(rms(meant.drawn, after)) <= (1e-3 if meant.job.factors is None else 1e-2):
        raise CannotRun("the export does not draw what it should", "Nothing was kept; check the disk.")
    progress.advance(1)


def _drawn(family: Family, noise: Tensor, prompt: Sequence[str]) -> Tensor:
    """The picture of one seed, (1, 3, H, W), under one prompt."""
    return sampling.draw(family, noise, steps=4, prompt_ids=family.prompt_ids(prompt))


def _made(config: ExportConfig, job: Job, known: Known, verified: Verified | None) -> Made:
    """What the export says of itself."""
    pairs = job.stack.pairs()
    first = job.stack.patches[0].provenance
    digest = known.written
    return Made(
        format=config.format, dtype=NAMES[job.factors.dtype if job.factors else job.merge.dtype],
        base=called(config.model), base_digest=first.base_digest,
        patched_digest=known.patched, digest=job.factors.digest if job.factors else digest,
        patches=[
            Part(scale=s, provenance=p.provenance.model_copy(update={"base": called(p.provenance.base)}))
            for p, s in pairs
        ],
        verified=verified, versions=versions(),
    )  # fmt: skip


def _report(config: ExportConfig, progress: Progress) -> Verified | None:
    """The report of `unforget verify` that was given, or the one beside the last patch."""
    if config.report is not None:
        return Verified.of(config.report)
    beside = config.patch[-1].with_suffix(".run") / "verify.json"
    if not beside.is_file():
        return None
    try:
        return Verified.of(beside)
    except UsageError as error:
        progress.note(error.message)
        return None


def _verified(config: ExportConfig, known: Known, reported: Verified | None, progress: Progress) -> Verified | None:
    """The report, if it is about these weights.

    Raises:
        UsageError: If it was asked for and is about others.
    """
    if reported is None:
        return None
    if reported.candidate_digest != known.patched:
        found = f"the report is about {reported.candidate_digest[:12]}, this is {known.patched[:12]}"
        if config.report is not None:
            raise UsageError(found, "Run `unforget verify` with the same patches and scales.")
        progress.note(f"{found}: not verified")
        return None
    if reported.verdict not in ("forgotten", "allowed"):
        progress.note(f"`unforget verify` said {reported.verdict}: {reported.summary}")
    return reported


def _card(config: ExportConfig, made: Made, folder: Path) -> None:
    """A README.md that the hub shows as the model's card; of a base that was got back there is nothing to say."""
    from unforget.exports import card

    home = families.home(config.model)
    if home is not None and (home / "README.md").is_file():
        shutil.copyfile(home / "README.md", folder / "README.md")  # the licence that it names is kept
    shown = sorted(config.card_images.iterdir()) if config.card_images else []
    card.write(
        folder, made, base=config.model, license=None, pictures=[p for p in shown if p.suffix.lower() in card.PICTURES],
        lora_file={"lora": DIFFUSERS, "peft": PEFT}.get(made.format),
    )  # fmt: skip


def _pushed(config: ExportConfig, made: Made) -> str | None:
    """Upload what was written, where that was asked for."""
    if config.push_to_hub is None:
        return None
    from unforget.exports import hub

    message = f"{made.base}, {len(made.patches)} patch(es), by unforget {made.versions['unforget']}"
    token = os.environ.get("HF_TOKEN")
    return hub.push(config.output, config.push_to_hub, private=config.private, token=token, message=message)
