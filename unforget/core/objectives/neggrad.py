"""The two ends of data unlearning: to go on training without the target, or to train on it backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from unforget.core.objectives.base import Regression
from unforget.core.objectives.weighting import regression

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class NegGrad(Regression):
    """Climb the usual loss at noised targets; with the surgery `retain-only` this is naive deletion."""

    kind: Literal["neggrad"] = "neggrad"
    needs_surrogate: ClassVar[bool] = False

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Minus the usual loss."""
        goal = context.schedule.target(batch.x_0, batch.noise, batch.timestep)
        return -regression(patched, batch, goal, self.weighting(context.schedule, batch)[0])
