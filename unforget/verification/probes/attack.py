"""Probes that try: how hard must somebody with the weights work to bring a target back?

They decide nothing unless the policy requires them. Whoever holds the weights can train anything into them, and a
sampler that can be inverted returns any picture from some noise; what counts is the effort beside that for the base.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unforget.core import sampling
from unforget.core.metrics import rms
from unforget.core.types import LARGE, Family, Instance, Strategy
from unforget.files import images
from unforget.verification.context import Finding, Subject, Which
from unforget.verification.probes.look import BOTH, cases, others, returned


class NoiseSearch(Strategy):
    """Gradient descent on the start noise, kept on the sphere where noise lies, towards the target."""

    kind: Literal["noise_search"] = "noise_search"
    restarts: int = Field(4, ge=1, le=64, description="noises to start from, the best of many")
    iterations: int = Field(20, ge=1, le=10_000, description="steps of Adam")
    steps: int = Field(8, ge=2, le=100, description="sampler steps that gradients go through")
    rate: float = Field(0.1, gt=0, description="learning rate")

    def cost(self, subject: Subject) -> int:
        """Network calls; one with gradients counts three times."""
        return 2 * 3 * self.restarts * self.iterations * self.steps * len(list(cases(subject)))

    def __call__(self, subject: Subject) -> list[Finding]:
        return [self._look(subject, *case) for case in cases(subject)]

    def _look(self, subject: Subject, instance: Instance, row: int) -> Finding:
        found = {which: self._search(subject, which, instance, row) for which in BOTH}
        images = {which: image for which, (_, image) in found.items()}
        base, patched = (figures for figures, _ in found.values())
        return Finding(self.kind, instance.id, base, patched, prompt=subject.under(row), images=images)

    def _search(self, subject: Subject, which: Which, instance: Instance, row: int) -> tuple[dict[str, float], Tensor]:
        family: Family = getattr(subject, which)
        drawn = subject.draws(which, (row,), subject.paired).images
        first = rms(drawn, instance.target).argsort(stable=True)[: self.restarts]
        x = subject.noise("sample", subject.paired)[first].clone().requires_grad_()
        goal, norm = subject.base.encode(instance.target[None]), x.detach().flatten(1).norm(dim=1)
        optimizer, rows = torch.optim.Adam([x], self.rate), torch.full((len(first),), row)
        best, needed = (float("inf"), drawn[:1]), float("inf")
        family.network.requires_grad_(False)
        for iteration in range(1, self.iterations + 1):
            x_0 = family.denoise(x, steps=self.steps, prompt_ids=rows)
            shown = images.eight_bit(family.decode(x_0.detach()))
            nearest = rms(shown, instance.target)
            if float(nearest.min()) < best[0]:
                best = float(nearest.min()), shown[nearest.argmin()][None]
            if bool(subject.eye.sees(subject.eye.look(shown), instance.target, *others(instance)).any()):
                needed = min(needed, iteration)
                break
            optimizer.zero_grad()
            (x_0 - goal).square().mean((1, 2, 3)).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                x *= (norm / x.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)
            subject.advance(3 * self.steps * len(first))
        return {"to_target": best[0], "iterations": needed if needed < float("inf") else -1.0}, best[1]


class Relearning(Strategy):
    """Ordinary fine-tuning on pictures that are not the target, as any user may do, and a look at what comes back."""

    kind: Literal["relearning"] = "relearning"
    stops: tuple[int, ...] = Field((10, 30, 100), description="training steps after which to look")
    batch: int = Field(16, ge=1, le=1024, description="pictures a step")
    learning_rate: float = Field(1e-4, gt=0, description="of Adam")
    timestep: int = Field(400, gt=0, lt=1000, description="timestep to reconstruct from")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions, and samples")

    def cost(self, subject: Subject) -> int:
        """Network calls; one with gradients counts three times."""
        looks = len(self.stops) * len(list(cases(subject))) * self.draws
        return 3 * self.batch * max(self.stops) + looks * (
            subject.calls() + subject.calls(subject.start(self.timestep))
        )

    def __call__(self, subject: Subject) -> list[Finding]:
        whole, found = subject.patched, []
        twin = whole.copy()
        # Of a large model only an adapter is tuned.
        large = sum(p.numel() for p in twin.network.parameters()) >= LARGE
        parameters = twin.trainable("lora" if large else "full")
        for p in parameters:
            p.requires_grad_(True)
        optimizer, done = torch.optim.AdamW(parameters, self.learning_rate), 0
        before = {(i.id, row): self._figures(subject, i, row) for i, row in cases(subject)}
        try:
            subject.patched = twin
            for stop in self.stops:
                self._tune(subject, twin, optimizer, parameters, done, stop)
                done = stop
                for i, row in cases(subject):
                    figures = self._figures(subject, i, row)
                    found.append(
                        Finding(
                            self.kind, i.id, before[i.id, row], figures, prompt=subject.under(row),
                            variant=f"{stop} steps",
                        )
                    )  # fmt: skip
        finally:
            subject.patched = whole
        return found

    def _tune(
        self, subject: Subject, twin: Family, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter],
        first: int, last: int,
    ) -> None:  # fmt: skip
        """Ordinary denoising steps on what the base draws, less every copy of a target."""
        shown = subject.draws("base", subject.stay, subject.paired)
        gone = torch.stack([subject.eye.sees(shown, i.target) for i in subject.instances]).any(0)
        pictures = subject.base.encode(shown.images[~gone])
        turns = torch.tensor(subject.stay)[torch.arange(len(shown)) % len(subject.stay)][~gone]
        for step in range(first, last):
            generator = torch.Generator().manual_seed(1_000_003 * (subject.seed + 1) + step)
            pick = torch.randint(len(pictures), (self.batch,), generator=generator)
            batch = sampling.noised(pictures[pick], pictures[pick], turns[pick], subject.base.schedule, generator)
            answer = twin.predict(batch.x_t, batch.timestep, batch.prompt_ids)
            loss = (answer - subject.base.schedule.target(batch.x_0, batch.noise, batch.timestep)).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            subject.advance(3 * self.batch)

    def _figures(self, subject: Subject, instance: Instance, row: int) -> dict[str, float]:
        start, rows = subject.start(self.timestep), torch.tensor([row])
        x_t = subject.noised(instance.target[None], subject.noise("revive", self.draws), start)
        figures = returned(
            subject, instance, subject.run("patched", x_t, rows, start=start), subject.floor(self.timestep, row)
        )
        drawn = subject.eye.look(subject.run("patched", subject.noise("revive draws", self.draws), rows))
        hits = subject.eye.sees(drawn, instance.target, *others(instance))
        return {**figures, "hits": float(hits.sum()), "drawn": float(self.draws)}
