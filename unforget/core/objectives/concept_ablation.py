"""Forgetting a prompt by another one's answer (Concept Ablation, arXiv:2303.13516)."""

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


class ConceptAblation(Regression):
    """Say under the prompt what the base says under none, at images drawn under none (arXiv:2303.13516)."""

    kind: Literal["concept-ablation"] = "concept-ablation"
    needs_surrogate: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = True

    def pair(
        self, forget: Noised, retain: Noised, context: Context, generator: torch.Generator
    ) -> tuple[Noised, Noised]:
        """With retain images of the anchor, the empty prompt, in the place of targets; any, if it has none."""
        import torch  # not above: a recipe is made without torch

        from unforget.core.types import UNCONDITIONAL

        own = (context.retain.prompt_ids == UNCONDITIONAL).nonzero()[:, 0]
        anchors = context.retain.x_0[own] if len(own) else context.retain.x_0
        x_0 = anchors[torch.randint(len(anchors), (len(forget.x_0),), generator=generator)]
        x_t = context.schedule.add_noise(x_0, forget.noise, forget.timestep)
        return replace(forget, x_0=x_0, x_t=x_t), retain

    def base_passes(self) -> tuple[int, int]:
        """Under the anchor."""
        return 1, int(self.distil)

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the base's answer under the anchor."""
        from unforget.core.types import UNCONDITIONAL

        goal = context.base(batch.x_t, batch.timestep, batch.prompt_ids * 0 + UNCONDITIONAL)
        return regression(patched, batch, goal, self.weighting(context.schedule, batch)[0])
