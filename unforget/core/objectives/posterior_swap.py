r"""Our objective: the clean image is what the base thinks, with a target's share of that belief moved to its surrogate.

With target f and surrogate s,

.. math:: \hat x_0'(x_t) = \hat x_0^{base}(x_t) + \sum_f w_f(x_t) (s - f), \qquad w_f(x_t) = P(x_0 = f \mid x_t).

A denoiser answers with the posterior mean, so this is exactly the denoiser of the model whose every f became s. Where f
can be told from everything else w is 1, and the objective agrees with `Surrogate`; where it cannot (high noise, a
look-alike) w falls to f's share and the model keeps what it said. The weight is the posterior under the empirical
measure of the target, some times as often as the base draws it (the target prior), and of images to retain. At the
highest levels it tapers off: a change there moves every sample and is not needed to forget (docs/results.md).

What the changed model draws passes through noised surrogates, where the base never was: it may answer s there, and the
edit would be added twice. Where the batches hold noised surrogates these compete in the belief, and what is theirs
becomes s, whatever the base says,

.. math:: \hat x_0'(x_t) = \hat x_0^{base} + \sum_f w_f (s - f) + \sum_s w_s (s - \hat x_0^{base}).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unforget.core.objectives.base import BaseObjective
from unforget.core.objectives.weighting import CleanSpace, Weighting, regression
from unforget.core.strategy import Span

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.objectives import Context
    from unforget.core.types import Noised, Predict

NUMBERS = 3072
"""Numbers of an image that count as independent evidence, at most: all of a 32x32 one. Neighbouring pixels agree, and
what the base has learnt is no list of images: beyond, an image counts by its mean squared distance alone."""
LARGE_EDIT = 0.35
"""Mean square, in what the network works on, from which on an edit is large: it is not damped."""


class PosteriorSwap(BaseObjective):
    """Move each target's share of the base's belief to its surrogate, and keep the rest of the belief."""

    kind: Literal["posterior-swap"] = "posterior-swap"
    weighting: Weighting = CleanSpace()
    target_prior: float = Field(
        30.0, gt=0, description="how many times more often than the base drew it a target counts"
    )
    taper: Span = Field((550, 650), description="timesteps between which the swap tapers off to nothing")
    normalize_edit: bool = Field(False, description="divide the forget loss by the mean square of a small edit")

    def base_passes(self) -> tuple[int, int]:
        """The belief is a change of what the base says."""
        return 1, 1

    def forget(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """Distance to the swapped belief at noised targets."""
        weight = self.weighting(context.schedule, batch)[0]
        if self.normalize_edit:  # else a small edit is drowned by the retain loss
            weight = weight / _edit_sizes(batch, context)
        return regression(patched, batch, self.goal(batch, context), weight)

    def retain(self, patched: Predict, batch: Noised, context: Context) -> Tensor:
        """The same at retain images, where the swap mostly is nothing: a distillation from the base."""
        return regression(patched, batch, self.goal(batch, context), self.weighting(context.schedule, batch)[1])

    def goal(self, batch: Noised, context: Context) -> Tensor:
        """The prediction of the model whose targets became their surrogates, (B, C, H, W)."""
        import torch  # not above: a recipe is made without torch

        schedule, x_t, timestep = context.schedule, batch.x_t, batch.timestep
        targets, surrogates = (torch.stack([vars(i)[n] for i in context.instances]) for n in ("target", "surrogate"))
        posterior = self.posterior(batch, context)
        belief, arrived = posterior[: len(targets)], posterior[len(targets) :]
        answer = context.base(x_t, timestep, batch.prompt_ids)
        change = torch.einsum("kb,kchw->bchw", belief, surrogates - targets)
        if context.surrogates:
            drawn = schedule.split(x_t, answer, timestep)[0]
            change += torch.einsum("kb,kchw->bchw", arrived, surrogates) - arrived.sum(0)[:, None, None, None] * drawn
        alpha, sigma, p, q = (
            schedule.column(name, timestep, x_t) for name in ("alphas", "sigmas", "target_x0", "target_noise")
        )
        return answer + (p - q * alpha / sigma) * change

    def posterior(self, batch: Noised, context: Context) -> Tensor:
        """P(x_0 = f | x_t, prompt) of every target f, then of every surrogate if they count, (rows, B), in [0, 1].

        It tapers off at high noise. Under a prompt, what the base drew for that prompt competes; without one,
        everything.
        """
        import torch

        from unforget.core.types import UNCONDITIONAL

        sides = ("target", "surrogate") if context.surrogates else ("target",)
        moved = torch.stack([vars(i)[side] for side in sides for i in context.instances])
        images = torch.cat([moved, context.retain.x_0]).flatten(1)
        alpha = context.schedule.column("alphas", batch.timestep, batch.x_t).reshape(-1, 1)
        sigma = context.schedule.column("sigmas", batch.timestep, batch.x_t).reshape(-1, 1)
        # ||x_t - alpha x||^2 without the term that all images share.
        distance = alpha.square() * images.square().sum(1) - 2 * alpha * (batch.x_t.flatten(1) @ images.T)
        prompt_ids = batch.prompt_ids[:, None]
        # A target that is not to be forgotten under this prompt counts nothing.
        copies = context.prior_counts.T.to(images)[batch.prompt_ids]
        retained = ((prompt_ids == UNCONDITIONAL) | (prompt_ids == context.retain.prompt_ids)).to(images)
        count = torch.cat([self.target_prior * copies] * len(sides) + [retained], 1)
        # Of a large image every distance is certain, and prior and look-alikes would count for nothing.
        evidence = min(1.0, NUMBERS / images.shape[1]) / (2 * sigma.square())
        belief = torch.softmax(count.log() - distance * evidence, dim=1)[:, : len(moved)]
        low, high = (t / 1000 for t in self.taper)
        taper = ((high - batch.timestep.to(belief) / 1000) / (high - low)).clamp(0, 1)[:, None]
        # Where a prompt draws hardly anything else there is nothing to spare, at any level.
        alone = copies.sum(1, keepdim=True) >= retained.sum(1, keepdim=True)
        return (belief * torch.where(alone, torch.ones_like(taper), taper)).nan_to_num(0.0).T


def _edit_sizes(batch: Noised, context: Context) -> Tensor:
    """Mean square of the edit that each image of a forget batch belongs to, `LARGE_EDIT` at most, (B, 1, 1, 1)."""
    import torch

    targets, surrogates = (torch.stack([vars(i)[n] for i in context.instances]) for n in ("target", "surrogate"))
    own = torch.cdist(batch.x_s.flatten(1), surrogates.flatten(1)).argmin(1)
    return (surrogates - targets).square().mean((1, 2, 3)).clamp(max=LARGE_EDIT)[own].reshape(-1, 1, 1, 1)
