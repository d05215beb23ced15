"""Evidence: what base and candidate do from the same noise, one class a probe.

A probe answers with `Finding`s and judges nothing; `judge` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from unforget.verify.context import Finding, Subject
from unforget.verify.near_copies import Drawn, Eye, Radius, calibrate
from unforget.verify.probes.attack import Revive, Seek
from unforget.verify.probes.keep import Cast, Retain
from unforget.verify.probes.look import Complete, Reconstruct, Replay, Reword, Sample, Transforms

__all__ = [
    "LEVELS", "Cast", "Complete", "Drawn", "Eye", "Finding", "Probe", "Radius", "Reconstruct", "Replay", "Retain",
    "Revive", "Reword", "Sample", "Seek", "Subject", "Transforms", "calibrate", "collect",
]  # fmt: skip

Probe = Reconstruct | Sample | Replay | Complete | Transforms | Reword | Retain | Cast | Seek | Revive
QUICK = ("reconstruct", "sample", "replay", "retain")
STANDARD = (*QUICK, "complete", "transforms", "reword", "cast")
LEVELS = {"quick": QUICK, "standard": STANDARD, "deep": (*STANDARD, "seek", "revive")}
"""Probes by level, in the order they run."""


def collect(
    probes: Sequence[Probe], subject: Subject, stage: Callable[[str, int], Any]
) -> tuple[list[Finding], dict[str, float]]:
    """Run the probes one after another; what they found, and the seconds that each took."""
    found: list[Finding] = []
    seconds: dict[str, float] = {}
    for probe in probes:
        began = time.perf_counter()
        stage(f"probe {probe.kind}", probe.cost(subject))
        found += probe(subject)
        seconds[probe.kind] = round(time.perf_counter() - began, 2)
    return found, seconds
