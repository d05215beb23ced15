r"""Redirection to the nearest retain images (ReTrack, arXiv:2509.13007).

Of the k retain images :math:`x_i` that are nearest to the target, the loss at a noised target is

.. math:: \sum_i p_i \|\epsilon_\theta(x_t) - (x_t - \alpha_t x_i) / \sigma_t\|^2, \qquad p = \mathrm{softmax}_i(
    -\|x_t - \alpha_t x_i\|^2 / 2 \sigma_t^2),

which is the distance to the weighted mean of those noises and a number that no weight of the network changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from unforget.core.objectives.base import Regression
from unforget.core.objectives.weighting import regression

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict


class ReTrack(Regression):
    """Lead noised targets to the mean of their nearest retain images, as x_t weights them (arXiv:2509.13007)."""

    kind: Literal["retrack"] = "retrack"
    needs_surrogate: ClassVar[bool] = False
    nearest: int = Field(10, ge=1, le=10_000, description="number of retain images that a target is led to: k")

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the mean of the neighbours' noises."""
        return regression(patched, batch, self.goal(batch, context), self.weighting(context.schedule, batch)[0])

    def goal(self, batch: Noised, context: Context) -> Tensor:
        """The prediction that leads to the neighbours' mean, (B, C, H, W)."""
        import torch  # not above: a recipe is made without torch

        retained = context.retain.x_0.to(batch.x_0)
        distances = torch.cdist(batch.x_0.flatten(1), retained.flatten(1))
        rows = distances.topk(min(self.nearest, len(retained)), largest=False).indices
        alpha, sigma = (context.schedule.column(name, batch.timestep, batch.x_t) for name in ("alphas", "sigmas"))
        noises = (batch.x_t[:, None] - alpha[:, None] * retained[rows]) / sigma[:, None]
        belief = torch.softmax(-noises.square().sum((2, 3, 4)) / 2, 1)
        mean = torch.einsum("bk,bkchw->bchw", belief, retained[rows])
        return context.schedule.target_towards(mean, batch.x_t, batch.timestep)
