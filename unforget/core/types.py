"""The nouns that the other modules share: protocols and records without behaviour.

Images are float tensors in [-1, 1]; a batch of them is (B, C, H, W). What the network works on, x_0 and x_t, are the
images themselves or, in a latent model, their latents. `timestep` is a noise level as diffusers counts, (B,), and
`prompt_ids` are rows of the family's table of prompts, (B,), where `UNCONDITIONAL` is the empty prompt (the only one of
a model without prompts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from unforget.core.strategy import Scope as Scope
from unforget.core.strategy import Strategy as Strategy

if TYPE_CHECKING:
    from unforget.core.schedule import Schedule


UNCONDITIONAL = 0
"""The id of "no prompt" in every family's table."""
LARGE = 500_000_000
"""Weights from which on a model is treated with care for memory."""


@dataclass(frozen=True)
class Instance:
    """One image to forget and what the model may generate instead, each (C, H, W), as images or encoded."""

    target: Tensor
    surrogate: Tensor
    id: str
    """First 16 hex digits of the salted digest of the target's pixels."""
    prompt_ids: tuple[int, ...] = (UNCONDITIONAL,)
    """Under which it is to be forgotten."""


@dataclass(frozen=True)
class Pool:
    """Images or latents, (N, ...), and the prompt_ids that each was drawn under, (N,)."""

    x_0: Tensor
    prompt_ids: Tensor

    def __len__(self) -> int:
        return len(self.x_0)

    def __getitem__(self, which: Tensor | slice) -> Pool:
        return Pool(self.x_0[which], self.prompt_ids[which])

    @classmethod
    def of(cls, x_0: Tensor) -> Pool:
        """A pool without prompts."""
        return cls(x_0, torch.full((len(x_0),), UNCONDITIONAL))

    @classmethod
    def cat(cls, *pools: Pool) -> Pool:
        """Several pools as one."""
        return cls(torch.cat([p.x_0 for p in pools]), torch.cat([p.prompt_ids for p in pools]))


@dataclass(frozen=True)
class Noised:
    """All that a denoising loss needs of a batch: (B, C, H, W), and (B,) for `timestep` and `prompt_ids`."""

    x_0: Tensor
    noise: Tensor
    timestep: Tensor
    x_t: Tensor
    """x_0 with the noise added."""
    x_s: Tensor
    """What each must become (the surrogate of each target), or x_0 itself for what is to be retained."""
    prompt_ids: Tensor


class Predict(Protocol):
    """A network's answer at (x_t, timestep, prompt_ids), in its own parameterization."""

    def __call__(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor: ...


class Family(Protocol):
    """A loaded model: the one place that knows what kind it is."""

    spec: Any
    """What is particular of the family: a `families.spec.FamilySpec`."""
    name: str
    """What the user called the model."""
    schedule: Schedule
    network: nn.Module
    """The network whose weights are trained."""
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    """(C, H, W) of what the network works on, and of an image."""
    prompts: list[str]
    """The table of prompts, by id; the first is empty."""
    guidance: float | None
    """Classifier-free guidance of its draws, where there is such."""
    retain_prompts: tuple[str, ...]
    """Prompts under which retain images are drawn, unless the user gives others."""

    @property
    def scheduler_config(self) -> Any:
        """Configuration of its diffusers scheduler, from which others are built."""

    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """The id of each prompt, (len(prompts),); new ones are embedded and added."""

    def encode(self, pictures: Tensor) -> Tensor:
        """Images as the network works on them, without noise: the mean of a posterior, not a draw from it."""

    def decode(self, x_0: Tensor) -> Tensor:
        """The inverse of `encode`, in [-1, 1]."""

    def unload_text_encoders(self) -> None:
        """Free what only `prompt_ids` needs."""

    def predict(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        """The network's answer."""

    def trainable(self, scope: Scope, *, rank: int = 16, alpha: int = 16, seed: int = 0) -> list[nn.Parameter]:
        """The weights of a scope, in the network's order, or a UsageError; the numbers make the adapter of `lora`."""

    def denoise(
        self, x_t: Tensor, *, steps: int, start: float | None = None, stop: float = -1, prompt_ids: Tensor | None = None
    ) -> Tensor:
        """Deterministic sampling from noise, or from timestep `start` on, under prompts; returns x_0.

        With `stop` only the timesteps above it are visited, and what is returned is as noisy as the next one.
        """

    def replay(self, seed: int, *, steps: int, scheduler: str | None, prompt_ids: Tensor) -> Tensor:
        """One x_0, (1, ...), as the stock pipeline draws it from a CPU generator with that seed.

        `scheduler` is diffusers' class of the sampler; None is that of `denoise`. Others may be a UsageError.
        """

    def sampling_timesteps(self, steps: int) -> list[float]:
        """The timesteps that `denoise` visits, from noisy to clean."""

    def copy(self) -> Family:
        """An independent model with equal, frozen weights."""

    def frozen_reference(self, scope: Scope) -> Family:
        """The model as it is now, whatever happens to the weights of a scope."""

    def set_network(self, network: nn.Module | None) -> None:
        """Take another network of the same architecture; None frees the memory of the present one."""


@dataclass
class Progress:
    """Where a command's progress goes; the default is nowhere. `cli` draws it."""

    stage: Callable[[str, int], Any] = lambda title, total: None
    """Called with a title and a total when a piece of work starts."""
    advance: Callable[..., Any] = lambda n=1, **figures: None
    """Called with the number of units done, and figures worth showing."""
    note: Callable[[str], Any] = lambda sentence: None
    """Called with a sentence that the user should see."""
