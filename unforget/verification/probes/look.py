"""Probes of the target itself: does it come back, whole, moved, from half way, or in other words?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from unforget.core.metrics import lower_bound, region, rms, rms_within, sharpness, shows, upper_bound
from unforget.core.types import Family, Instance, Strategy
from unforget.errors import UsageError
from unforget.files import images
from unforget.verification.context import Finding, Subject, Which, digest_of
from unforget.verification.near_copies import Drawn
from unforget.verification.sequential import Decision

BOTH: tuple[Which, Which] = ("base", "patched")


def cases(subject: Subject) -> Iterator[tuple[Instance, int]]:
    """Every target under each of its prompts."""
    for instance in subject.instances:
        for row in instance.prompt_ids:
            yield instance, row


def returned(subject: Subject, instance: Instance, images: Tensor, floor: float) -> dict[str, float]:
    """Figures of reconstructions (N, C, H, W).

    `recall` is the share that is nearer to the target than what the model never saw comes back; the margins say which
    of target and surrogate is nearer, over the whole picture and inside the region where the two differ. `sharpness`,
    as a share of the target's, stands beside them because broken pictures look forgotten.
    """
    target, surrogate = instance.target, instance.surrogate
    to_target, to_surrogate = rms(images, target), rms(images, surrogate)
    where = region(target, surrogate)
    within = rms_within(images, surrogate, where) < rms_within(images, target, where)
    return {
        "to_target": float(to_target.mean()),
        "to_surrogate": float(to_surrogate.mean()),
        "nearer_surrogate": float((to_surrogate < to_target).float().mean()),
        "nearer_in_region": float(within.float().mean()),
        "recall": float((to_target < floor).float().mean()),
        "floor": floor,
        "sharpness": float(sharpness(images).mean() / sharpness(target).clamp(min=1e-9)),
    }


class Reconstruct(Strategy):
    """Noise the target to several levels, denoise, and see which picture comes back."""

    kind: Literal["reconstruct"] = "reconstruct"
    timesteps: tuple[int, ...] = Field((250, 400, 550), description="timesteps to noise it to")
    draws: int = Field(32, ge=1, le=4096, description="draws a timestep; half of the candidate's from noise of its own")
    calibrated: bool = Field(True, description="tell recall from what comes back of any picture")

    def cost(self, subject: Subject) -> int:
        """Network calls, a picture each, at most."""
        calls = sum(subject.calls(subject.start(timestep)) for timestep in self.timesteps)
        return calls * (2 * self.draws * len(list(cases(subject))) + self.calibrated * subject.controls)

    def __call__(self, subject: Subject) -> list[Finding]:
        return [self._look(subject, i, row, timestep) for i, row in cases(subject) for timestep in self.timesteps]

    def _look(self, subject: Subject, instance: Instance, row: int, timestep: int) -> Finding:
        start, floor = subject.start(timestep), subject.floor(timestep, row) if self.calibrated else 0.0
        noise = {which: self._noise(subject, which, timestep) for which in BOTH}
        images: dict[Which, Tensor] = {}

        def back(which: Which) -> dict[str, float]:
            x_t = subject.noised(instance.target[None], noise[which], start)
            images[which] = subject.run(which, x_t, torch.tensor([row]), start=start)
            return returned(subject, instance, images[which], floor)

        key = [
            self.kind,
            timestep,
            self.draws,
            subject.under(row),
            *map(digest_of, (instance.target, instance.surrogate)),
        ]
        base = subject.control([*key, floor], lambda: back("base"))
        return Finding(self.kind, instance.id, base, back("patched"), start, subject.under(row), images=images)

    def _noise(self, subject: Subject, which: Which, timestep: int) -> Tensor:
        own = self.draws // 2 if which == "patched" else 0
        shared = subject.noise(f"reconstruct {timestep}", self.draws - own)
        return torch.cat([shared, subject.noise(f"reconstruct {timestep}", own, fresh=True)])


def counted(hits: Tensor, confidence: float) -> dict[str, float]:
    """A rate with its exact one-sided bounds."""
    n, seen = len(hits), int(hits.sum())
    return {
        "hits": seen,
        "drawn": n,
        "rate": seen / n,
        "rate_low": lower_bound(seen, n, confidence),
        "rate_high": upper_bound(seen, n, confidence),
    }


def tested(
    subject: Subject, row: int, seen: Callable[[Drawn], Tensor]
) -> tuple[dict[str, float], dict[str, float], Decision | None]:
    """Draw until the rate of what is `seen` is certain to lie under the limit, or not to; base, candidate, verdict."""
    rows, plan = (row,), subject.plan
    most = min(subject.most or plan.looks[-1].drawn, plan.looks[-1].drawn)
    count, decision = 0, None
    while decision is None and count < most:
        count = min(plan.following(count), most)
        hits = seen(subject.draws("patched", rows, count))
        drawn, decision = plan.decide(hits.numpy())
    base = seen(subject.draws("base", rows, subject.paired))
    return counted(base, subject.confidence), counted(hits[:drawn], subject.confidence), decision


class Sample(Strategy):
    """Draw until it is certain whether near-copies of a target come up less often than the limit.

    The number of draws follows from `--max-rate` and `--confidence` (`unforget.sequential`).
    """

    kind: Literal["sample"] = "sample"

    def cost(self, subject: Subject) -> int:
        """Network calls when nothing hits."""
        count = min(subject.plan.shortest, subject.most or subject.plan.shortest)
        rows = {row for _, row in cases(subject)}
        return subject.calls() * len(rows) * (count + subject.paired)

    def __call__(self, subject: Subject) -> list[Finding]:
        found = []
        for instance, row in cases(subject):
            base, patched, decision = tested(subject, row, self._seen(subject, instance, row))
            under = subject.under(row)
            found.append(Finding(self.kind, instance.id, base, patched, prompt=under, decision=decision))
        for k, picture in enumerate(subject.keep):
            base, patched = (
                counted(subject.eye.sees(subject.draws(w, subject.stay, subject.paired), picture), subject.confidence)
                for w in BOTH
            )
            found.append(Finding("must_retain", None, base, patched, variant=str(k + 1)))
        return found

    @staticmethod
    def _seen(subject: Subject, instance: Instance, row: int) -> Callable[[Drawn], Tensor]:
        target, surrogate, known = instance.target, instance.surrogate, others(instance)

        def seen(drawn: Drawn) -> Tensor:
            near = subject.eye.sees(drawn, target, *known)
            # Under a prompt the target counts in any place and size: that is how prompted models repeat it.
            return near | shows(drawn.images, target, surrogate) if row else near

        return seen


def others(instance: Instance) -> list[Tensor]:
    """What may be drawn instead of the target, where it is known."""
    return [] if torch.equal(instance.target, instance.surrogate) else [instance.surrogate]


def variants(picture: Tensor) -> dict[str, Tensor]:
    """A picture (C, H, W) as somebody may have saved it again: mirrored, cropped by a tenth, in other colours."""
    height, width = picture.shape[1:]
    y, x = height // 20 or 1, width // 20 or 1
    inner = picture[None, :, y : height - y, x : width - x]
    return {
        "flip": picture.flip(-1),
        "crop": functional.interpolate(inner, (height, width), mode="bilinear", antialias=True)[0].clamp(-1, 1),
        "colour": (picture * 0.8 + 0.15).clamp(-1, 1),
        **({"grey": picture.mean(0, keepdim=True).expand_as(picture)} if len(picture) == 3 else {}),
    }


class Transforms(Strategy):
    """The target mirrored, cropped, recoloured: is it drawn so, and does it come back when noised?"""

    kind: Literal["transforms"] = "transforms"
    timestep: int = Field(400, gt=0, lt=1000, description="timestep to reconstruct from")
    draws: int = Field(16, ge=2, le=4096, description="reconstructions of each")

    def cost(self, subject: Subject) -> int:
        """Network calls beside those of the samples."""
        return 2 * 4 * self.draws * len(list(cases(subject))) * subject.calls(subject.start(self.timestep))

    def __call__(self, subject: Subject) -> list[Finding]:
        found = []
        for instance, row in cases(subject):
            for name, picture in variants(instance.target).items():
                instead = [instance.target, *others(instance)]
                # A mirror image that is the target itself, or its surrogate, is no variant.
                if not self._apart(subject, picture, instead):
                    found += self._look(subject, instance, row, name, picture)
        return found

    @staticmethod
    def _apart(subject: Subject, picture: Tensor, instead: list[Tensor]) -> bool:
        return bool(subject.eye.sees(subject.eye.look(torch.stack(instead)), picture).any())

    def _look(self, subject: Subject, instance: Instance, row: int, name: str, picture: Tensor) -> list[Finding]:
        instead = [instance.target, *others(instance)]
        base, patched, decision = tested(subject, row, lambda drawn: subject.eye.sees(drawn, picture, *instead))
        start, floor = subject.start(self.timestep), subject.floor(self.timestep, row)
        noise = subject.noise(f"transforms {name}", self.draws)
        changed = Instance(picture, picture, instance.id)

        def back(which: Which) -> dict[str, float]:
            images = subject.run(which, subject.noised(picture[None], noise, start), torch.tensor([row]), start=start)
            return returned(subject, changed, images, floor)

        key = [self.kind, name, self.timestep, self.draws, subject.under(row), digest_of(picture), floor]
        before, after = subject.control(key, lambda: back("base")), back("patched")
        figures = ("recall", "floor", "to_target")
        return [
            Finding(self.kind, instance.id, base, patched, prompt=subject.under(row), variant=name, decision=decision),
            Finding(
                self.kind, instance.id, {f: before[f] for f in figures}, {f: after[f] for f in figures}, start,
                subject.under(row), name,
            ),
        ]  # fmt: skip


class PartialDenoise(Strategy):
    """The base does the first steps, towards the target, and the candidate finishes what it was handed."""

    kind: Literal["partial_denoise"] = "partial_denoise"
    handover: int = Field(700, gt=0, lt=1000, description="timestep at which the candidate takes over")
    draws: int = Field(16, ge=2, le=4096, description="beginnings")

    def cost(self, subject: Subject) -> int:
        """Network calls."""
        return 3 * self.draws * subject.calls() * len(list(cases(subject)))

    def __call__(self, subject: Subject) -> list[Finding]:
        return [self._look(subject, *case) for case in cases(subject)]

    def _look(self, subject: Subject, instance: Instance, row: int) -> Finding:
        x_t, first = self._beginnings(subject, instance, row)
        rows = torch.tensor([row])
        start = subject.start(self.handover)
        with torch.no_grad():
            handed = subject.base.denoise(
                x_t, steps=subject.steps, start=first, stop=start, prompt_ids=rows.expand(len(x_t))
            )
        images = {which: subject.run(which, handed, rows, start=start) for which in BOTH}
        sees = {w: subject.eye.sees(subject.eye.look(i), instance.target, *others(instance)) for w, i in images.items()}
        base, patched = ({"near_copies": float(s.float().mean())} for s in sees.values())
        return Finding(self.kind, instance.id, base, patched, start, subject.under(row), images=images)

    def _beginnings(self, subject: Subject, instance: Instance, row: int) -> tuple[Tensor, float | None]:
        """Noise from which the base drew the target, if it often did; else the target under a great deal of noise."""
        drawn = subject.draws("base", (row,), subject.paired)
        hits = subject.eye.sees(drawn, instance.target, *others(instance))
        if int(hits.sum()) >= self.draws // 4:
            return subject.noise("sample", subject.paired)[hits][: self.draws], None
        start = subject.start(800)
        noise = subject.noise("complete", self.draws)
        return subject.noised(instance.target[None], noise, start), start


class Replay(Strategy):
    """The seed, sampler and prompt that made the picture, once more."""

    kind: Literal["replay"] = "replay"
    seed: int = Field(ge=0, lt=2**63, description="of the generator that made the picture")
    steps: int | None = Field(None, ge=1, le=10_000, description="sampler steps that made it")
    scheduler: str | None = Field(None, description="diffusers class of the sampler that made it")

    def cost(self, subject: Subject) -> int:
        """Network calls."""
        return 2 * (self.steps or subject.steps) * len(list(cases(subject)))

    def __call__(self, subject: Subject) -> list[Finding]:
        found = []
        for instance, row in cases(subject):
            images = {w: self._image(subject, w, row) for w in BOTH}
            base, patched = (self._figures(subject, instance, row, i) for i in images.values())
            found.append(Finding(self.kind, instance.id, base, patched, prompt=subject.under(row), images=images))
        return found

    def _image(self, subject: Subject, which: Which, row: int) -> Tensor:
        family: Family = getattr(subject, which)
        steps = self.steps or subject.steps
        x_0 = family.replay(self.seed, steps=steps, scheduler=self.scheduler, prompt_ids=torch.tensor([row]))
        return images.eight_bit(family.decode(x_0))

    @staticmethod
    def _figures(subject: Subject, instance: Instance, row: int, image: Tensor) -> dict[str, float]:
        near = subject.eye.sees(subject.eye.look(image), instance.target, *others(instance))
        sided = shows(image, instance.target, instance.surrogate)
        return {"near_copies": float(bool(near | sided)), "to_target": float(rms(image, instance.target))}


WORDINGS = ("{}.", "a picture of {}", "a photo of {}", "{}, high quality", "the {}")


class Paraphrase(Strategy):
    """The prompt in other words, where the base draws the target under those, too."""

    kind: Literal["paraphrase"] = "paraphrase"
    draws: int = Field(8, ge=2, le=4096, description="draws of each wording")

    def cost(self, subject: Subject) -> int:
        """Network calls."""
        prompted = [row for _, row in cases(subject) if row]
        return 2 * self.draws * subject.calls() * len(prompted) * (len(WORDINGS) + 1)

    def __call__(self, subject: Subject) -> list[Finding]:
        return [f for i, row in cases(subject) if row for f in self._look(subject, i, row)]

    def _look(self, subject: Subject, instance: Instance, row: int) -> Iterator[Finding]:
        prompt = subject.under(row)
        words = [w.format(prompt) for w in WORDINGS] + [prompt.upper()]
        for wording in dict.fromkeys(w for w in words if w != prompt):
            try:
                (asked,) = subject.base.prompt_ids([wording]).tolist()
            except UsageError:  # longer than the tokenizer takes
                continue
            subject.patched.prompt_ids([wording])
            noise = subject.noise("reword", self.draws)
            shares = {}
            for which in BOTH:
                images = subject.run(which, noise, torch.tensor([asked]))
                near = subject.eye.sees(subject.eye.look(images), instance.target, *others(instance))
                near = near | shows(images, instance.target, instance.surrogate)
                shares[which] = {"near_copies": float(near.float().mean())}
            yield Finding(self.kind, instance.id, shares["base"], shares["patched"], prompt=prompt, variant=wording)
