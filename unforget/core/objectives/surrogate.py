"""The objective of arXiv:2603.10445."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unforget.core.objectives.base import Regression
from unforget.core.objectives.weighting import Linear, Weighting, regression

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class Redirection(Regression):
    """Make the clean image another one at every noised target."""

    weighting: Weighting = Linear()
    one_noise: bool = Field(False, description="one timestep and one noise an update, for all images of both batches")

    def pair(
        self, forget: Noised, retain: Noised, context: Context, generator: torch.Generator
    ) -> tuple[Noised, Noised]:
        """As drawn, or all with the timestep and the noise of the first target."""
        if not self.one_noise:
            return forget, retain
        return _renoised(forget, forget, context), _renoised(retain, forget, context)

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the surrogate target."""
        goal = context.schedule.target_towards(batch.x_s, batch.x_t, batch.timestep)
        return regression(patched, batch, goal, self.weighting(context.schedule, batch)[0])


class Surrogate(Redirection):
    """Make the clean image the surrogate at every noised target (arXiv:2603.10445)."""

    kind: Literal["surrogate"] = "surrogate"


def _renoised(batch: Noised, first: Noised, context: Context) -> Noised:
    noise, timestep = first.noise[:1].expand_as(batch.x_0), first.timestep[:1].repeat(len(batch.x_0))
    x_t = context.schedule.add_noise(batch.x_0, noise, timestep)
    return replace(batch, noise=noise, timestep=timestep, x_t=x_t)
