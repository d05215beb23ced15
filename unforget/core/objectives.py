r"""What is to be learnt: two losses, forget and retain, both minimised.

Both regress the network at a noised image to a goal that is affine in what the model says now. Let f be a target and
s its surrogate.

- `Surrogate` (arXiv:2603.10445) says: at every noised f the clean image is s.
- `PosteriorSwap` (ours) says: the clean image is what the base thinks, with f's share of that belief moved to s,

  .. math:: \hat x_0'(x_t) = \hat x_0^{base}(x_t) + \sum_f w_f(x_t) (s - f), \qquad w_f(x_t) = P(x_0 = f \mid x_t).

  The denoiser's answer is the posterior mean, so this is exactly the denoiser of the model whose every f became s.
  Where f can be told from everything else w is 1 and both objectives agree; where it cannot (high noise, a
  look-alike) w falls to f's share and the model keeps what it said. The weight is the posterior under the empirical
  measure of the target, some times as often as the base draws it (the target prior), and of pictures that are to
  stay. At the highest levels it tapers off: a change there moves every sample and is not needed to forget
  (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from unforget.core.schedule import Schedule
from unforget.core.types import Instance, Noised, Pool, Predict, Strategy


@dataclass(frozen=True)
class Context:
    """What an objective may consult besides the batch.

    Attributes:
        schedule: The noise schedule of both networks.
        base: The frozen network.
        instances: What is to be forgotten, as the network works on it.
        retain: What the base draws that is to stay.
        prior_counts: How many near-copies of each target the base drew under each prompt, at least 1 where the
            target is to be forgotten, (len(instances), prompt_ids).
    """

    schedule: Schedule
    base: Predict
    instances: tuple[Instance, ...]
    retain: Pool
    prior_counts: Tensor


class Uniform(Strategy):
    """Weight every noise level equally in the network's own units."""

    kind: Literal["uniform"] = "uniform"
    retain: float = Field(1.0, ge=0, description="weight of the retain loss")

    def __call__(self, schedule: Schedule, batch: Noised) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(batch.x_0[:, :1, :1, :1])
        return one, self.retain * one


class Linear(Strategy):
    """lambda(t) = 1 - beta t on the retain loss and 1 - lambda on the forget loss, t in 0..1000 (arXiv:2603.10445)."""

    kind: Literal["linear"] = "linear"
    beta: float = Field(5e-5, gt=0, le=1e-3, description="slope; the paper has 5e-5 for DDPM, 2e-4 for SD3")

    def __call__(self, schedule: Schedule, batch: Noised) -> tuple[Tensor, Tensor]:
        forget = self.beta * schedule.column("timesteps", batch.timestep, batch.x_0)
        return forget, 1 - forget


class CleanSpace(Strategy):
    """Weight errors by what they are worth in the clean image, up to a cap: 1/SNR for a network that predicts noise."""

    kind: Literal["clean-space"] = "clean-space"
    cap: float = Field(5.0, gt=0, description="largest weight of a noise level")
    retain: float = Field(10.0, ge=0, description="weight of the retain loss")

    def __call__(self, schedule: Schedule, batch: Noised) -> tuple[Tensor, Tensor]:
        scale = schedule.x0_scale(batch.timestep).square().clamp(max=self.cap)
        forget = scale.to(batch.x_0).reshape(-1, 1, 1, 1)
        return forget, self.retain * forget


Weighting = Annotated[Uniform | Linear | CleanSpace, Field(discriminator="kind")]


def _mean_square(weight: Tensor, error: Tensor) -> Tensor:
    return (weight * error.square()).mean()


class Surrogate(Strategy):
    """Say the surrogate at every noised target (arXiv:2603.10445)."""

    kind: Literal["surrogate"] = "surrogate"
    weighting: Weighting = Linear()
    distil: bool = Field(False, description="keep what the base says at retain images, not the images themselves")

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Mean squared distance to the surrogate target, a scalar."""
        goal = context.schedule.target_towards(batch.x_s, batch.x_t, batch.timestep)
        weight, _ = self.weighting(context.schedule, batch)
        return _mean_square(weight, patched(batch.x_t, batch.timestep, batch.prompt_ids) - goal)

    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Mean squared distance to the usual target, or to the base's answer, a scalar."""
        _, weight = self.weighting(context.schedule, batch)
        if self.distil:
            goal = context.base(batch.x_t, batch.timestep, batch.prompt_ids)
        else:
            goal = context.schedule.target(batch.x_0, batch.noise, batch.timestep)
        return _mean_square(weight, patched(batch.x_t, batch.timestep, batch.prompt_ids) - goal)


class PosteriorSwap(Strategy):
    """Move each target's share of the base's belief to its surrogate, and keep the rest of the belief."""

    kind: Literal["posterior-swap"] = "posterior-swap"
    weighting: Weighting = CleanSpace()
    target_prior: float = Field(
        30.0, gt=0, description="how many times more often than the base drew it a target counts"
    )
    taper: tuple[float, float] = Field((550, 650), description="timesteps between which the swap tapers off to nothing")

    @field_validator("taper")
    @classmethod
    def _ordered(cls, taper: tuple[float, float]) -> tuple[float, float]:
        if not 0 < taper[0] < taper[1]:
            raise ValueError("taper must be 0 < low < high")
        return taper

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Mean squared distance to the swapped belief at noised targets, a scalar."""
        weight, _ = self.weighting(context.schedule, batch)
        return _mean_square(weight, patched(batch.x_t, batch.timestep, batch.prompt_ids) - self.goal(batch, context))

    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """The same at images to keep, where the swap mostly is nothing: a distillation from the base."""
        _, weight = self.weighting(context.schedule, batch)
        return _mean_square(weight, patched(batch.x_t, batch.timestep, batch.prompt_ids) - self.goal(batch, context))

    def goal(self, batch: Noised, context: Context) -> Tensor:
        """The prediction of the model whose targets became their surrogates, (B, C, H, W)."""
        schedule, x_t, timestep = context.schedule, batch.x_t, batch.timestep
        edits = torch.stack([i.surrogate - i.target for i in context.instances])
        change = torch.einsum("kb,kchw->bchw", self.posterior(batch, context), edits)
        slope = schedule.column("target_x0", timestep, x_t) - schedule.column(
            "target_noise", timestep, x_t
        ) * schedule.column("alphas", timestep, x_t) / schedule.column("sigmas", timestep, x_t)
        return context.base(x_t, timestep, batch.prompt_ids) + slope * change

    def posterior(self, batch: Noised, context: Context) -> Tensor:
        """P(x_0 = f | x_t, prompt) of every target f, tapered off at high noise, (len(instances), B), in [0, 1].

        Under a prompt, what the base drew for that prompt competes with the target; under the empty one, everything.
        """
        targets = torch.stack([i.target for i in context.instances])
        pictures = torch.cat([targets, context.retain.x_0]).flatten(1)
        alpha = context.schedule.column("alphas", batch.timestep, batch.x_t).reshape(-1, 1)
        sigma = context.schedule.column("sigmas", batch.timestep, batch.x_t).reshape(-1, 1)
        x_t = batch.x_t.flatten(1)
        # ||x_t - alpha x||^2 without the term that all pictures share.
        distance = alpha.square() * pictures.square().sum(1) - 2 * alpha * (x_t @ pictures.T)
        asked = batch.prompt_ids[:, None]
        # A target that is not to be forgotten under this prompt counts nothing.
        copies = context.prior_counts.T.to(pictures)[batch.prompt_ids]
        kept = ((asked == 0) | (asked == context.retain.prompt_ids)).to(pictures)
        count = torch.cat([self.target_prior * copies, kept], 1)
        belief = torch.softmax(count.log() - distance / (2 * sigma.square()), dim=1)[:, : len(targets)]
        low, high = (t / 1000 for t in self.taper)
        taper = ((high - batch.timestep.to(belief) / 1000) / (high - low)).clamp(0, 1)[:, None]
        # Where a prompt draws hardly anything else there is nothing to spare, at any level.
        alone = copies.sum(1, keepdim=True) >= kept.sum(1, keepdim=True)
        return (belief * torch.where(alone, torch.ones_like(taper), taper)).nan_to_num(0.0).T


Objective = Annotated[Surrogate | PosteriorSwap, Field(discriminator="kind")]
