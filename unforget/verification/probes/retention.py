from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from unforget.config import Policy
from unforget.core.metrics import kernel_distance, median_bounds, pairwise_rms, ratio_bounds, rms
from unforget.core.passes import Count
from unforget.verification.context import ROLES, Drawn, Finding, VerifyContext
from unforget.verification.near_copies import once
from unforget.verification.probes.base import ENDS, Probe, checked
from unforget.verification.report import Check

SPLITS = 200
"""Random halves of the base's draws that say which kernel distance chance alone makes."""
SAME = 0.25
"""Drift, in distances between different draws, under which a pair is still one image."""
SHARPNESS = (0.8, 1.25)
"""Sharpness of the candidate's draws as a share of the base's: outside, they are blurred or noisy."""


class Retention(Probe):
    """The same seeds through both models: how far the rest has moved.

    Drift is in median distances between two draws of the base. The kernel distance (KID on the first similarity
    backend, arXiv:1801.01401) compares draws from different seeds: it sees a model that draws other things less often.
    """

    kind: ClassVar = "retention"
    retains: ClassVar = True

    def shared(self, context: VerifyContext) -> Iterator[tuple[Drawn, Count]]:
        yield ("candidate", context.retain_prompt_ids), Count.of(context.policy.paired)

    def __call__(self, context: VerifyContext) -> list[Finding]:
        drift, typical = same_seed_drift(context)
        drawn = {role: context.retained(role) for role in ROLES}
        features, candidate = (drawn[role].embeddings[0] for role in ROLES)
        sharp, sharp_base = (drawn[role].sharpness for role in ("candidate", "base"))
        confidence = context.policy.confidence
        bounds = {"median": median_bounds(drift, confidence), "sharpness": ratio_bounds(sharp, sharp_base, confidence)}
        kid = kernel_distance(features[: len(features) // 2], candidate[len(features) // 2 :])
        sharper = float(sharp.mean() / sharp_base.mean().clamp(min=1e-9))
        figures = {**spread(drift), "typical": typical, "sharpness": sharper, "kid": kid}
        figures |= {f"{name}_{end}": b for name, both in bounds.items() for end, b in zip(ENDS, both, strict=True)}
        usual = {"sharpness": 1.0, "kid": _chance(features)}
        images = {role: context.pictures(role, slice(8)) for role in ROLES}
        return [Finding(self.kind, None, usual, figures, images=images)]

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        yield checked(found, "median", "at most", policy.max_drift, policy, bounded=True)
        yield checked(found, "sharpness", "at least", SHARPNESS[0], policy, bounded=True)
        yield checked(found, "sharpness", "at most", SHARPNESS[1], policy, bounded=True)
        yield checked(found, "kid", "at most", found.base["kid"], policy)


def same_seed_drift(context: VerifyContext) -> tuple[Tensor, float]:
    """Drift of every same-seed pair, (paired,), and the median distance between draws that is its unit."""
    base, candidate = (context.retained(role).images for role in ROLES)
    apart = pairwise_rms(base, base)
    typical = float(apart[once(apart)].median())
    return rms(base, candidate) / typical, typical


def spread(drift: Tensor) -> dict[str, float]:
    """Median, mean and 90 % of drifts (N,), and the share that is still one image."""
    exact, kept = drift.double(), (drift < SAME).float().mean()
    figures = {"median": exact.quantile(0.5), "mean": exact.mean(), "p90": exact.quantile(0.9), "kept": kept}
    return {name: float(value) for name, value in figures.items()}


def _chance(features: Tensor) -> float:
    """Largest kernel distance between random halves of one model's draws."""
    generator = torch.Generator().manual_seed(0)
    half, worst = len(features) // 2, 0.0
    for _ in range(SPLITS):
        order = torch.randperm(len(features), generator=generator)
        worst = max(worst, kernel_distance(features[order[:half]], features[order[half:]]))
    return worst
