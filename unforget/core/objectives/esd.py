"""Forgetting a prompt by negative guidance (ESD, arXiv:2303.07345)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from unforget.core.objectives.base import Regression
from unforget.core.objectives.weighting import regression

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class ESD(Regression):
    """Say under the prompt what leads away from it: base("") - eta (base(prompt) - base("")) (arXiv:2303.07345)."""

    kind: Literal["esd"] = "esd"
    needs_surrogate: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = True
    negative_guidance: float = Field(1.0, ge=0, description="how far away from the prompt: eta")

    def base_passes(self) -> tuple[int, int]:
        """Under the prompt and under none."""
        return 2, int(self.distil)

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the negative guidance of the base."""
        return regression(patched, batch, self.goal(batch, context), self.weighting(context.schedule, batch)[0])

    def goal(self, batch: Noised, context: Context) -> Tensor:
        """What is to be said under the prompt, (B, C, H, W)."""
        from unforget.core.types import UNCONDITIONAL

        asked = context.base(batch.x_t, batch.timestep, batch.prompt_ids)
        empty = context.base(batch.x_t, batch.timestep, batch.prompt_ids * 0 + UNCONDITIONAL)
        return empty - self.negative_guidance * (asked - empty)
