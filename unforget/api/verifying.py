"""`verify`: base and candidate side by side, and a verdict."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from unforget import families
from unforget.api.common import load, options, read, salted, versions, writable
from unforget.config import Policy, VerifyConfig
from unforget.core import distributed, sampling
from unforget.core.types import Family, Instance, Progress
from unforget.errors import CannotRun, UsageError
from unforget.files import images, storage
from unforget.files.patch import Stack, provenance
from unforget.files.storage import digest, write_bytes
from unforget.reports.contact_sheet import Row, evidence_rows, sheet
from unforget.reports.html import page
from unforget.reports.junit import junit
from unforget.reports.markdown import markdown
from unforget.unlearning import prepare
from unforget.verification import probes, verdict
from unforget.verification.report import Calibration, Report, Seen
from unforget.verification.similarity import Backend, backend

PRIVATE = {"target", "surrogate", "must_retain", "prompt", "retain_prompts", "allow", "similarity"}
"""Settings that name files, prompts or targets: they stay out of the report."""


def verify(config: VerifyConfig, progress: Progress | None = None) -> Report:
    """Put base and candidate side by side and judge: is every target gone, is the rest still there?"""
    progress = progress or Progress()
    for path in (config.report, config.junit, config.html, config.save_images):
        if path is not None:
            writable(path, config.force)
    if config.summary and not config.summary.parent.is_dir():
        raise UsageError(f"there is no folder '{config.summary.parent}'", "Make it first.")
    base = load(config)
    result, rows = compare(config, base, _candidate(config, base), progress)
    _write(config, result, rows)
    return result


def compare(
    config: VerifyConfig, base: Family, candidate: Family, progress: Progress | None = None
) -> tuple[Report, list[Row]]:
    """Judge a candidate that is loaded already, whatever it is made of.

    Returns:
        The report, and the pictures that it rests on, for a sheet or a page.
    """
    progress = progress or Progress()
    backends = tuple(backend(text) for text in config.similarity)
    for one in backends:
        one.check()
    subject, known = _subject(config, base, candidate, backends, progress)
    suite = probes_of(config)
    if len(subject.instances[0].prompt_ids) == 1:  # no prompt to put in other words
        if "paraphrase" in config.require:
            raise UsageError("the policy requires the probe reword, and there is no prompt", "Give --prompt.")
        suite = tuple(p for p in suite if p.kind != "paraphrase")
    progress.note(_estimate(suite, subject, config.level))
    findings, seconds = probes.collect(suite, subject, progress.stage)
    ids = [i.id for i in subject.instances]
    allowed = verdict.allowances(config, ids, datetime.datetime.now(datetime.UTC).date())
    found = verdict.checks(findings, config, known)
    judged = verdict.targets(found, findings, allowed) + verdict.unjudged(_made_for(config), ids, allowed)
    outcome, code, summary = verdict.verdict(judged, found, allowed)
    result = Report(
        verdict=outcome, exit_code=code, summary=summary, level=config.level, targets=judged, checks=found,
        robustness=verdict.robustness(findings), calibrations=_calibrations(subject), allowed=allowed,
        findings=[_seen(f) for f in findings],
        settings=config.model_dump(mode="json", include=set(Policy.model_fields) - PRIVATE),
        backends=[b.name for b in backends], base_digest=digest(base.network.state_dict()),
        candidate_digest=digest(candidate.network.state_dict()), versions=versions(), seconds=seconds,
    ).rounded()  # fmt: skip
    return result, evidence_rows(subject.instances, findings)


def probes_of(config: VerifyConfig) -> tuple[probes.Probe, ...]:
    """The probes of a configuration, in order."""
    made: dict[str, probes.Probe] = {
        "reconstruct": probes.Reconstruct(timesteps=config.timestep, draws=config.draws),
        "sample": probes.Sample(),
        "retention": probes.Retention(neighbours=min(48, config.paired // 2)),
        "partial_denoise": probes.PartialDenoise(),
        "transforms": probes.Transforms(),
        "paraphrase": probes.Paraphrase(),
        "quantization": probes.Quantization(),
        "noise_search": probes.NoiseSearch(),
        "relearning": probes.Relearning(),
    }
    if config.replay_seed is not None:
        made["replay"] = probes.Replay(
            seed=config.replay_seed, steps=config.replay_steps, scheduler=config.replay_scheduler
        )
    wanted = {*probes.LEVELS[config.level], *config.require}
    return tuple(made[kind] for kind in probes.KINDS if kind in made and kind in wanted)


def _subject(
    config: VerifyConfig, base: Family, candidate: Family, backends: tuple[Backend, ...], progress: Progress
) -> tuple[probes.Subject, list[str]]:
    """Everything that probes share, and the ids of the targets whose surrogate is known."""
    base_digest = digest(base.network.state_dict())
    instances, known = _read_instances(config, base, base_digest, progress)
    keep = [read(p, base, config, progress) for p in config.must_retain]
    listed = storage.read_lines(config.retain_prompts) if config.retain_prompts else base.retain_prompts
    gone = set(instances[0].prompt_ids[1:])
    stay = tuple(r for r in dict.fromkeys(base.prompt_ids(listed).tolist()) if r not in gone)
    candidate.prompt_ids(base.prompts)  # the same rows in both tables
    subject = probes.Subject(
        base, candidate, instances, torch.stack(keep) if keep else torch.empty(0, *base.image_shape),
        backends=backends, false_positive_rate=config.false_positive_rate, max_rate=config.max_rate,
        confidence=config.confidence, most=config.samples, paired=config.paired, controls=config.controls,
        steps=config.sampler_steps, seed=config.seed, fresh=digest(candidate.network.state_dict()), stay=stay,
        # Pictures to look at are not stored with the figures.
        cache=base_digest if config.cache and not config.save_images else "", advance=progress.advance,
    )  # fmt: skip
    return subject, [i.id for i in instances] if known else []


def _estimate(suite: Sequence[probes.Probe], subject: probes.Subject, level: str) -> str:
    """What the probes will cost, from a few network calls."""
    calls = sum(p.cost(subject) for p in suite)
    size = min(32, sampling.in_one_pass(sampling.PIXELS_DRAWN, subject.base.image_shape))
    noise, rows = torch.zeros(size, *subject.base.latent_shape), torch.zeros(size, dtype=torch.long)
    timestep = torch.full((size,), subject.start(500))
    with torch.no_grad():
        subject.base.predict(noise, timestep, rows)
        began = time.perf_counter()
        subject.base.predict(noise, timestep, rows)
    seconds = calls / size * (time.perf_counter() - began)
    most = subject.plan.looks[-1].drawn
    return (
        f"{level}: {', '.join(p.kind for p in suite)}; {subject.plan.shortest} draws when none hits, {most} at most; "
        f"{calls:,} network calls a picture, about {seconds:.0f} s less what the cache holds"
    )


def _calibrations(subject: probes.Subject) -> list[Calibration]:
    others = {i.id: [] if torch.equal(i.target, i.surrogate) else [i.surrogate] for i in subject.instances}
    return [
        Calibration(
            target=i.id, backend=backend.name, threshold=limit, false_positive_rate=radius.false_positive_rate,
            pairs=radius.pairs,
            capped=capped,
        )
        for i in subject.instances
        for backend, radius, (limit, capped) in zip(
            subject.backends, subject.eye.radii, subject.eye.limits(i.target, *others[i.id]), strict=True
        )
    ]  # fmt: skip


def _seen(f: probes.Finding) -> Seen:
    return Seen(
        probe=f.probe, target=f.target, timestep=f.timestep, prompt=f.prompt, variant=f.variant, base=dict(f.base),
        candidate=dict(f.patched),
    )  # fmt: skip


def _write(config: VerifyConfig, result: Report, rows: list[Row]) -> None:
    """Every form that was asked for, and the JSON beside the last patch, for its export. Pictures only on request."""
    beside = config.patch[-1].with_suffix(".run") if config.patch else None
    if beside is not None and beside.is_dir():
        result.save(beside / "verify.json")
    if config.report:
        result.save(config.report)
    if config.junit:
        write_bytes(junit(result).encode(), config.junit)
    if config.html:
        write_bytes(page(result, rows if config.save_images else ()).encode(), config.html)
    if config.save_images:
        config.save_images.mkdir(exist_ok=True)
        images.write_image(sheet(result.summary, rows), config.save_images / "sheet.png")
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    summary = config.summary or (Path(step) if step else None)
    if summary and distributed.is_main():
        try:
            with summary.open("a", encoding="utf-8") as file:
                file.write(markdown(result) + "\n")
        except OSError as error:
            raise CannotRun(f"cannot write the summary '{summary}': {error.strerror}", "Give --summary FILE.") from None


def _candidate(config: VerifyConfig, base: Family) -> Family:
    """The model to judge: the base with the patch on, or an exported checkpoint of the same architecture."""
    if config.patch:
        family = base.copy()
        Stack.load(config.patch, config.scale).apply(family.network, name=config.model)
        return family
    family = families.load(str(config.candidate), options(config, base))
    shapes = [{n: t.shape for n, t in m.network.state_dict().items()} for m in (base, family)]
    if shapes[0] != shapes[1] or base.image_shape != family.image_shape:
        raise CannotRun(f"'{config.candidate}' has another architecture than {config.model}", "Give its own base.")
    if not torch.equal(base.schedule.alphas, family.schedule.alphas):
        raise CannotRun(f"'{config.candidate}' has another noise schedule than {config.model}", "Give its own base.")
    return family


def _read_instances(
    config: VerifyConfig, base: Family, base_digest: str, progress: Progress
) -> tuple[tuple[Instance, ...], bool]:
    """The targets with their surrogates, and whether those are known."""
    targets, surrogates = list(config.target), list(config.surrogate)
    for path in config.patch if not targets else ():
        beside = path.with_suffix(".run")
        targets += sorted(beside.glob("target-*.png"))
        surrogates += sorted(beside.glob("surrogate-*.png"))
    if not targets:
        raise UsageError("no target to look for", "Give --target FILE; the patch holds only digests of its targets.")
    pictures = [read(p, base, config, progress) for p in targets]
    replaced = [read(p, base, config, progress) for p in surrogates]
    ids = [images.image_id(p, salted(base_digest)) for p in pictures]
    made = [provenance(path) for path in config.patch]
    promised = {t for m in made for t in m.all_targets}
    for path, target in zip(targets, ids, strict=True):
        if made and target not in promised:
            progress.note(f"{path} is not among the targets that the patch was made for")
    rows = prepare.prompt_ids(base, config.prompt or [p for m in made for p in m.all_prompts])
    triples = zip(pictures, replaced or pictures, ids, strict=True)
    once = {id: Instance(t, s, id, rows) for t, s, id in triples}
    return tuple(once.values()), bool(replaced)


def _made_for(config: VerifyConfig) -> list[str]:
    """Ids of all targets that the patches name, those of the ledger first."""
    return list(dict.fromkeys(t for path in config.patch for t in provenance(path).all_targets))
