"""The nouns that the other modules share: protocols and records without behaviour.

Images are float tensors in [-1, 1]; a batch of them is (B, C, H, W). `index` is a row of the noise schedule, (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unforget.schedule import Schedule


Scope = Literal["bottleneck", "full"]
"""Which weights are trained: `bottleneck`, those that tell one picture from another, or `full`, all."""


class Strategy(BaseModel):
    """A choice that is its own configuration: fields with bounds, a docstring that is its help, and `__call__`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Instance:
    """One picture to forget and what the model may say instead.

    Attributes:
        target: The picture, (C, H, W) in [-1, 1].
        surrogate: Its replacement, same shape.
        id: First 16 hex digits of the digest of the target's pixels.
    """

    target: Tensor
    surrogate: Tensor
    id: str


@dataclass(frozen=True)
class Noised:
    """Clean images, the noise put on them, and the level: all that a denoising loss needs.

    Attributes:
        x_0: Clean images, (B, C, H, W).
        noise: Standard normal, (B, C, H, W).
        index: Noise levels, (B,).
        x_t: x_0 with the noise added, (B, C, H, W).
        x_s: What each must become (the surrogate of each target), or x_0 itself for images to keep.
    """

    x_0: Tensor
    noise: Tensor
    index: Tensor
    x_t: Tensor
    x_s: Tensor


class Predict(Protocol):
    """A network's answer at (x_t, index), in its own parameterization."""

    def __call__(self, x_t: Tensor, index: Tensor) -> Tensor: ...


class Family(Protocol):
    """A loaded model: the one place that knows what kind it is."""

    schedule: Schedule
    network: nn.Module
    """The network whose weights are trained."""
    shape: tuple[int, int, int]
    """(C, H, W) of one image."""
    name: str
    """What the user called the model."""

    @property
    def scheduler_config(self) -> Any:
        """Configuration of its diffusers scheduler, from which others are built."""
        ...

    def predict(self, x_t: Tensor, index: Tensor) -> Tensor:
        """The network's answer at (x_t, index)."""
        ...

    def trainable(self, scope: Scope) -> list[nn.Parameter]:
        """The weights of a scope, in the network's order."""
        ...

    def denoise(self, x_t: Tensor, *, steps: int, start: int | None = None) -> Tensor:
        """Deterministic sampling from noise, or from level `start` of the schedule; returns images."""
        ...

    def levels(self, steps: int) -> list[int]:
        """The schedule rows that `denoise` visits, from noisy to clean."""
        ...

    def copy(self) -> Family:
        """An independent model with equal, frozen weights."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that the stock loader opens."""
        ...


@dataclass
class Listener:
    """Where a command's progress goes; the default is nowhere. `cli` draws it.

    Attributes:
        stage: Called with a title and a total when a piece of work starts.
        advance: Called with the number of units done, and figures worth showing.
        note: Called with a sentence that the user should see.
    """

    stage: Callable[[str, int], Any] = field(default=lambda title, total: None)
    advance: Callable[..., Any] = field(default=lambda n=1, **figures: None)
    note: Callable[[str], Any] = field(default=lambda sentence: None)
