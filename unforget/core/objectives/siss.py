r"""Subtracted importance sampled scores (arXiv:2503.01034).

Naive deletion's loss minus NegGrad's, both at the same noised images: of a pair of a target f and a retain image r with
the same timestep and noise, f is what is noised with probability lambda, so :math:`m_t \sim q_\lambda = (1 - \lambda)
q(m_t|r) + \lambda q(m_t|f)`. Each loss is weighted by how likely its own image is to have become m_t,

.. math:: w_r = \frac{q(m_t|r)}{q_\lambda(m_t)}, \qquad w_f = \frac{q(m_t|f)}{q_\lambda(m_t)},

and has the noise that would have made m_t of its image as its goal. The paper scales the second gradient to about a
tenth of the first: the surgery `fixed-norm`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from unforget.core.objectives.base import Regression
from unforget.core.objectives.weighting import regression

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class SISS(Regression):
    """Subtract the target's loss from the retain images', at a mixture of both, importance weighted (arXiv:2503.01034).

    In its batches x_0 is the retain image and x_s the target of each pair.
    """

    kind: Literal["siss"] = "siss"
    needs_surrogate: ClassVar[bool] = False
    mixture: float = Field(0.5, gt=0, lt=1, description="share of the noised images that are targets: lambda")

    def pair(
        self, forget: Noised, retain: Noised, context: Context, generator: torch.Generator
    ) -> tuple[Noised, Noised]:
        """Mixed batches, one and the same if they are equally large; prompts go with what is noised."""
        import torch  # not above: a recipe is made without torch

        from unforget.core.types import Noised

        rows = torch.arange(max(len(forget.x_0), len(retain.x_0)))
        f, r = (batch[rows % len(batch.x_0)] for batch in (forget, retain))
        is_target = torch.rand(len(rows), generator=generator) < self.mixture
        shown = f.x_0.where(is_target[:, None, None, None], r.x_0)
        m_t = context.schedule.add_noise(shown, r.noise, r.timestep)
        prompt_ids = f.prompt_ids.where(is_target, r.prompt_ids)
        mixed = Noised(r.x_0, r.noise, r.timestep, m_t, f.x_0, prompt_ids)
        return mixed[: len(forget.x_0)], mixed[: len(retain.x_0)]

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Minus the distance to the target's own noise, weighted by w_f."""
        goal = context.schedule.target_towards(batch.x_s, batch.x_t, batch.timestep)
        weight = self.importance(batch, context)[0] * self.weighting(context.schedule, batch)[0]
        return -regression(patched, batch, goal, weight)

    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the retain image's own noise, or to the base's answer, weighted by w_r."""
        weight = self.importance(batch, context)[1] * self.weighting(context.schedule, batch)[1]
        return regression(patched, batch, self.kept(batch, context), weight)

    def kept(self, batch: Noised, context: Context) -> Tensor:
        """As of every regression, but m_t need not be the retain image with its noise."""
        if self.distil:
            return super().kept(batch, context)
        return context.schedule.target_towards(batch.x_0, batch.x_t, batch.timestep)

    def importance(self, batch: Noised, context: Context) -> tuple[Tensor, Tensor]:
        """w_f and w_r, each (B, 1, 1, 1), in [0, 1 / lambda] and [0, 1 / (1 - lambda)]."""
        alpha, sigma = (context.schedule.column(name, batch.timestep, batch.x_t) for name in ("alphas", "sigmas"))
        far_r, far_f = (((batch.x_t - alpha * x) / sigma).square() for x in (batch.x_0, batch.x_s))
        log_ratio = (far_r - far_f).sum((1, 2, 3), keepdim=True) / 2  # of q(m_t|f) to q(m_t|r)
        belief = log_ratio + math.log(self.mixture / (1 - self.mixture))
        return belief.sigmoid() / self.mixture, (-belief).sigmoid() / (1 - self.mixture)
