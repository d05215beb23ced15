"""What probes share: base and candidate, the targets, and every draw that more than one probe uses."""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from unforget.config import Policy
from unforget.core import passes, sampling
from unforget.core.metrics import WORKING_SIZE, rms, tolerance_bound
from unforget.core.passes import Count
from unforget.core.types import UNCONDITIONAL, Family, Instance, Trajectory
from unforget.files import cache, images
from unforget.files.storage import digest
from unforget.verification.near_copies import EmbeddedImages, NearCopyDetector
from unforget.verification.sequential import Decision, Plan, plan
from unforget.verification.similarity import Backend, backend
from unforget.verification.variants import Searched, calibrate

Role = Literal["base", "candidate"]
ROLES: tuple[Role, Role] = ("base", "candidate")
SHOWN = 8
"""Images of the candidate's draws, or twice those of a finding, that people are shown."""
Drawn = tuple[Role, tuple[int, ...]]
"""Draws that probes share: of which model, under which prompts taking turns."""
PIXELS_KEPT = 2**24
"""Pixels of draws that are whole in memory at a time: 16 images of 1024 px."""
FIRST, ENOUGH = 32, 16
"""Draws of the base under a prompt before the first look, and hits of every target after which there are no more."""
GROUP = 32
"""Draws in a row of the candidate alone that take the same timesteps."""
GUIDANCE = (0.5, 1.5)
"""Between which shares of the usual strength of the guidance theirs lies."""
CONTROL_LEVEL = 0.05
"""A target is recalled if it comes back nearer than this share, at most, of images that it need not have seen."""


@dataclass(frozen=True)
class Finding:
    """What one probe found of one target, or of the whole model (target None): figures by name, images by model."""

    probe: str
    target: str | None
    base: Mapping[str, float]
    candidate: Mapping[str, float]
    timestep: float | None = None
    prompt: str = ""
    variant: str = ""
    decision: Decision | None = None
    draws: int = 0
    """What its shares are of; 0 if they are judged as they are."""
    images: Mapping[Role, Tensor] = field(default_factory=dict)

    @property
    def place(self) -> dict[str, Any]:
        """The fields that it shares with the report's records."""
        return {name: getattr(self, name) for name in ("probe", "target", "timestep", "prompt", "variant")}


@dataclass
class VerifyContext:
    """Base and candidate, what to look for, and every draw that more than one probe uses.

    A surrogate equal to its target means that none is known. Half of the candidate's noise depends on its digest and
    the nonce, so that nobody can have trained for the test. `advance` is told how many network passes are done.
    """

    base: Family
    candidate: Family
    instances: tuple[Instance, ...]
    policy: Policy = field(default_factory=Policy)
    must_retain: tuple[Tensor, ...] = ()
    """Images (C, H, W) that must still be drawn."""
    retain_prompt_ids: tuple[int, ...] = (UNCONDITIONAL,)
    """Prompts under which the rest is drawn, taking turns."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """How far each part beside the candidate's network is from the base's: 0 for the same."""
    seed: int = 0
    base_digest: str = ""
    candidate_digest: str = ""
    nonce: str = ""
    """The verifier's own, in the candidate's own noise: nobody knows it who made the candidate."""
    cache: bool = False
    """Whether what the base does is read from and written to the cache."""
    advance: Callable[[int], object] = lambda n: None
    _draws: dict[Drawn, EmbeddedImages] = field(default_factory=dict)
    _whole: dict[Role, Tensor] = field(default_factory=dict)
    """Draws under the retain prompts at their own size, in 8 bits: of the base all, of the candidate some."""
    _figures: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def models(self) -> dict[Role, Family]:
        return {"base": self.base, "candidate": self.candidate}

    @property
    def cases(self) -> list[tuple[Instance, int]]:
        """Every target under each of its prompts."""
        return [(instance, prompt_id) for instance in self.instances for prompt_id in instance.prompt_ids]

    @cached_property
    def backends(self) -> tuple[Backend, ...]:
        """What detects near-copies, as the policy names it."""
        return tuple(backend(text) for text in self.policy.similarity)

    @cached_property
    def detector(self) -> NearCopyDetector:
        """Calibrated on what the base draws under the retain prompts."""
        references = self._drawn("base", self.retain_prompt_ids, self.policy.paired)
        return NearCopyDetector(self.backends, references, self.policy.false_positive_rate)

    def usual(self, through: float | None = None) -> Trajectory:
        """How an image comes from noise, or from timestep `through`, but for what is the candidate's own."""
        return Trajectory(sampling.regular(self.base, steps=self.policy.sampler_steps, through=through))

    @cached_property
    def plan(self) -> Plan:
        return plan(self.policy.max_rate, self.policy.confidence)

    def prompt(self, prompt_id: int) -> str:
        return self.base.prompts[prompt_id]

    def draws(self, role: Role, prompt_ids: tuple[int, ...], count: int) -> EmbeddedImages:
        """The first `count` samples of a model under prompts that take turns, each drawn once.

        The first `paired` start from noise that both models share; what the candidate draws beyond, from its own, by
        timesteps of its own, every other group of them by ancestral sampling.
        """
        _ = self.detector  # which draws, too: first, so that batches are the same in every run
        return self._drawn(role, prompt_ids, count)

    def _drawn(self, role: Role, prompt_ids: tuple[int, ...], count: int) -> EmbeddedImages:
        """The same, a part at a time: of most draws only what they are compared by is kept."""
        have, part = self._draws.get((role, prompt_ids)), passes.in_one_pass(PIXELS_KEPT, self.base.image_shape)
        while have is None or len(have) < count:
            first = len(have or ())
            made = self._images(role, prompt_ids, first, min(first + part, count))
            if prompt_ids == self.retain_prompt_ids:
                self._keep_whole(role, first, made)
            more = EmbeddedImages.of(self.backends, made)
            have = self._draws[role, prompt_ids] = have + more if have else more
        return have[:count]

    def _keep_whole(self, role: Role, first: int, made: Tensor) -> None:
        most = self.policy.paired if role == "base" else SHOWN
        if role not in self._whole:  # at once: to grow would take as much again
            self._whole[role] = torch.empty(most, *made.shape[1:], dtype=torch.uint8)
        rows = self._whole[role][first : first + len(made)]
        rows.copy_(images.to_bytes(made[: len(rows)]))

    def pictures(self, role: Role, rows: Tensor | slice) -> Tensor:
        """Draws under the retain prompts at their own size, (N, C, H, W): any of the base, the candidate's first."""
        self.retained(role)
        return images.from_bytes(self._whole[role][rows])

    def base_draws(self, prompt_id: int) -> EmbeddedImages:
        """What the base draws under a prompt, `paired` at most: fewer, if every target comes up often enough before.

        They decide whether the base reproduces a target, and start `partial_denoise`: more hits change neither.
        """
        have, paired = self._draws.get(("base", (prompt_id,))), self.policy.paired
        count = min(paired, max(FIRST, len(have or ())))
        while True:
            drawn = self.draws("base", (prompt_id,), count)
            if count == paired or all(int(self.is_target(drawn, i).sum()) >= ENOUGH for i in self.instances):
                return drawn
            count = min(paired, 2 * count)

    def retained(self, role: Role) -> EmbeddedImages:
        """The same-seed draws under the retain prompts, (paired, ...)."""
        return self.draws(role, self.retain_prompt_ids, self.policy.paired)

    def _images(self, role: Role, prompt_ids: tuple[int, ...], first: int, count: int) -> Tensor:
        shared = max(first, min(self.policy.paired, count))
        noise, turns = self.noise("sample", shared - first, first=first), _turns(prompt_ids, first, shared)
        if role == "base" and self.cache:
            prompts = [self.prompt(i) for i in turns.tolist()]
            key = self._key("draws", prompts, first, prompts, digest({"": noise}))
            return cache.cached(key, (len(turns), *self.base.image_shape), lambda: self.run(self.base, noise, turns))
        parts = [self.run(self.models[role], noise, turns)] if len(turns) else []
        for row, end in self._groups(shared, count):
            noise, turns = self.noise("sample", end - row, first=row, fresh=True), _turns(prompt_ids, row, end)
            parts.append(self.run(self.models[role], noise, turns, trajectory=self._trajectory(row, end)))
        return torch.cat(parts)

    def _groups(self, first: int, count: int) -> list[tuple[int, int]]:
        """Rows of draws, in parts that share their timesteps."""
        edges = [first, *range((first // GROUP + 1) * GROUP, count, GROUP), count]
        return list(pairwise(edges)) if first < count else []

    def _trajectory(self, first: int, end: int) -> Trajectory:
        """How draws of one group come from noise: every other group by ancestral sampling, all by another guidance."""
        group = first // GROUP
        seeds = sampling.seeds(end - first, self.seed, self._fresh("sample steps"), first=first) if group % 2 else None
        usual, chance = self.base.guidance, random.Random(f"guidance {group}/{self.seed}/{self.nonce}")
        guidance = usual and 1 + (usual - 1) * chance.uniform(*GUIDANCE)
        return Trajectory(self.own_timesteps(f"sample {group}"), seeds, guidance)

    def own_timesteps(self, purpose: str, start: float | None = None) -> Tensor:
        """Timesteps from noise, or from `start`, that depend on the nonce: nobody can have trained for them alone."""
        key = f"{purpose}/{self.seed}/{self.nonce}"
        return sampling.irregular(self.base, key, steps=self.policy.sampler_steps, start=start)

    def _key(self, purpose: str, prompts: Sequence[str], *more: object) -> list[object]:
        """All that something depends on that the base makes under prompts."""
        made_by = [self.base_digest, self.seed, self.policy.sampler_steps, self.base.made_by(prompts)]
        return [purpose, *made_by, *more]

    def retain_turns(self, count: int) -> Tensor:
        """The retain prompts taking turns, (count,)."""
        return _turns(self.retain_prompt_ids, 0, count)

    def noise(self, purpose: str, count: int, *, first: int = 0, fresh: bool = False) -> Tensor:
        """Noise that both models start from, or, `fresh`, that depends on the candidate's weights and the nonce."""
        purpose = self._fresh(purpose) if fresh else purpose
        return sampling.random_noise(count, self.base.latent_shape, self.seed, purpose, first=first)

    def _fresh(self, purpose: str) -> str:
        return f"{purpose} {self.candidate_digest}{self.nonce}"

    def run(
        self, family: Family, x_t: Tensor, prompt_ids: Tensor | int, *, start: float | None = None,
        trajectory: Trajectory | None = None,
    ) -> Tensor:  # fmt: skip
        """Images that a model makes from noise, or from noised images at timestep `start`, rounded to 8 bits."""
        made = sampling.draw(
            family, x_t, steps=trajectory or self.usual(start), start=start,
            prompt_ids=torch.as_tensor(prompt_ids).reshape(-1), advance=self.advance,
        )  # fmt: skip
        return images.eight_bit(made)

    def reconstruct(
        self, family: Family, pictures: Tensor, noise: Tensor, ids: Tensor | int, at: float,
        trajectory: Trajectory | None = None,
    ) -> Tensor:  # fmt: skip
        """An image (C, H, W), or images (N, C, H, W), noised to a timestep and denoised by a model, (N, C, H, W)."""
        start = self.start(at)
        x_t = sampling.add_noise(self.base, pictures if pictures.ndim == 4 else pictures[None], noise, start)
        return self.run(family, x_t, ids, start=start, trajectory=trajectory)

    def drawn_passes(self, drawn: Drawn, first: int, count: int) -> int:
        """Network passes of shared draws from `first` to `count`."""
        role, prompts = drawn
        usual = max(first, min(count, self.policy.paired)) if role == "candidate" else count
        total = self.passes(_turns(prompts, first, usual).tolist())
        for row, end in self._groups(usual, count):
            calls = len(self.own_timesteps(f"sample {row // GROUP}"))
            total += passes.drawn(self.base, _turns(prompts, row, end).tolist(), calls)
        return total

    def passes(self, prompt_ids: Sequence[int], timestep: float | None = None) -> int:
        """Network passes of an image under each prompt, from noise or from a timestep on."""
        start = None if timestep is None else self.start(timestep)
        return passes.drawn(self.base, prompt_ids, len(self.usual(start).between(start).timesteps))

    def repeated(self, cases: Sequence[tuple[Instance, int]], draws: int, timesteps: Sequence[float | None]) -> Count:
        """Passes of so many draws of each case from each timestep, from noise where that is None."""
        return Count.of(sum(self.passes([id] * draws, t) for _, id in cases for t in timesteps))

    def start(self, timestep: float) -> float:
        """The timestep of the schedule that is nearest to the given one."""
        return float(self.base.schedule.nearest(torch.tensor([timestep])))

    def is_target(self, shown: Tensor | EmbeddedImages, instance: Instance) -> Tensor:
        """Which images are near-copies of the target rather than of its surrogate, (N,) of bool."""
        embedded = self.detector.embed(shown) if isinstance(shown, Tensor) else shown
        return self.detector.is_copy(embedded, instance.target, *known_surrogate(instance))

    def is_any_target(self, shown: EmbeddedImages) -> Tensor:
        """Which images are near-copies of any target, (N,) of bool."""
        return torch.stack([self.detector.is_copy(shown, i.target) for i in self.instances]).any(0)

    def control(self, prompt_id: int, key: list[object], make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Figures of the base under a prompt, made once, and read from the cache if they stand there: no image is."""
        compared = [backend.name for backend in self.backends], self.policy.false_positive_rate, WORKING_SIZE
        turns, policy = [self.prompt(i) for i in self.retain_prompt_ids], (self.policy.controls, self.policy.paired)
        prompt = self.prompt(prompt_id)
        whole = self._key("control", [*turns, prompt], *compared, turns, *policy, prompt, *key)
        known = json.dumps(whole)
        if known not in self._figures:
            self._figures[known] = cache.cached_figures(whole, make) if self.cache else make()
        return self._figures[known]

    def floor(self, timestep: float, prompt_id: int) -> float:
        """RMS that images which the model need not have seen stay above when noised to a timestep and denoised.

        Little noise hides little: any model returns any image from there, more or less. What it draws once comes back
        so near in one case of twenty, or seldomer: of few images nobody knows exactly. What it repeats, it may have
        memorised, and is left out.
        """

        def make() -> dict[str, float]:
            drawn = self.retained("base")
            rows = (self.detector.unrepeated & ~self.is_any_target(drawn)).nonzero()[: self.policy.controls, 0]
            if not len(rows):  # whatever it draws it repeats
                return {"floor": 0.0}
            pictures = self.pictures("base", rows)
            noise = self.noise("control", len(pictures))
            back = self.reconstruct(self.base, pictures, noise, prompt_id, timestep)
            return {"floor": tolerance_bound(rms(back, pictures), CONTROL_LEVEL, self.policy.confidence)}

        return self.control(prompt_id, ["floor", timestep, self._targets, self.policy.confidence], make)["floor"]

    @cached_property
    def usual_sharpness(self) -> tuple[float, float]:
        """Between which 98 % of the base's draws lie."""
        low, high = self.retained("base").sharpness.quantile(torch.tensor([0.01, 0.99])).tolist()
        return low, high

    def variant_limits(self, target: Tensor) -> Searched:
        """Likenesses from which an image counts as a variant of a target: what the same searches find by chance."""

        def make() -> dict[str, float]:
            drawn = self.retained("base")
            return vars(calibrate(drawn.images[self.detector.unrepeated & ~self.is_any_target(drawn)], rate, target))

        rate = self.policy.false_positive_rate
        key = ["variants", *Searched.__annotations__, images.image_id(target), self._targets]
        return Searched(**self.control(UNCONDITIONAL, key, make))  # type: ignore[arg-type]

    @property
    def _targets(self) -> list[str]:
        return sorted(images.image_id(i.target) for i in self.instances)


def _turns(prompt_ids: Sequence[int], first: int, count: int) -> Tensor:
    """Prompts taking turns, of draws from `first` to `count`, (count - first,)."""
    return torch.tensor(prompt_ids)[torch.arange(first, count) % len(prompt_ids)]


def shown(made: Mapping[Role, Tensor]) -> dict[Role, Tensor]:
    """What a finding keeps of the images that it is made of: as many as people are shown."""
    return {role: rows[: SHOWN // 2].clone() for role, rows in made.items()}


def known_surrogate(instance: Instance) -> list[Tensor]:
    """The surrogate, if it is known."""
    return [] if torch.equal(instance.target, instance.surrogate) else [instance.surrogate]
