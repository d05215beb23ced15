"""The one place where images and latents are noised, denoised and drawn."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from unforget.core import distributed
from unforget.core.schedule import Schedule
from unforget.core.types import UNCONDITIONAL, Family, Noised

PIXELS_DRAWN = PIXELS_TRAINED = 32 * 32 * 32
"""Pixels in one pass, without and with gradients, unless the user says how many images."""
PIXELS_ON_DEVICE = 2 * 1024 * 1024
"""The same without gradients where the network is not on the CPU: few images leave a card idle."""


def random_noise(count: int, shape: tuple[int, int, int], seed: int, purpose: str, *, first: int = 0) -> Tensor:
    """Standard normal (count, C, H, W), rows from `first` on; row i depends on purpose, seed and i alone.

    The purpose keeps apart what must be independent: two uses of one seed share no row, nor do two seeds of one use.
    """
    keys = (hashlib.sha256(f"{purpose}/{seed}/{i}".encode()).digest() for i in range(first, first + count))
    generators = (torch.Generator().manual_seed(int.from_bytes(key[:7])) for key in keys)
    return torch.stack([torch.randn(shape, generator=g) for g in generators]) if count else torch.empty(0, *shape)


def in_one_pass(pixels: int, shape: tuple[int, int, int]) -> int:
    """How many images of a shape make up `pixels`, at least one."""
    return max(1, pixels // (shape[1] * shape[2]))


def drawn_at_once(family: Family) -> int:
    """How many images of a model go through its network at once, without gradients."""
    if family.batch_size is not None:
        return family.batch_size
    on_cpu = next(family.network.parameters()).device.type == "cpu"
    return in_one_pass(PIXELS_DRAWN if on_cpu else PIXELS_ON_DEVICE, family.image_shape)


def visited(family: Family, timestep: float, *, steps: int) -> float:
    """The timestep nearest to the given one, of those that sampling in `steps` visits."""
    return min(family.sampling_timesteps(steps), key=lambda t: abs(t - timestep))


def add_noise(family: Family, images: Tensor, noise: Tensor, timestep: float, *, encoded: bool = False) -> Tensor:
    """Images (N or 1, C, H, W), or what they were encoded to, noised to one timestep, (N, ...)."""
    x_0 = images if encoded else family.encode(images)
    return family.schedule.add_noise(x_0.expand_as(noise), noise, torch.tensor([timestep], dtype=torch.float64))


@torch.no_grad()
def draw(
    family: Family, noise: Tensor, *, steps: int, start: float | None = None, prompt_ids: Tensor | None = None,
    decode: bool = True, advance: Callable[[int], object] = lambda n: None,
) -> Tensor:  # fmt: skip
    """Sample images (N, C, H, W) in [-1, 1] from noise, or from x_t at timestep `start`, a batch at a time.

    `steps` are those of a whole sampling run; `prompt_ids` are (N,), or (1,) for the same everywhere. Returns x_0
    unless it is to `decode`; `advance` is told how many are done.
    """
    prompt_ids = torch.tensor([UNCONDITIONAL]) if prompt_ids is None else prompt_ids
    size = drawn_at_once(family)
    parts = list(zip(torch.split(noise, size), torch.split(prompt_ids.expand(len(noise)), size), strict=True))

    def make(part: tuple[Tensor, Tensor]) -> Tensor:
        x_0 = family.denoise(part[0], steps=steps, start=start, prompt_ids=part[1])
        advance(len(x_0) * distributed.world_size())
        return family.decode(x_0) if decode else x_0

    return distributed.all_gather(parts, make)


def noised(
    x_0: Tensor, x_s: Tensor, prompt_ids: Tensor, schedule: Schedule, generator: torch.Generator,
    span: tuple[float, float] = (0, math.inf),
) -> Noised:  # fmt: skip
    """Noise at timesteps that cover `span` evenly, in random order."""
    size, levels = len(x_0), schedule.between(*span)
    place = (torch.rand((), generator=generator) + torch.arange(size) / size) % 1
    row = (place * len(levels)).long().clamp(max=len(levels) - 1)
    timestep = levels[row][torch.randperm(size, generator=generator)]
    noise = torch.randn(x_0.shape, generator=generator)
    return Noised(x_0, noise, timestep, schedule.add_noise(x_0, noise, timestep), x_s, prompt_ids)
