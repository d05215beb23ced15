"""Evidence: what base and candidate do from the same noise, one class a probe.

A probe answers with `Finding`s and judges nothing; `report` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from unforget.data import draw, random_noise, start_level
from unforget.domain import Family, Instance, Strategy
from unforget.metrics import lower_bound, pairwise_rms, rms, sharpness, shows, upper_bound


@dataclass
class Subject:
    """The two models under the same eyes.

    Attributes:
        base: The control.
        patched: The candidate.
        instances: What it must have forgotten; a surrogate equal to its target means none is known.
        keep: Pictures that must stay, (K, C, H, W); may be empty.
        near_copy: Largest RMS at which two pictures count as the same, in pixels of [-1, 1].
        steps: Sampler steps.
        seed: Added to every seed.
        stay: Rows of the prompts under which the rest must stay, taking turns, (P,).
    """

    base: Family
    patched: Family
    instances: tuple[Instance, ...]
    keep: Tensor
    near_copy: float
    steps: int = 25
    seed: int = 0
    advance: Callable[[int], object] = lambda n: None
    stay: tuple[int, ...] = (0,)
    _draws: dict[tuple[str, int, tuple[int, ...]], Tensor] = field(default_factory=dict)

    def draws(self, which: Literal["base", "patched"], count: int, rows: tuple[int, ...]) -> Tensor:
        """The first `count` samples of a model under prompts that take turns, (count, C, H, W), drawn once."""
        if (which, count, rows) not in self._draws:
            noise = random_noise(count, self.base.shape, self.seed, "sample")
            turns = torch.tensor(rows)[torch.arange(count) % len(rows)]
            self._draws[which, count, rows] = draw(
                getattr(self, which), noise, steps=self.steps, condition=turns, advance=self.advance
            )
        return self._draws[which, count, rows]

    def under(self, row: int) -> str:
        """How a probe's name says its prompt."""
        return f" '{self.base.prompts[row]}'" if row else ""

    def hits(self, images: Tensor, picture: Tensor) -> Tensor:
        """Which images are near-copies of a picture (C, H, W): (N,) of bool."""
        return pairwise_rms(images, picture[None])[:, 0] < self.near_copy


@dataclass(frozen=True)
class Finding:
    """What one probe saw of one target, or of the whole (target None).

    Attributes:
        probe: Its kind, with the noise level and the prompt where it has one.
        target: The target's id.
        base, patched: Figures by name, of the control and of the candidate.
        images: Pictures for a contact sheet, by model.
    """

    probe: str
    target: str | None
    base: dict[str, float]
    patched: dict[str, float]
    images: dict[str, Tensor] = field(default_factory=dict)


def level(finding: Finding) -> int:
    """The schedule row in the name of a reconstruction."""
    return int(finding.probe.split("@")[1].split(" ")[0])


def prompt(finding: Finding) -> str:
    """The quoted prompt in the name of a reconstruction; empty for the empty one."""
    return finding.probe.partition(" ")[2]


class Reconstruct(Strategy):
    """Noise the target to several levels, denoise, and see which picture comes back."""

    kind: Literal["reconstruct"] = "reconstruct"
    levels: tuple[int, ...] = Field((250, 400, 550), description="noise levels, timesteps of 1000")
    draws: int = Field(32, ge=1, le=4096, description="draws a level")
    steps: int = Field(20, ge=2, le=1000, description="steps of a whole sampling run")

    def work(self, subject: Subject) -> int:
        """Images it will denoise."""
        return 2 * sum(len(i.conditions) for i in subject.instances) * len(self.levels) * self.draws

    def __call__(self, subject: Subject) -> list[Finding]:
        cases = [(i, row, level) for i in subject.instances for row in i.conditions for level in self.levels]
        return [self._look(subject, *case) for case in cases]

    def _look(self, subject: Subject, instance: Instance, row: int, level: int) -> Finding:
        start = start_level(subject.base, level / 1000, steps=self.steps)
        noise = random_noise(self.draws, subject.base.shape, subject.seed, f"reconstruct {level}")
        x_0 = subject.base.encode(instance.target[None]).expand_as(noise)
        x_t = subject.base.schedule.add_noise(x_0, noise, torch.full((self.draws,), start))
        images = {
            which: draw(
                getattr(subject, which), x_t, steps=self.steps, start=start, condition=torch.tensor([row]),
                advance=subject.advance,
            )
            for which in ("base", "patched")
        }  # fmt: skip
        scores = {which: self._scores(subject, instance, i) for which, i in images.items()}
        name = f"reconstruct@{start}{subject.under(row)}"
        return Finding(name, instance.id, scores["base"], scores["patched"], images)

    @staticmethod
    def _scores(subject: Subject, instance: Instance, images: Tensor) -> dict[str, float]:
        to_target, to_surrogate = rms(images, instance.target), rms(images, instance.surrogate)
        return {
            "to_target": float(to_target.mean()),
            "to_surrogate": float(to_surrogate.mean()),
            "nearer_surrogate": float((to_surrogate < to_target).float().mean()),
            "near_copies": float((to_target < subject.near_copy).float().mean()),
        }


class Sample(Strategy):
    """Draw N images and count near-copies of each target, with exact bounds of the rate."""

    kind: Literal["sample"] = "sample"
    count: int = Field(256, ge=1, le=1_000_000, description="images to draw from each model")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the one-sided bounds")

    def work(self, subject: Subject) -> int:
        """Images it will denoise."""
        return 2 * self.count * len({row for i in subject.instances for row in i.conditions})

    def __call__(self, subject: Subject) -> list[Finding]:
        sought: list[tuple[str, str | None, Tensor, Tensor, tuple[int, ...]]] = [
            # Under a prompt the target counts in any place and size: that is how prompted models repeat it.
            (self.kind + subject.under(row), i.id, i.target, i.surrogate if row else i.target, (row,))
            for i in subject.instances
            for row in i.conditions
        ]
        sought += [(f"keep-{k}", None, picture, picture, subject.stay) for k, picture in enumerate(subject.keep)]
        return [
            Finding(name, target, *self._counts(subject, picture, instead, rows))
            for name, target, picture, instead, rows in sought
        ]

    def _counts(
        self, subject: Subject, picture: Tensor, instead: Tensor, rows: tuple[int, ...]
    ) -> tuple[dict[str, float], dict[str, float]]:
        base, patched = subject.draws("base", self.count, rows), subject.draws("patched", self.count, rows)
        return self._rate(subject, base, picture, instead), self._rate(subject, patched, picture, instead)

    def _rate(self, subject: Subject, images: Tensor, picture: Tensor, instead: Tensor) -> dict[str, float]:
        hits = int((subject.hits(images, picture) | shows(images, picture, instead)).sum())
        return {
            "hits": hits,
            "drawn": self.count,
            "rate_low": lower_bound(hits, self.count, self.confidence),
            "rate_high": upper_bound(hits, self.count, self.confidence),
        }


class Retain(Strategy):
    """The same seeds through both models: how far the rest has moved, on the whole and beside each target."""

    kind: Literal["retain"] = "retain"
    count: int = Field(256, ge=1, le=1_000_000, description="seeds; shared with the sample probe")
    neighbours: int = Field(16, ge=1, description="base draws nearest to a target that count as its look-alikes")

    def work(self, subject: Subject) -> int:
        """Images it will denoise beside those of the sample probe."""
        return 0 if subject.stay == (0,) else 2 * self.count

    def __call__(self, subject: Subject) -> list[Finding]:
        base, patched = (
            subject.draws("base", self.count, subject.stay), subject.draws("patched", self.count, subject.stay)
        )  # fmt: skip
        drift = rms(base, patched)
        sharp = float(sharpness(patched).mean() / sharpness(base).mean().clamp(min=1e-9))
        pairs = {"base": base[:8], "patched": patched[:8]}
        found = [Finding("retain", None, {"sharpness": 1.0}, {**_spread(drift), "sharpness": sharp}, pairs)]
        for instance in subject.instances:
            distance = pairwise_rms(base, instance.target[None])[:, 0]
            distance[distance < subject.near_copy] = torch.inf
            near = distance.argsort(stable=True)[: self.neighbours]
            images = {"base": base[near[:8]], "patched": patched[near[:8]]}
            kept = float((drift[near] < subject.near_copy).float().mean())
            within = {"to_target": float(distance[near].mean())}
            found.append(Finding("look-alikes", instance.id, within, {**_spread(drift[near]), "kept": kept}, images))
        return found


def _spread(drift: Tensor) -> dict[str, float]:
    drift = drift.double()
    return {"median": float(drift.quantile(0.5)), "mean": float(drift.mean()), "p90": float(drift.quantile(0.9))}


Probe = Reconstruct | Sample | Retain


def collect(probes: tuple[Probe, ...], subject: Subject, stage: Callable[[str, int], Any]) -> list[Finding]:
    """Run the probes one after another."""
    found = []
    for probe in probes:
        stage(f"probe {probe.kind}", probe.work(subject))
        found += probe(subject)
    return found
