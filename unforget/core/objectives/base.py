"""What all objectives share, those of your own too: two losses, what they need, and how a pair of batches is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from unforget.core.objectives.weighting import Uniform, Weighting, regression
from unforget.core.strategy import Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class BaseObjective(Strategy, ABC):
    """Two losses, both minimised. Its fields are its configuration: they are recorded in the patch, by name.

    Subclass it for an objective of your own, give it a `kind`, its name, and pass it to `unforget.unlearn`. A loss is
    asked for a few images of a batch at a time, so what it draws by chance it draws in `pair`.
    """

    kind: str
    needs_surrogate: ClassVar[bool] = True  # else none is made where none is given
    needs_prompt: ClassVar[bool] = False  # whether there is nothing to forget without a prompt

    def pair(
        self, forget: Noised, retain: Noised, context: Context, generator: torch.Generator
    ) -> tuple[Noised, Noised]:
        """The batches that an update is shown, of those that were drawn for it; whole ones, of the same sizes.

        `generator` is that of the run: it goes on where it was when the run is resumed.
        """
        return forget, retain

    def base_passes(self) -> tuple[int, int]:
        """Answers of the base that the two losses ask for at each image of their batch."""
        return 0, 0

    @abstractmethod
    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Mean loss at noised targets, a scalar."""

    @abstractmethod
    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Mean loss at noised retain images, a scalar."""


class Regression(BaseObjective):
    """An objective with the retain loss that nearly all papers have: ordinary denoising."""

    weighting: Weighting = Uniform()
    distil: bool = Field(False, description="keep what the base says at retain images, not the images themselves")

    def base_passes(self) -> tuple[int, int]:
        """One a retain image, to distil from."""
        return 0, int(self.distil)

    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the usual target, or to the base's answer."""
        goal = self.kept(batch, context)
        return regression(patched, batch, goal, self.weighting(context.schedule, batch)[1])

    def kept(self, batch: Noised, context: Context) -> Tensor:
        """What is to be said at noised retain images, (B, C, H, W)."""
        if self.distil:
            return context.base(batch.x_t, batch.timestep, batch.prompt_ids)
        return context.schedule.target(batch.x_0, batch.noise, batch.timestep)
