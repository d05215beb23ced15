"""Evidence: what base and candidate do from the same noise, one class a probe.

A probe answers with `Finding`s and judges nothing; `judge` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unforget.verification.context import Finding, Subject
    from unforget.verification.near_copies import Drawn, Eye, Radius, calibrate
    from unforget.verification.probes.attack import NoiseSearch, Relearning
    from unforget.verification.probes.keep import Quantization, Retention
    from unforget.verification.probes.look import Paraphrase, PartialDenoise, Reconstruct, Replay, Sample, Transforms

    Probe = (
        Reconstruct
        | Sample
        | Replay
        | PartialDenoise
        | Transforms
        | Paraphrase
        | Retention
        | Quantization
        | NoiseSearch
        | Relearning
    )
__all__ = [
    "LEVELS", "Quantization", "PartialDenoise", "Drawn", "Eye", "Finding", "Probe", "Radius", "Reconstruct", "Replay",
    "Retention",
    "Relearning", "Paraphrase", "Sample", "NoiseSearch", "Subject", "Transforms", "calibrate", "collect",
]  # fmt: skip
QUICK = ("reconstruct", "sample", "replay", "retention")
STANDARD = (*QUICK, "partial_denoise", "transforms", "paraphrase", "quantization")
LEVELS = {"quick": QUICK, "standard": STANDARD, "deep": (*STANDARD, "noise_search", "relearning")}
"""Probes by level, in the order they run."""
KINDS = LEVELS["deep"]


def __getattr__(name: str) -> Any:
    for home in (
        () if name.startswith("_") else ("context", "near_copies", "probes.attack", "probes.keep", "probes.look")
    ):
        module = import_module(f"unforget.verification.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(name)


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
