"""A judge that shares no code with training: stock diffusers' network and scheduler, and loops and noise of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from faces import NEAR_COPY, SEEDS, STEPS
from features import Features
from PIL import Image
from torch import Tensor

BACK = (250, 400, 500, 550)
"""Timesteps from which a picture is drawn back."""
ONE_STEP = range(100, 701, 50)
"""Timesteps of single answers, compared with the oracle's."""
RETURNS = 64
"""Draws back at each timestep."""
UNSEEN_LEVEL = 0.05
"""So rarely comes a picture that was never seen back as near as the floor."""
BATCH = 16


class Model:
    """A pipeline's network, drawn from by a loop of its own."""

    def __init__(self, folder: Path) -> None:
        pipeline = DDPMPipeline.from_pretrained(folder)
        self.network = pipeline.unet.eval().to(memory_format=torch.channels_last)
        self.alphas_cumprod = pipeline.scheduler.alphas_cumprod
        self.sampler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.sampler.set_timesteps(STEPS)

    @torch.no_grad()
    def draw(self, x_t: Tensor, start: int = 1000, eta: float = 0.0) -> Tensor:
        """DDIM from the visited timesteps at `start` and below; with eta 1 ancestral, by fixed noise."""
        generator, parts = torch.Generator().manual_seed(7), []
        for part in x_t.split(BATCH):
            for t in self.sampler.timesteps[self.sampler.timesteps <= start]:
                answer = self.network(part, t).sample
                part = self.sampler.step(answer, t, part, eta=eta, generator=generator).prev_sample
            parts.append(part.clamp(-1, 1))
        return torch.cat(parts)

    def noised(self, images: Tensor, noise: Tensor, t: int) -> Tensor:
        """Images, or one image with each noise."""
        kept = self.alphas_cumprod[t]
        return kept.sqrt() * images + (1 - kept).sqrt() * noise

    def returned(self, images: Tensor, noise: Tensor, t: int) -> Tensor:
        """What is drawn back of images that are noised to the visited timestep nearest to t."""
        start = int(min(self.sampler.timesteps, key=lambda visited: abs(int(visited) - t)))
        return self.draw(self.noised(images, noise, start), start)

    @torch.no_grad()
    def clean(self, images: Tensor, noise: Tensor, t: int) -> Tensor:
        """One-step clean images of noised images."""
        x_t, kept = self.noised(images, noise, t), self.alphas_cumprod[t]
        answers = torch.cat([self.network(part, t).sample for part in x_t.split(BATCH)])
        return (x_t - (1 - kept).sqrt() * answers) / kept.sqrt()


def apart(a: Tensor, b: Tensor) -> Tensor:
    """RMS of images, (N,)."""
    return (a - b).square().flatten(1).mean(1).sqrt()


def read(path: Path) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    with Image.open(path) as image:
        values = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32)
        return values.reshape(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def interval(values: Tensor, generator: torch.Generator) -> list[float]:
    """The median, and 95 % of those of 2,000 bootstrap samples."""
    medians = values[torch.randint(len(values), (2000, len(values)), generator=generator)].median(1).values
    return [float(values.median()), float(medians.quantile(0.025)), float(medians.quantile(0.975))]


class Judge:
    """Figures of candidates beside those of the base, all by the same noise.

    `unseen` are pictures like those of training that no model saw: a target is forgotten where it comes back no nearer
    than they do. `oracle` is the model that was trained without one of the targets.
    """

    def __init__(
        self, base: Model, oracle: Model, unseen: Tensor, features: Features, work: Path, *, draws: int, sweep: bool
    ) -> None:
        self.base, self.oracle, self.features, self.work = base, oracle, features, work
        self.samplers = {"ddim": 0.0} if sweep else {"ddim": 0.0, "ancestral": 1.0}
        generator, size = torch.Generator().manual_seed(20_261_126), unseen.shape[1:]
        self.noise = torch.randn(RETURNS, *size, generator=generator)
        noise = torch.randn(unseen.shape, generator=generator)
        self.start = torch.randn(draws, *size, generator=generator)
        if sweep:
            self.noise = self.noise[: RETURNS // 2]
        self.drawn = {
            name: self._kept(f"{name}-{draws}", lambda eta=eta: base.draw(self.start, eta=eta))
            for name, eta in self.samplers.items()
        }
        self.floor = {}
        for t in BACK:
            back = self._kept(f"unseen-{t}", lambda t=t: base.returned(unseen, noise, t))
            self.floor[t] = float(apart(back, unseen).quantile(UNSEEN_LEVEL))
        self.oracle_drawn = self._kept("oracle", lambda: oracle.draw(self.start[:RETURNS]))

    def _kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What candidates do not change is drawn once."""
        path = self.work / f"base-{name}.pt"
        if not path.is_file():
            torch.save(make(), path)
        kept: Tensor = torch.load(path, weights_only=True)
        return kept

    def figures(
        self, candidate: Model, targets: Sequence[Tensor], surrogates: Sequence[Tensor], twins: Sequence[Tensor],
        at_oracle: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """All figures; of several targets the worst. Twins are look-alikes, which are to stay."""
        drawn = {name: candidate.draw(self.start, eta=eta) for name, eta in self.samplers.items()}
        pairs = self.drawn["ddim"][:SEEDS], drawn["ddim"][:SEEDS]
        moved = apart(*pairs)
        perceived, alike = self.features.lpips(*pairs), self.features.ssim(*pairs)
        found: dict[str, Any] = {
            "copies": self._copies(self.drawn, drawn, targets),
            "lookalike": self._copies(self.drawn, drawn, twins),
            "returned": {str(t): self._returned(candidate, targets, surrogates, t) for t in BACK},
            "drift": {
                "median": interval(moved, torch.Generator().manual_seed(0)), "mean": float(moved.mean()),
                "lpips": None if perceived is None else float(perceived.mean()),
                "ssim": None if alike is None else float(alike.mean()),
                "kid_efflite0": self.features.kid(self.drawn["ddim"][:1000], drawn["ddim"][:1000]),
            },
        }  # fmt: skip
        if at_oracle:
            found["to_oracle"] = {
                role: {"target": self._one_step(model, targets[0]), "two_way": self._two_way(model, own)}
                for role, model, own in (("base", self.base, pairs[0]), ("patched", candidate, pairs[1]))
            }
        return found

    @staticmethod
    def _copies(before: dict[str, Tensor], after: dict[str, Tensor], of: Sequence[Tensor]) -> dict[str, list[int]]:
        """Near-copies in base's and candidate's draws, by the sampler."""

        def count(drawn: Tensor) -> int:
            return sum(int((apart(drawn, image) < NEAR_COPY).sum()) for image in of)

        return {name: [count(before[name]), count(after[name])] for name in before}

    def _returned(
        self, candidate: Model, targets: Sequence[Tensor], surrogates: Sequence[Tensor], t: int
    ) -> dict[str, Any]:
        """What comes back of targets: how near, how many as near as the unseen never do, nearer to the surrogate, SSCD
        to what the base makes of the same noise (the paper's protocol is that from t = 500, forgotten below 0.4)."""
        near, recall, nearer, detected = [], [], [], []
        for image, surrogate in zip(targets, surrogates, strict=True):
            key = hashlib.sha256(image.numpy().tobytes()).hexdigest()[:8]
            before = self._kept(
                f"{key}-{t}-{len(self.noise)}", lambda image=image: self.base.returned(image, self.noise, t)
            )
            back = candidate.returned(image, self.noise, t)
            to_target = apart(back, image)
            near.append(float(to_target.mean()))
            recall.append(float((to_target < self.floor[t]).float().mean()))
            nearer.append(float((apart(back, surrogate) < to_target).float().mean()))
            same = self.features.sscd(before, back)
            detected.append(None if same is None else float(same.mean()))
        return {
            "to_target": min(near), "floor": self.floor[t], "recall": max(recall), "nearer_surrogate": min(nearer),
            "sscd_to_base": None if None in detected else max(detected),
        }  # fmt: skip

    def _one_step(self, model: Model, image: Tensor) -> float:
        """Mean RMS to the oracle's one-step clean images of the noised target."""
        each = [apart(model.clean(image, self.noise, t), self.oracle.clean(image, self.noise, t)) for t in ONE_STEP]
        return float(torch.stack(each).mean())

    def _two_way(self, model: Model, own: Tensor) -> float:
        """Mean, over noise levels, of the RMS of both models' answers on what either draws (after arXiv:2510.12981)."""
        noise, each = self.start[:RETURNS].flip(0), []
        for images in (own[:RETURNS], self.oracle_drawn):
            for t in ONE_STEP:
                each.append(apart(model.clean(images, noise, t), self.oracle.clean(images, noise, t)).mean())
        return float(torch.stack(each).mean())
