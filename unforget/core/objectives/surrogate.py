"""The objective of arXiv:2603.10445."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unforget.core.objectives.weighting import Linear, Weighting, regression
from unforget.core.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class Surrogate(Strategy):
    """Make the clean image the surrogate at every noised target (arXiv:2603.10445)."""

    kind: Literal["surrogate"] = "surrogate"
    weighting: Weighting = Linear()
    distil: bool = Field(False, description="keep what the base says at retain images, not the images themselves")

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the surrogate target."""
        goal = context.schedule.target_towards(batch.x_s, batch.x_t, batch.timestep)
        return regression(patched, batch, goal, self.weighting(context.schedule, batch)[0])

    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the usual target, or to the base's answer."""
        if self.distil:
            goal = context.base(batch.x_t, batch.timestep, batch.prompt_ids)
        else:
            goal = context.schedule.target(batch.x_0, batch.noise, batch.timestep)
        return regression(patched, batch, goal, self.weighting(context.schedule, batch)[1])
