"""The losses of EraseDiff; its weight between them is a surgery of that name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from unforget.core.objectives.base import Regression
from unforget.core.objectives.weighting import regression

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class UniformNoise(Regression):
    """Take noise that is uniform in [0, 1] for what was added to a target (EraseDiff, arXiv:2401.05779)."""

    kind: Literal["erasediff"] = "erasediff"
    needs_surrogate: ClassVar[bool] = False

    def pair(
        self, forget: Noised, retain: Noised, context: Context, generator: torch.Generator
    ) -> tuple[Noised, Noised]:
        """With uniform noise as what is to be said; x_t is as it was."""
        import torch  # not above: a recipe is made without torch

        uniform = torch.rand(forget.noise.shape, generator=generator, dtype=forget.noise.dtype)
        return replace(forget, noise=uniform), retain

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """The usual loss, with that noise."""
        goal = context.schedule.target(batch.x_0, batch.noise, batch.timestep)
        return regression(patched, batch, goal, self.weighting(context.schedule, batch)[0])
