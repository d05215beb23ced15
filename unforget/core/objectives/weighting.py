"""How errors at different noise levels count: (forget, retain) weights of a batch, each (B, 1, 1, 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from unforget.core.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.schedule import Schedule
    from unforget.core.types import Noised, Predict


class Uniform(Strategy):
    """Weight every noise level equally in the network's own units."""

    kind: Literal["uniform"] = "uniform"
    retain: float = Field(1.0, ge=0, description="weight of the retain loss")

    def __call__(self, schedule: Schedule, batch: Noised) -> tuple[Tensor, Tensor]:
        one = batch.x_0.new_ones(len(batch.x_0), 1, 1, 1)
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


def regression(patched: Predict, batch: Noised, goal: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared distance of a network's answers to a goal, a scalar."""
    return (weight * (patched(batch.x_t, batch.timestep, batch.prompt_ids) - goal).square()).mean()
