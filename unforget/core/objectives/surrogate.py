"""The objective of arXiv:2603.10445."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unforget.core.objectives.weighting import Linear, Weighting, mean_square
from unforget.core.strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.objectives.context import Context
    from unforget.core.types import Noised, Predict


class Surrogate(Strategy):
    """Make the clean image the surrogate at every noised target (arXiv:2603.10445)."""

    kind: Literal["surrogate"] = "surrogate"
    weighting: Weighting = Linear()
    distil: bool = Field(False, description="keep what the base says at retain images, not the images themselves")

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Mean squared distance to the surrogate target, a scalar."""
        goal = context.schedule.target_towards(batch.x_s, batch.x_t, batch.timestep)
        weight, _ = self.weighting(context.schedule, batch)
        return mean_square(weight, patched(batch.x_t, batch.timestep, batch.prompt_ids) - goal)

    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Mean squared distance to the usual target, or to the base's answer, a scalar."""
        _, weight = self.weighting(context.schedule, batch)
        if self.distil:
            goal = context.base(batch.x_t, batch.timestep, batch.prompt_ids)
        else:
            goal = context.schedule.target(batch.x_0, batch.noise, batch.timestep)
        return mean_square(weight, patched(batch.x_t, batch.timestep, batch.prompt_ids) - goal)
