"""`verify`: base and candidate side by side, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unforget import data, families, prepare, probes, report
from unforget.commands.common import load, options, read, versions, writable
from unforget.config import VerifyConfig
from unforget.domain import Family, Instance, Listener
from unforget.errors import CannotRun, UsageError
from unforget.patch import Patch, digest
from unforget.sheets import evidence_sheet

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
            writable(path, config.force)
    base = load(config)
    candidate = _candidate(config, base)
    instances, known = _read_instances(config, base, listener)
    keep = [read(p, base, config, listener) for p in config.keep]
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
        versions=versions(),
    )  # fmt: skip
    if config.report:
        result.save(config.report)
    if config.sheet:
        data.write_image(evidence_sheet(summary, instances, findings), config.sheet)
    return result


def _candidate(config: VerifyConfig, base: Family) -> Family:
    """The model to judge: the base with the patch on, or an exported checkpoint of the same architecture."""
    if config.patch is not None:
        family = base.copy()
        Patch.load(config.patch).apply(family.network, name=config.model)
        return family
    family = families.load(str(config.candidate), options(config, base))
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
    pictures = [read(p, base, config, listener) for p in targets]
    replaced = [read(p, base, config, listener) for p in surrogates]
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
