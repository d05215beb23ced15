"""The nouns that the other modules share: protocols and records without behaviour.

Images are float tensors in [-1, 1]; a batch of them is (B, C, H, W). What the network works on, x_0 and x_t, are the
images themselves or, in a latent model, their latents. `timestep` is a noise level as diffusers counts, (B,), and
`prompt_ids` are rows of the family's table of prompts, (B,), where `UNCONDITIONAL` is the empty prompt (the only one of
a model without prompts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unforget.core.strategy import Scope as Scope
from unforget.core.strategy import Strategy as Strategy

if TYPE_CHECKING:
    from unforget.core.schedule import Schedule


UNCONDITIONAL = 0  # the id of "no prompt" in every family's table
LARGE = 500_000_000  # weights from which on a model is treated with care for memory


@dataclass(frozen=True)
class Instance:
    """One image to forget and what the model may generate instead, each (C, H, W), as images or encoded."""

    target: Tensor
    surrogate: Tensor
    id: str  # first 16 hex digits of the salted digest of the target's pixels
    prompt_ids: tuple[int, ...] = (UNCONDITIONAL,)  # under which it is to be forgotten


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
    x_t: Tensor  # x_0 with the noise added
    x_s: Tensor  # what each must become: its surrogate, or x_0 itself for what is to be retained
    prompt_ids: Tensor

    def __getitem__(self, which: Tensor | slice) -> Noised:
        return Noised(*(column[which] for column in vars(self).values()))


class Trajectory(NamedTuple):
    """A way from noise to an image, other than a family's own sampler takes."""

    timesteps: Tensor  # that are visited, (K,), from noisy to clean
    seeds: Tensor | None = None  # (B,) of the noise that each image gets at every step: ancestral sampling
    guidance: float | None = None  # instead of the model's own, where it has one

    def between(self, start: float | None, stop: float = -1) -> Trajectory:
        """The part of it from timestep `start` on, or the whole, above `stop`."""
        inside = (self.timesteps > stop) & (self.timesteps <= (math.inf if start is None else start))
        return self._replace(timesteps=self.timesteps[inside])

    def of(self, rows: Tensor) -> Trajectory:
        """That of some of the images."""
        return self._replace(seeds=None if self.seeds is None else self.seeds[rows])


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network's answer at (x_t, timestep, prompt_ids), in its own parameterization."""


class Family(Protocol):
    """A loaded model: the one place that knows what kind it is."""

    spec: Any  # what is particular of the family: a `families.spec.FamilySpec`
    name: str  # what the user called the model
    schedule: Schedule
    network: nn.Module  # the one whose weights are trained
    latent_shape: tuple[int, int, int]  # (C, H, W) of what the network works on
    image_shape: tuple[int, int, int]
    prompts: list[str]  # the table of prompts, by id; the first is empty
    guidance: float | None  # of its draws, where there is such
    batch_size: int | None  # images in one pass without gradients; None: by their size
    retain_prompts: tuple[str, ...]  # under which retain images are drawn, unless the user gives others
    device: torch.device  # where the network works

    @property
    def guided(self) -> bool:
        """Whether a draw under a prompt asks the network twice at each step."""

    @property
    def scheduler_config(self) -> Any:
        """Of its diffusers scheduler, from which others are built."""

    def predict(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor: ...
    def prompt_ids(self, prompts: Sequence[str]) -> Tensor: ...  # (len(prompts),); new ones are embedded and added
    def learnable_embedding(self, prompt_id: int) -> tuple[int, list[Tensor]]: ...  # a new row like it, and its tensors
    def unload_text_encoders(self) -> None: ...  # what only `prompt_ids` needs
    def made_by(
        self, prompts: Sequence[str]
    ) -> list[Any]: ...  # all that draws depend on but weights and noise, as JSON
    def encode(self, pictures: Tensor) -> Tensor: ...  # to x_0: the mean of a posterior, not a draw from it
    def decode(self, x_0: Tensor) -> Tensor: ...  # to images in [-1, 1]
    def sampling_timesteps(self, steps: int) -> list[float]: ...  # that `denoise` visits, from noisy to clean
    def copy(self) -> Family: ...  # with equal, frozen weights
    def frozen_reference(self, scope: Scope) -> Family: ...  # as it is now, whatever happens to a scope's weights
    def set_network(self, network: nn.Module | None) -> None: ...  # None frees the memory of the present one

    def trainable(self, scope: Scope, *, rank: int = 16, alpha: int = 16, seed: int = 0) -> list[nn.Parameter]:
        """The weights of a scope, in the network's order, or a UsageError; the numbers make the adapter of `lora`."""

    def denoise(
        self, x_t: Tensor, *, steps: int | Trajectory, start: float | None = None, stop: float = -1,
        prompt_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Sampling from noise, or from timestep `start` on; returns x_0. So many steps are deterministic.

        With `stop` only the timesteps above it are visited, and what is returned is as noisy as the next one.
        """

    def replay(self, seed: int, *, steps: int, scheduler: str | None, prompt_ids: Tensor) -> Tensor:
        """One x_0, (1, ...), as the stock pipeline draws it from a CPU generator with that seed.

        `scheduler` is diffusers' class of the sampler; None is that of `denoise`. Others may be a UsageError.
        """


@dataclass
class Progress:
    """Where a command's progress goes: the start of a stage (title, total), units done with figures worth showing, and
    sentences for the user. The default is nowhere; `cli` draws it."""

    stage: Callable[[str, int], Any] = lambda title, total: None
    advance: Callable[..., Any] = lambda n=1, **figures: None
    note: Callable[[str], Any] = lambda sentence: None
