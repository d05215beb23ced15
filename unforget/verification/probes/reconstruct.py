import math
from collections.abc import Iterator
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from unforget.config import Policy, VerifyConfig
from unforget.core import passes
from unforget.core.metrics import at_working_size, exact_rms, region, rms_within, sharpness
from unforget.core.passes import Count
from unforget.core.types import Instance, Trajectory
from unforget.files.images import image_id
from unforget.verification.context import Finding, Role, VerifyContext, shown
from unforget.verification.probes.base import HALF, Probe, changed, checked
from unforget.verification.report import Check

SIDES = 0.2
"""Share of the base's reconstructions that are nearer to the surrogate, up to which it sides with the target."""


class Reconstruction(Probe):
    """A probe that judges reconstructions: the target must not be recalled, its surrogate, if known, be nearer."""

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        yield checked(found, "recall", "at most", HALF, policy)
        for figure in ("nearer_surrogate", "nearer_in_region") if known else ():
            yield checked(found, figure, "at least", policy.nearer, policy)


class Reconstruct(Reconstruction):
    """Noise the target to several timesteps, denoise, and see which image comes back."""

    kind: ClassVar = "reconstruct"
    heading: ClassVar = "noised to t = {timestep:g} and back"
    timesteps: tuple[int, ...] = Field((250, 400, 550), description="timesteps to noise it to")
    draws: int = Field(32, ge=1, le=4096, description="draws a timestep; half of the candidate's in its own ways")
    calibrated: bool = Field(True, description="tell recall from what comes back of any image")

    @classmethod
    def from_policy(cls, config: VerifyConfig, prompted: bool) -> Self:
        return cls(timesteps=config.timestep, draws=config.draws)

    def cost(self, context: VerifyContext) -> Count:
        cases, own = self.cases(context), self.draws // 2
        usual = context.repeated(cases, self.draws, self.timesteps)
        usual += context.repeated(cases, self.draws - own, self.timesteps)
        counts = [len(self._own_timesteps(context, timestep)) for timestep in self.timesteps]
        alone = (passes.drawn(context.base, [id] * own, calls) for _, id in cases for calls in counts)
        return usual + Count.of(sum(alone))

    def floors(self, context: VerifyContext) -> Iterator[tuple[float, int]]:
        for _, prompt_id in self.cases(context) if self.calibrated else ():
            yield from ((timestep, prompt_id) for timestep in self.timesteps)

    def examine(self, context: VerifyContext, instance: Instance, prompt_id: int) -> list[Finding]:
        return [self._at(timestep, context, instance, prompt_id) for timestep in self.timesteps]

    def _at(self, timestep: int, context: VerifyContext, instance: Instance, prompt_id: int) -> Finding:
        prompt = context.prompt(prompt_id)
        floor = context.floor(timestep, prompt_id) if self.calibrated else 0.0
        low, high = context.usual_sharpness if self.calibrated else (0.0, math.inf)
        images: dict[Role, Tensor] = {}

        def figures(role: Role) -> dict[str, float]:
            asked = context.models[role], instance.target
            images[role] = torch.cat([
                context.reconstruct(*asked, noise, prompt_id, timestep, trajectory)
                for noise, trajectory in self._noise(context, role, timestep)
            ])  # fmt: skip
            found = reconstruction_figures(images[role], instance, floor)
            sharp = sharpness(images[role])
            return {**found, "as_sharp": float(((low <= sharp) & (sharp <= high)).float().mean())}

        ids = image_id(instance.target), image_id(instance.surrogate)
        key = [self.kind, timestep, self.draws, prompt, *ids, floor, low, high, "inside"]
        base = context.control(prompt_id, key, lambda: figures("base"))
        candidate, start = figures("candidate"), context.start(timestep)
        return Finding(self.kind, instance.id, base, candidate, start, prompt, draws=self.draws, images=shown(images))

    def _noise(self, context: VerifyContext, role: Role, timestep: int) -> Iterator[tuple[Tensor, Trajectory | None]]:
        """Noise, and along what it is taken away, if not as usual."""
        own, purpose = self.draws // 2 if role == "candidate" else 0, f"reconstruct {timestep}"
        yield context.noise(purpose, self.draws - own), None
        if own:
            yield context.noise(purpose, own, fresh=True), Trajectory(self._own_timesteps(context, timestep))

    def _own_timesteps(self, context: VerifyContext, timestep: int) -> Tensor:
        return context.own_timesteps(f"{self.kind} {timestep}", context.start(timestep))

    def judge(self, found: Finding, policy: Policy, known: bool) -> Iterator[Check]:
        """From where the base makes other images of the target, too, nobody can ask for the surrogate.

        Whatever comes back must be as sharp as what the base draws: a blur in place of the target is no other image.
        """
        for check in super().judge(found, policy, known):
            elsewhere = check.figure != "recall" and not self.reproduces(found)
            yield changed(check, "informational", "the base does not reproduce it") if elsewhere else check
        check = checked(found, "as_sharp", "at least", HALF, policy)
        unusual = found.base["as_sharp"] < HALF
        yield changed(check, "informational", "neither is what the base makes of it") if unusual else check

    def reproduces(self, found: Finding) -> bool:
        """Recalls it, or sides with it against its surrogate and stays nearer to it than that one is."""
        base = found.base
        return base["recall"] > HALF or (base["nearer_surrogate"] <= SIDES and base["inside"] > HALF)


def reconstruction_figures(images: Tensor, instance: Instance, floor: float) -> dict[str, float]:
    """Figures of reconstructions (N, C, H, W).

    `inside` is the share that is nearer to the target than its surrogate is, of which there is none if that is unknown;
    `recall` is the share that is nearer to the target than what the model never saw comes back; `nearer_in_region`
    looks only where target and surrogate differ. `sharpness` is there because broken images look forgotten.
    """
    images, target, surrogate = map(at_working_size, (images, instance.target, instance.surrogate))
    to_target, to_surrogate = exact_rms(images, target), exact_rms(images, surrogate)
    where = region(target, surrogate)
    within = rms_within(images, surrogate, where) < rms_within(images, target, where)
    return {
        "to_target": float(to_target.mean()),
        "to_surrogate": float(to_surrogate.mean()),
        "nearer_surrogate": float((to_surrogate < to_target).float().mean()),
        "nearer_in_region": float(within.float().mean()),
        "inside": float((to_target < exact_rms(surrogate[None], target)).float().mean()),
        "recall": float((to_target < floor).float().mean()),
        "floor": floor,
        "sharpness": float(sharpness(images).mean() / sharpness(target).clamp(min=1e-9)),
    }
