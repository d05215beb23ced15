"""The two models under the same eyes, and what a probe found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from unforget.core import sampling
from unforget.core.types import Family, Instance
from unforget.files import cache, images
from unforget.verification.near_copies import Drawn, Eye
from unforget.verification.sequential import Decision, Plan, plan
from unforget.verification.similarity import Backend, Pixels, Structure

Which = Literal["base", "patched"]
CONTROL_LEVEL = 0.05
"""A target is recalled if it comes back nearer than this share of pictures that the model need not have seen."""


@dataclass(frozen=True)
class Finding:
    """What one probe saw of one target, or of the whole (target None).

    Attributes:
        probe: Its kind.
        target: The target's id.
        base, patched: Figures by name, of the control and of the candidate.
        timestep: Noise level, as diffusers counts.
        prompt: Empty for the empty one.
        variant: What else tells two uses of a probe apart.
        decision: Where a rate was tested.
        images: Pictures for a contact sheet, by model.
    """

    probe: str
    target: str | None
    base: Mapping[str, float]
    patched: Mapping[str, float]
    timestep: float | None = None
    prompt: str = ""
    variant: str = ""
    decision: Decision | None = None
    images: Mapping[Which, Tensor] = field(default_factory=dict)


@dataclass
class Subject:
    """Base and candidate, what to look for, and every draw that more than one probe uses.

    Attributes:
        base: The control.
        patched: The candidate.
        instances: What it must have forgotten; a surrogate equal to its target means none is known.
        keep: Pictures that must stay, (K, C, H, W); may be empty.
        backends: What sees near-copies.
        false_positive_rate: Share of pairs of different pictures that may count as near-copies.
        max_rate, confidence: Of the test of a rate.
        most: Draws after which a test stops undecided; None for as many as it takes.
        paired: Same-seed pairs of draws.
        controls: Pictures that show what a model returns of what it never saw.
        steps: Sampler steps of a whole run.
        seed: Added to every seed.
        fresh: What half of the candidate's noise depends on, beside the seed: nobody can have trained for it.
        stay: Rows of the prompts under which the rest must stay, taking turns, (P,).
        cache: Digest of the base where what it does may be read from and written to the cache.
        advance: Told how many network calls a picture are done.
    """

    base: Family
    patched: Family
    instances: tuple[Instance, ...]
    keep: Tensor
    backends: tuple[Backend, ...] = (Pixels(), Structure())
    false_positive_rate: float = 1e-4
    max_rate: float = 0.005
    confidence: float = 0.95
    most: int | None = None
    paired: int = 256
    controls: int = 48
    steps: int = 20
    seed: int = 0
    fresh: str = ""
    stay: tuple[int, ...] = (0,)
    cache: str = ""
    advance: Callable[[int], object] = lambda n: None
    _draws: dict[tuple[Which, tuple[int, ...]], Drawn] = field(default_factory=dict)
    _figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def eye(self) -> Eye:
        """Calibrated on what the base draws where the rest must stay."""
        return Eye(self.backends, self._images("base", self.stay, 0, self.paired), self.false_positive_rate)

    @cached_property
    def plan(self) -> Plan:
        """The test of a rate."""
        return plan(self.max_rate, self.confidence)

    def draws(self, which: Which, rows: tuple[int, ...], count: int) -> Drawn:
        """The first `count` samples of a model under prompts that take turns, each drawn once.

        The first `paired` start from noise that both models share; what the candidate draws beyond, from its own.
        """
        have = self._draws.get((which, rows))
        if have is None or len(have) < count:
            more = self.eye.look(self._images(which, rows, 0 if have is None else len(have), count))
            have = self._draws[which, rows] = more if have is None else have + more
        return have[:count]

    def _images(self, which: Which, rows: tuple[int, ...], first: int, count: int) -> Tensor:
        if which == "base" and (which, rows) in self._draws:
            return self._draws[which, rows].images[first:count]
        shared = max(0, min(self.paired, count) - first)
        noise = torch.cat([
            self.noise("sample", shared, first=first),
            self.noise("sample", count - first - shared, first=first + shared, fresh=True),
        ])  # fmt: skip
        turns = torch.tensor(rows)[torch.arange(first, count) % len(rows)]
        prompts = [self.base.prompts[r] for r in turns.tolist()]
        if which == "base" and self.cache:
            key = ["draws", self.cache, self.seed, self.steps, prompts, self.base.image_shape, self.base.guidance]
            return cache.cached(key, lambda: self.run(which, noise, turns))
        return self.run(which, noise, turns)

    def noise(self, purpose: str, count: int, *, first: int = 0, fresh: bool = False) -> Tensor:
        """Noise that both models start from, or, `fresh`, that depends on the candidate's weights."""
        purpose = f"{purpose} {self.fresh}" if fresh else purpose
        return sampling.random_noise(count, self.base.latent_shape, self.seed, purpose, first=first)

    def run(self, which: Which, x_t: Tensor, rows: Tensor, *, start: float | None = None) -> Tensor:
        """Pictures that a model makes from noise, or from noised pictures at a timestep, rounded to 8 bits."""
        calls = self.calls(start)
        return images.eight_bit(
            sampling.draw(
                getattr(self, which), x_t, steps=self.steps, start=start, prompt_ids=rows,
                advance=lambda n: self.advance(n * calls),
            )
        )  # fmt: skip

    def calls(self, start: float | None = None) -> int:
        """Network calls that a picture takes from a timestep on."""
        return len([t for t in self.base.sampling_timesteps(self.steps) if start is None or t <= start])

    def start(self, timestep: float) -> float:
        """The timestep nearest to the given one that sampling visits."""
        return sampling.visited(self.base, timestep, steps=self.steps)

    def noised(self, pictures: Tensor, noise: Tensor, start: float) -> Tensor:
        """Pictures (N or 1, C, H, W) noised to a timestep, (N, ...)."""
        return sampling.add_noise(self.base, pictures, noise, start)

    def under(self, row: int) -> str:
        """The prompt of a row."""
        return self.base.prompts[row]

    def control(self, key: list[object], make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures of the base, from the cache if they were asked for before. Figures only: no picture is stored."""
        asked = ["control", self.cache, self.seed, self.steps, self.base.image_shape, self.base.guidance, *key]
        known = json.dumps(asked)
        if known not in self._figures:
            self._figures[known] = cache.cached_figures(asked, make) if self.cache else make()
        return self._figures[known]

    def floor(self, timestep: float, row: int) -> float:
        """Distance that pictures which the model need not have seen stay above when noised to a timestep and denoised.

        Little noise hides little: any model returns any picture from there, more or less. What it draws once comes back
        so near in one case of twenty; what it repeats, it may have memorised, and is left out.
        """

        def make() -> dict[str, float]:
            shown = self.draws("base", self.stay, self.paired)
            known = torch.stack([self.eye.sees(shown, i.target) for i in self.instances]).any(0)
            pictures = shown.images[self.eye.single & ~known][: self.controls]
            if not len(pictures):  # whatever it draws it repeats
                return {"floor": 0.0}
            noise = self.noise("control", len(pictures))
            start = self.start(timestep)
            back = self.run("base", self.noised(pictures, noise, start), torch.tensor([row]), start=start)
            apart = (back - pictures).square().mean((-3, -2, -1)).sqrt()
            return {"floor": float(apart.quantile(CONTROL_LEVEL))}

        targets = sorted(digest_of(i.target) for i in self.instances)
        return self.control(["floor", timestep, self.under(row), self.controls, self.paired, targets], make)["floor"]


def digest_of(picture: Tensor) -> str:
    """Of a picture's pixels, for the key of a cache."""
    return hashlib.sha256(picture.contiguous().numpy().tobytes()).hexdigest()
