r"""Noise schedules as tables, parameterizations as two more columns.

Every affine path is :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`, and what a network is trained to say is affine
too: :math:`y = p_t x_0 + q_t \epsilon`. Predicting noise, velocity, the sample or a flow differ only in (p, q), so
nothing after loading asks which it is. A noise level is named by its timestep, as diffusers counts it; row 0 is the
cleanest one, and nothing outside this module counts rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """One row a noise level, from clean to noisy; each column has shape (T,), float64."""

    timesteps: Tensor  # what the network is told, as diffusers counts
    alphas: Tensor  # what multiplies x_0 (not alphas_cumprod)
    sigmas: Tensor  # what multiplies the noise (k-diffusion's sigma is sigma / alpha)
    target_x0: Tensor  # p_t
    target_noise: Tensor  # q_t

    def __len__(self) -> int:
        return len(self.timesteps)

    def column(self, name: str, timestep: Tensor, like: Tensor) -> Tensor:
        """A column at the rows nearest to `timestep` (B,), shaped (B, 1, ..., 1) to broadcast with `like` (B, ...)."""
        rows: Tensor = getattr(self, name)[self._rows(timestep)]
        return rows.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))

    def x0_scale(self, timestep: Tensor) -> Tensor:
        """|dx_0 / dprediction| at fixed x_t, (B,), float64: what a prediction error is worth in the clean image."""
        scale = (self.sigmas / (self.alphas * self.target_noise - self.sigmas * self.target_x0)).abs()
        return scale[self._rows(timestep)]

    def _rows(self, timestep: Tensor) -> Tensor:
        """The rows whose timesteps are nearest; of two equally near ones the cleaner."""
        asked = timestep.double().cpu().contiguous()
        above = torch.searchsorted(self.timesteps, asked).clamp(1, len(self) - 1)
        nearer = self.timesteps[above] - asked < asked - self.timesteps[above - 1]
        return torch.where(nearer, above, above - 1)

    def nearest(self, timestep: Tensor) -> Tensor:
        """The timesteps of the table that are nearest, (B,)."""
        found: Tensor = self.timesteps[self._rows(timestep)]
        return found

    def half_log_snr(self, timestep: Tensor) -> Tensor:
        r"""Half the logarithm of the signal-to-noise ratio, :math:`\lambda_t = \log(\alpha_t / \sigma_t)`, (B,)."""
        rows = self._rows(timestep)
        return (self.alphas[rows] / self.sigmas[rows]).log()

    def between(self, low: float, high: float) -> Tensor:
        """The timesteps from `low` to under `high`; the last one too, if `high` is no less than it."""
        rows = torch.searchsorted(self.timesteps, torch.tensor([low, high], dtype=torch.float64)).tolist()
        return self.timesteps[rows[0] : len(self) if high >= float(self.timesteps[-1]) else rows[1]]

    def share(self, share: float) -> float:
        """The timestep that is so far along the table: what diffusers' image-to-image pipelines call strength."""
        return float(self.timesteps[min(round(share * len(self)), len(self) - 1)])

    def add_noise(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        r""":math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`; all (B, ...)."""
        return self.column("alphas", timestep, x_0) * x_0 + self.column("sigmas", timestep, x_0) * noise

    def target(self, x_0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        r"""What the network is trained to say: :math:`p_t x_0 + q_t \epsilon`."""
        return self.column("target_x0", timestep, x_0) * x_0 + self.column("target_noise", timestep, x_0) * noise

    def target_towards(self, x_0: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        r"""What the network must say at x_t for its clean end to be x_0, with
        :math:`\epsilon' = (x_t - \alpha_t x_0) / \sigma_t` (arXiv:2603.10445, the surrogate target).

        Undefined at sigma = 0, where x_t already is the clean end.
        """
        noise = (x_t - self.column("alphas", timestep, x_t) * x_0) / self.column("sigmas", timestep, x_t)
        return self.target(x_0, noise, timestep)

    def split(self, x_t: Tensor, prediction: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Read a prediction back as (x_0, noise)."""
        names = ("alphas", "sigmas", "target_x0", "target_noise")
        a, s, p, q = (self.column(name, timestep, x_t) for name in names)
        det = a * q - s * p
        return (q * x_t - s * prediction) / det, (a * prediction - p * x_t) / det

    def step(self, x_0: Tensor, x_t: Tensor, timestep: Tensor, then: Tensor, fresh: Tensor | None = None) -> Tensor:
        r"""x at the cleaner timestep `then`, of x_t and the image that it is led to.

        Deterministic, as DDIM and Euler; with `fresh` noise ancestral, as DDPM: DDIM's eta is 1 (arXiv:2010.02502,
        equations 12 and 16), its variance what the forward process leaves open, on any affine path. The timesteps are
        (B,), all else is (B, ...).
        """
        a, s = (self.column(name, timestep, x_0) for name in ("alphas", "sigmas"))
        alpha, sigma = (self.column(name, then, x_0) for name in ("alphas", "sigmas"))
        noise = (x_t - a * x_0) / s
        if fresh is None:
            return alpha * x_0 + sigma * noise
        share = (1 - (a * sigma / (alpha * s)) ** 2).clamp(0, 1)
        return alpha * x_0 + sigma * ((1 - share).sqrt() * noise + share.sqrt() * fresh)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> Schedule:
        """The table of a diffusers scheduler: any with `alphas_cumprod`, or one of a flow, whatever it has."""
        kind = scheduler.config.get("prediction_type", "flow_prediction")
        if kind == "flow_prediction":
            sigmas = _flow_sigmas(scheduler)
            alphas, timesteps = 1 - sigmas, sigmas * scheduler.config.num_train_timesteps
        elif hasattr(scheduler, "alphas_cumprod"):
            cumprod = scheduler.alphas_cumprod.double()
            alphas, sigmas = cumprod.sqrt(), (1 - cumprod).sqrt()
            timesteps = torch.arange(len(cumprod), dtype=torch.float64)
        else:
            raise _unknown(scheduler)
        zeros, ones = torch.zeros_like(alphas), torch.ones_like(alphas)
        columns = {
            "epsilon": (zeros, ones), "v_prediction": (-sigmas, alphas), "sample": (ones, zeros),
            "flow_prediction": (-ones, ones),
        }  # fmt: skip
        if kind not in columns:
            raise ValueError(f"Unknown prediction type '{kind}'; known: {', '.join(columns)}.")
        return cls(timesteps, alphas, sigmas, *columns[kind])


def _flow_sigmas(scheduler: Any) -> Tensor:
    """Of a flow, from clean to noisy, (T,), float64."""
    if "FlowMatch" in type(scheduler).__name__:
        # diffusers stores them from noisy to clean, with a closing 0 once set_timesteps was called.
        sigmas: Tensor = scheduler.sigmas.double().flip(0)
        return sigmas[sigmas > 0]
    if not scheduler.config.get("use_flow_sigmas"):
        raise _unknown(scheduler)
    # A solver, which shifts them when it is given its steps.
    count = int(scheduler.config.num_train_timesteps)
    return torch.arange(1, count + 1, dtype=torch.float64) / count


def _unknown(scheduler: Any) -> ValueError:
    return ValueError(f"Unknown noise schedule '{type(scheduler).__name__}'.")
