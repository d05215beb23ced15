"""`verify`: base and candidate side by side, and a verdict."""

import datetime
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import get_args

import torch

from unforget import families
from unforget.api.common import holding_outputs, load, noted, options, pictures, read, salted, versions
from unforget.config import Policy, VerifyConfig, run_folder
from unforget.core import distributed
from unforget.core.types import Family, Instance, Progress
from unforget.errors import CannotRun, UsageError
from unforget.exports.manifest import Verified, called
from unforget.exports.show import damage
from unforget.families import shipped
from unforget.files import images, storage
from unforget.files.patch import Provenance, Stack, provenance
from unforget.files.storage import digest, write_bytes
from unforget.reports.attestation import attestation
from unforget.reports.contact_sheet import Row, evidence_rows, sheet
from unforget.reports.html import page
from unforget.reports.junit import junit
from unforget.reports.markdown import markdown
from unforget.unlearning.prepare import prompt_ids
from unforget.verification import compare as verification
from unforget.verification import probes
from unforget.verification.context import VerifyContext, known_surrogate
from unforget.verification.report import Report
from unforget.verification.similarity import backend

LEVELS = get_args(Policy.model_fields["level"].annotation)
"""The levels of `verify`, the weakest first."""
PRIVATE = {"target", "surrogate", "must_retain", "prompt", "retain_prompts", "allow", "similarity"}
"""Settings that name files, prompts or targets: they stay out of the report."""


def verify(
    config: VerifyConfig, progress: Progress | None = None, told: Callable[[Report], object] = lambda report: None
) -> Report:
    """Put base and candidate side by side and judge: is every target forgotten, is the rest retained?

    `told` is given the verdict before any file is written; a file that then cannot be written is a note. Rates are
    shares of draws, distances RMS of pixels in [-1, 1]. UsageError if a file or an option is wrong; CannotRun if a
    model cannot be loaded, or the candidate is of another architecture. A failed verdict is no error: see `exit_code`.
    """
    progress = progress or Progress()
    with holding_outputs(config):
        check_candidate(config)
        base = load(config, progress)
        result, rows = compare(config, base, _candidate(config, base, progress), progress)
        told(result)
        _write(config, result, rows, progress)
    return result


def compare(
    config: VerifyConfig, base: Family, candidate: Family, progress: Progress | None = None
) -> tuple[Report, list[Row]]:
    """Judge a candidate that is loaded already: the report, and the images that it rests on, for a sheet or a page."""
    progress = progress or Progress()
    check_backends(config)
    made = [provenance(path) for path in config.patch]
    base_digest = digest(base.network.state_dict())
    instances = read_instances(config, base, base_digest, made, progress)
    must_retain = tuple(read(p, base, config, progress) for p in config.must_retain)
    stay = retain_prompt_ids(config, base, instances[0].prompt_ids)
    candidate.prompt_ids(base.prompts)  # the same ids in both tables
    context = VerifyContext(
        base, candidate, instances, config, must_retain, stay, families.parts_apart(base, candidate), config.seed,
        base_digest, digest(candidate.network.state_dict()), _nonce(config), advance=progress.advance,
        cache=config.cache and not config.save_images,  # images to look at are not stored with the figures
    )  # fmt: skip
    result, findings = verification.compare(
        context, probes.suite(config, prompted=len(instances[0].prompt_ids) > 1),
        known=[i.id for i in instances if known_surrogate(i)],
        promised=list(dict.fromkeys(t for m in made for t in m.all_targets)), progress=progress,
        settings=config.model_dump(mode="json", include=set(Policy.model_fields) - PRIVATE), versions=versions(),
        model=called(config.model), patches=[m.digest for m in made],
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    return result, evidence_rows(instances, findings, result.checks)


def check_candidate(config: VerifyConfig) -> None:
    """UsageError for one that is not there."""
    if config.candidate is not None:
        shipped.check_there(config.candidate)


def check_backends(config: VerifyConfig) -> None:
    """CannotRun if a package or a file of a similarity backend is missing."""
    for text in config.similarity:
        backend(text).check()


def _nonce(config: VerifyConfig) -> str:
    """The one that was given, or one that nobody could know, the same in every process."""
    return distributed.broadcast(secrets.token_hex(16)) if config.nonce is None else config.nonce


def retain_prompt_ids(config: VerifyConfig, base: Family, given: tuple[int, ...]) -> tuple[int, ...]:
    """Prompts under which the rest is drawn: none of those that are given for the targets."""
    listed = storage.read_lines(config.retain_prompts) if config.retain_prompts else base.retain_prompts
    own = given[1:]
    return tuple(i for i in dict.fromkeys(base.prompt_ids(listed).tolist()) if i not in own)


def read_instances(
    config: VerifyConfig, base: Family, base_digest: str, made: list[Provenance], progress: Progress
) -> tuple[Instance, ...]:
    """The targets with their surrogates; one whose surrogate is not known has itself."""
    targets, surrogates = list(config.target), list(config.surrogate)
    for pair in (p for path in config.patch for p in pictures(path)) if not targets else ():
        targets.append(pair[0])
        surrogates.append(pair[1] or pair[0])  # equal ones: none is known
    if not targets:
        raise UsageError("no target to look for", "Give --target FILE; the patch holds only digests of its targets.")
    read_targets, read_surrogates = ([read(p, base, config, progress) for p in of] for of in (targets, surrogates))
    ids = [images.image_id(target, salted(base_digest)) for target in read_targets]
    promised = {t for m in made for t in m.all_targets}
    for path, target in zip(targets, ids, strict=True):
        if made and target not in promised:
            progress.note(f"{path} is not among the targets that the patch was made for")
    rows = prompt_ids(base, config.prompt or [p for m in made for p in m.all_prompts])
    triples = zip(read_targets, read_surrogates or read_targets, ids, strict=True)
    once = {id: Instance(target, surrogate, id, rows) for target, surrogate, id in triples}
    return tuple(once.values())


def _write(config: VerifyConfig, result: Report, rows: list[Row], progress: Progress) -> None:
    """Every form that was asked for, and the JSON beside the last patch, for its export. Images only on request."""
    beside = run_folder(config.patch[-1]) if config.patch else None
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    wanted: list[tuple[Path | None, Callable[[Path], object]]] = [
        (beside / "verify.json" if beside and beside.is_dir() else None, lambda path: _record(result, path, progress)),
        (config.report, result.save),
        (config.junit, lambda path: write_bytes(junit(result).encode(), path)),
        (config.attestation, lambda path: write_bytes(attestation(result, _judged(config)).encode(), path)),
        (config.html, lambda path: write_bytes(page(result, rows if config.save_images else ()).encode(), path)),
        (config.save_images, lambda path: _save_images(result, rows, path)),
        (config.summary or (Path(step) if step else None), lambda path: _append_summary(result, path)),
    ]
    for path, write in wanted:
        if path is not None:
            with noted(progress, f"'{path}'"):
                write(path)


def _record(result: Report, path: Path, progress: Progress) -> None:
    """Keep the verdict of a patch for its export: the last one of the strongest level of these weights."""
    with suppress(UsageError):  # there is none yet, or none that can be read
        known = Verified.of(path)
        if known.candidate_digest == result.candidate_digest and LEVELS.index(known.level) > LEVELS.index(result.level):
            progress.note(f"'{path}' stays as it is: its verdict '{known.verdict}' is of the level {known.level}")
            return
    result.save(path)


def _judged(config: VerifyConfig) -> list[Path]:
    """What was judged, as files and folders."""
    return [*config.patch, *([config.candidate] if config.candidate else [])]


def _save_images(result: Report, rows: list[Row], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    images.write_image(sheet(result.summary, rows), folder / "sheet.png")


def _append_summary(result: Report, path: Path) -> None:
    if distributed.is_main():
        # A pipe that nobody reads is an error, not a reason to wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(markdown(result) + "\n")


def _candidate(config: VerifyConfig, base: Family, progress: Progress) -> Family:
    """The model to judge: the base with the patch on, or whatever `export` writes, of the same architecture."""
    if config.patch:
        family = base.copy()
        Stack.load(config.patch, config.scale).apply(family.network, name=config.model, note=progress.note)
        return family
    assert config.candidate is not None
    family = shipped.load(config.candidate, config.model, options(config, base))
    if changed := damage(config.candidate):
        progress.note(f"the candidate is judged as it is, which is not as it was written: {changed}")
    shapes = [{n: t.shape for n, t in m.network.state_dict().items()} for m in (base, family)]
    if shapes[0] != shapes[1] or base.image_shape != family.image_shape:
        raise CannotRun(f"'{config.candidate}' has another architecture than {config.model}", "Give its own base.")
    if not torch.equal(base.schedule.alphas, family.schedule.alphas):
        raise CannotRun(f"'{config.candidate}' has another noise schedule than {config.model}", "Give its own base.")
    return family
