"""How often an image goes through the network: the unit in which a command counts what it will cost.

An image without gradients is one pass; guidance makes it two. An image that is trained on is three (there, back to the
activations, back to the weights), one more where blocks are computed again, and one for the base's answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unforget.core.types import UNCONDITIONAL

WITH_GRADIENTS = 3
"""Passes that an image with gradients counts."""
PIXELS_DRAWN = PIXELS_TRAINED = 32 * 32 * 32
"""Pixels in one pass on a CPU, without and with gradients, unless the user says how many images."""
PIXELS_DRAWN_FAST = 4 * 1024 * 1024
"""The same without gradients on any other device, which is idle with less."""
LARGE_IMAGE = 512 * 512
"""Pixels of an image from which on fewer images must do: the one rule of what is large."""


class Outline(Protocol):
    """What the cost of a model depends on; a `Family` has it, and so has a model that is not loaded."""

    image_shape: tuple[int, int, int]
    device: Any  # a torch.device
    batch_size: int | None  # images in one pass without gradients; None: by their size

    @property
    def guided(self) -> bool: ...

    def sampling_timesteps(self, steps: int) -> list[float]: ...


@dataclass(frozen=True)
class Count:
    """A number that is known before only as the least and the most it may become."""

    least: int = 0
    most: int = 0

    @classmethod
    def of(cls, number: int) -> Count:
        """A number that is known."""
        return cls(number, number)

    def __add__(self, other: Count) -> Count:
        return Count(self.least + other.least, self.most + other.most)

    def __str__(self) -> str:
        return f"{self.least:,}" + (f" to {self.most:,}" if self.most > self.least else "")

    def __rmul__(self, times: int) -> Count:
        return Count(times * self.least, times * self.most)

    def __or__(self, other: Count) -> Count:
        """The larger one, at the least and at the most."""
        return Count(max(self.least, other.least), max(self.most, other.most))


def is_large(image_shape: tuple[int, int, int]) -> bool:
    """Whether images (C, H, W) are so large that fewer of them must do."""
    return image_shape[1] * image_shape[2] >= LARGE_IMAGE


def in_one_pass(pixels: int, shape: tuple[int, int, int]) -> int:
    """How many images of a shape make up `pixels`, at least one."""
    return max(1, pixels // (shape[1] * shape[2]))


def drawn_in_one_pass(model: Outline) -> int:
    """How many images a model draws at once where it is."""
    if model.batch_size is not None:
        return model.batch_size
    return in_one_pass(PIXELS_DRAWN if model.device.type == "cpu" else PIXELS_DRAWN_FAST, model.image_shape)


def calls(model: Outline, steps: int, start: float | None = None, stop: float = -1) -> int:
    """Timesteps that `denoise` visits: all, or those from `start` on, above `stop`."""
    return sum(stop < t <= (math.inf if start is None else start) for t in model.sampling_timesteps(steps))


def drawn(model: Outline, prompt_ids: Sequence[int], calls: int) -> int:
    """Passes of a draw under each prompt, in batches as drawn: guidance doubles those with a prompt in them."""
    size, guided = drawn_in_one_pass(model), model.guided
    batches = (prompt_ids[i : i + size] for i in range(0, len(prompt_ids), size))
    return calls * sum(len(b) * (1 + (guided and any(id != UNCONDITIONAL for id in b))) for b in batches)
