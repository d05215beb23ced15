"""Run the probes on base and candidate, and say what they found."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from unforget.core import sampling
from unforget.core.passes import Count
from unforget.core.types import Progress
from unforget.verification.context import Finding, VerifyContext, known_surrogate
from unforget.verification.passes import CALIBRATING, passes
from unforget.verification.probes.base import Probe
from unforget.verification.report import Calibration, Report, Seen
from unforget.verification.verdict import Judgement


def compare(
    context: VerifyContext, suite: Sequence[Probe], *, known: Collection[str], promised: Sequence[str],
    progress: Progress, **record: Any,
) -> tuple[Report, list[Finding]]:  # fmt: skip
    """Judge a candidate; the report, and the findings with the images that it rests on.

    `known` are the targets whose surrogate is known, `promised` those that the candidate was made for, by id; `record`
    holds the fields of the report that are not found here.
    """
    policy, findings, seconds = context.policy, list[Finding](), dict[str, float]()
    planned = passes(suite, context)
    progress.note(f"{policy.level}: {', '.join(probe.kind for probe in suite)}; {_estimate(planned, context)}")
    progress.stage(CALIBRATING, planned[CALIBRATING].least)
    _ = context.detector  # draws
    for probe in suite:
        began = time.perf_counter()
        progress.stage(f"probe {probe.kind}", planned[probe.kind].least)
        findings += probe(context)
        seconds[probe.kind] = round(time.perf_counter() - began, 2)
    said = Judgement(findings, suite, policy, [i.id for i in context.instances], known, promised)
    report = Report(
        verdict=said.verdict, exit_code=said.exit_code, summary=said.summary, level=policy.level, targets=said.targets,
        checks=said.checks, robustness=said.robustness, calibrations=list(_calibrations(context)), allowed=said.allowed,
        findings=[Seen(**f.place, base=dict(f.base), candidate=dict(f.candidate)) for f in findings],
        backends=[b.name for b in context.backends], base_digest=context.base_digest,
        candidate_digest=context.candidate_digest, nonce=context.nonce, seconds=seconds, **record,
    )  # fmt: skip
    return report, findings


def _estimate(planned: Mapping[str, Count], context: VerifyContext) -> str:
    """What the probes will cost, from a few network passes."""
    count, looks = sum(planned.values(), Count()), context.plan.looks
    seconds = count.least * sampling.seconds_a_pass(context.base)
    half = f"{context.plan.mean_at_half:.0f} in the mean at half of --max-rate"
    draws = f"{context.plan.shortest} draws when none hits, {half}, {looks[-1].drawn} at most"
    return f"{draws}; {count} network passes, about {seconds:.0f} s at least, less what the cache holds"


def _calibrations(context: VerifyContext) -> Iterator[Calibration]:
    detector = context.detector
    for i in context.instances:
        limits = detector.limits(i.target, *known_surrogate(i))
        for backend, radius, (limit, capped) in zip(detector.backends, detector.radii, limits, strict=True):
            found = {"threshold": limit, "false_positive_rate": radius.false_positive_rate, "pairs": radius.pairs}
            yield Calibration(target=i.id, backend=backend.name, capped=capped, **found)
