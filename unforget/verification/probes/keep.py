"""Probes of everything else: is it still there, and does the fix survive what is done to weights before release?"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unforget.core.metrics import kernel_distance, pairwise_rms, rms, sharpness
from unforget.core.types import Family, Instance, Strategy
from unforget.verification.context import Finding, Subject, Which
from unforget.verification.probes.look import BOTH, cases, others, returned

SPLITS = 200
"""Random halves of the base's draws that say which kernel distance chance alone makes."""


class Retention(Strategy):
    """The same seeds through both models: how far the rest has moved, on the whole and beside each target.

    Drift is in units of the median distance between two different draws of the base: 0 for the same picture, 1 for
    another one. The kernel distance (KID with the first similarity backend as its extractor, arXiv:1801.01401) compares
    draws from different seeds, so that it sees what the pairs cannot: that a model draws other things less often.
    """

    kind: Literal["retention"] = "retention"
    neighbours: int = Field(48, ge=1, description="draws beside each target")
    timestep: int = Field(700, gt=0, lt=1000, description="timestep that they start from")

    def cost(self, subject: Subject) -> int:
        """Network calls beside those of the sample probe."""
        beside = 2 * self.neighbours * subject.calls(subject.start(self.timestep)) * len(subject.instances)
        return beside + (0 if subject.stay == (0,) else 2 * subject.paired * subject.calls())

    def __call__(self, subject: Subject) -> list[Finding]:
        drawn = {which: subject.draws(which, subject.stay, subject.paired) for which in BOTH}
        base, patched = drawn["base"].images, drawn["patched"].images
        apart = pairwise_rms(base, base)
        typical = float(apart[torch.triu(torch.ones_like(apart, dtype=torch.bool), 1)].median())
        drift = rms(base, patched) / typical
        shown: dict[Which, Tensor] = {"base": base[:8], "patched": patched[:8]}
        sharp = float(sharpness(patched).mean() / sharpness(base).mean().clamp(min=1e-9))
        half = subject.paired // 2
        features = {which: d.embeds[0] for which, d in drawn.items()}
        kid = kernel_distance(features["base"][:half], features["patched"][half:])
        same = _kept(drift)
        figures = {**_spread(drift), "typical": typical, "kept": same, "sharpness": sharp, "kid": kid}
        usual = {"sharpness": 1.0, "kid": _chance(features["base"])}
        found = [Finding(self.kind, None, usual, figures, images=shown)]
        return found + [f for i in subject.instances for f in self._look_alikes(subject, i, typical, same)]

    def _look_alikes(self, subject: Subject, instance: Instance, typical: float, same: float) -> list[Finding]:
        """What the base makes of the heavily noised target that is neither the target nor its surrogate.

        Few of a model's draws are like one target. From here many are, and each is to stay what it is.
        """
        start = subject.start(self.timestep)
        x_t = subject.noised(instance.target[None], subject.noise("look-alikes", self.neighbours), start)
        turns = torch.tensor(subject.stay)[torch.arange(self.neighbours) % len(subject.stay)]
        base, patched = (subject.run(which, x_t, turns, start=start) for which in BOTH)
        drawn = subject.eye.look(base)
        gone = torch.stack([subject.eye.sees(drawn, p) for p in (instance.target, *others(instance))]).any(0)
        base, patched = base[~gone], patched[~gone]
        if not len(base):
            return []
        drift = rms(base, patched) / typical
        shown: dict[Which, Tensor] = {"base": base[:8], "patched": patched[:8]}
        moved = {**_spread(drift), "kept": _kept(drift), "seen": float(len(base))}
        return [Finding("neighbours", instance.id, {"kept": same}, moved, start, images=shown)]


SAME = 0.25
"""Drift, in distances between different draws, under which a pair is still one picture."""


def _kept(drift: Tensor) -> float:
    return float((drift < SAME).float().mean())


def _spread(drift: Tensor) -> dict[str, float]:
    drift = drift.double()
    return {"median": float(drift.quantile(0.5)), "mean": float(drift.mean()), "p90": float(drift.quantile(0.9))}


def _chance(features: Tensor) -> float:
    """Largest kernel distance between random halves of one model's draws."""
    generator = torch.Generator().manual_seed(0)
    half, worst = len(features) // 2, 0.0
    for _ in range(SPLITS):
        order = torch.randperm(len(features), generator=generator)
        worst = max(worst, kernel_distance(features[order[:half]], features[order[half:]]))
    return worst


Kind = Literal["fp16", "bf16", "int8"]
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def rounded(weight: Tensor, kind: Kind) -> Tensor:
    """A weight through another precision and back; int8 is symmetric, with a scale for each output channel."""
    if kind != "int8":
        return weight.to(FLOATS[kind]).to(weight.dtype)
    if weight.ndim < 2:
        return weight
    scale = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(-127, 127) * scale


def cast(family: Family, kind: Kind) -> Family:
    """A copy of a model with its weights rounded."""
    twin = family.copy()
    state = {n: rounded(w, kind) if w.is_floating_point() else w for n, w in twin.network.state_dict().items()}
    twin.network.load_state_dict(state)
    return twin


class Quantization(Strategy):
    """The candidate's weights rounded to what releases come in: small changes vanish there, and the target is back."""

    kind: Literal["quantization"] = "quantization"
    kinds: tuple[Kind, ...] = ("fp16", "bf16", "int8")
    timesteps: tuple[int, ...] = Field((250, 400), description="timesteps to noise it to")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions a timestep")

    def cost(self, subject: Subject) -> int:
        """Network calls."""
        calls = sum(subject.calls(subject.start(timestep)) for timestep in self.timesteps)
        return calls * self.draws * (len(self.kinds) + 1) * len(list(cases(subject)))

    def __call__(self, subject: Subject) -> list[Finding]:
        whole, found = subject.patched, []
        before = self._figures(subject)
        for kind in self.kinds:
            subject.patched = cast(whole, kind)
            try:
                after = self._figures(subject)
            finally:
                subject.patched = whole
            for place, figures in after.items():
                target, row, timestep = place
                found.append(
                    Finding(
                        self.kind, target, before[place], figures, subject.start(timestep), subject.under(row), kind
                    )
                )
        return found

    def _figures(self, subject: Subject) -> dict[tuple[str, int, int], dict[str, float]]:
        found = {}
        for instance, row in cases(subject):
            for timestep in self.timesteps:
                start, floor = subject.start(timestep), subject.floor(timestep, row)
                x_t = subject.noised(instance.target[None], subject.noise("cast", self.draws, fresh=True), start)
                images = subject.run("patched", x_t, torch.tensor([row]), start=start)
                found[instance.id, row, timestep] = returned(subject, instance, images, floor)
        return found
