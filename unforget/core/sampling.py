"""The one place where images and latents are noised, denoised and drawn."""

import hashlib
import math
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from unforget.core import distributed, passes
from unforget.core.schedule import Schedule
from unforget.core.types import UNCONDITIONAL, Family, Noised, Trajectory


def random_noise(count: int, shape: tuple[int, int, int], seed: int, purpose: str, *, first: int = 0) -> Tensor:
    """Standard normal (count, C, H, W), rows from `first` on; row i depends on purpose, seed and i alone.

    The purpose keeps apart what must be independent: two uses of one seed share no row, nor do two seeds of one use.
    """
    generators = map(torch.Generator().manual_seed, seeds(count, seed, purpose, first=first).tolist())
    return torch.stack([torch.randn(shape, generator=g) for g in generators]) if count else torch.empty(0, *shape)


def seeds(count: int, seed: int, purpose: str, *, first: int = 0) -> Tensor:
    """Seeds of generators, (count,), from row `first` on; row i depends on purpose, seed and i alone."""
    keys = (hashlib.sha256(f"{purpose}/{seed}/{i}".encode()).digest() for i in range(first, first + count))
    return torch.tensor([int.from_bytes(key[:7]) for key in keys], dtype=torch.int64)


def visited(family: Family, timestep: float, *, steps: int) -> float:
    """The timestep nearest to the given one, of those that sampling in `steps` visits."""
    return min(family.sampling_timesteps(steps), key=lambda t: abs(t - timestep))


def regular(family: Family, *, steps: int, through: float | None = None) -> Tensor:
    """The timesteps that sampling in `steps` visits, from noisy to clean, each at the nearest row of the schedule.

    From `through` on they are evenly spaced rows instead, about as many: so any timestep can be visited.
    """
    visited: Tensor = family.schedule.nearest(torch.tensor(family.sampling_timesteps(steps), dtype=torch.float64))
    visited = torch.unique_consecutive(visited)
    if through is None:
        return visited
    below = _spread(family, steps, through, float(visited[0]), lambda k: 0.0)
    return torch.cat([visited[visited > through], below])


def irregular(family: Family, key: str, *, steps: int, start: float | None = None) -> Tensor:
    """Timesteps that nobody foresees who does not know `key`, from noisy to clean: `steps`, a quarter more or fewer.

    The first is the one that sampling in `steps` begins with, or `start`; the rest lie anywhere, each near its place
    among evenly spaced ones.
    """
    chance, first = random.Random(key), family.sampling_timesteps(steps)[0]
    count, top = steps * chance.uniform(0.75, 1.25), first if start is None else start
    return _spread(family, count, top, first, lambda k: chance.uniform(-0.5 if k else 0, 0.5))


def _spread(family: Family, steps: float, top: float, first: float, moved: Callable[[int], float]) -> Tensor:
    """`top` and rows below it, each moved from its place among evenly spaced ones: of `steps` from `first` on."""
    table = family.schedule.timesteps
    row, whole = (int((table - t).abs().argmin()) for t in (top, first))
    count = max(1, round((steps - 1) * row / max(1, whole)))
    places = {round(row * (k + moved(k)) / count) for k in range(count)} - {row}
    return torch.tensor([top, *table[sorted(places, reverse=True)].tolist()], dtype=torch.float64)


def add_noise(family: Family, images: Tensor, noise: Tensor, timestep: float, *, encoded: bool = False) -> Tensor:
    """Images (N or 1, C, H, W), or what they were encoded to, noised to one timestep, (N, ...)."""
    x_0 = images if encoded else family.encode(images)
    return family.schedule.add_noise(x_0.expand_as(noise), noise, torch.tensor([timestep], dtype=torch.float64))


@torch.no_grad()
def seconds_a_pass(family: Family) -> float:
    """Seconds that an image takes in a pass where the model is: the median of three, after one that warms up."""
    size, timestep = passes.drawn_in_one_pass(family), visited(family, 500, steps=10)
    x_t, took = torch.zeros(size, *family.latent_shape), list[float]()
    for _ in range(4):
        began = time.perf_counter()
        family.predict(x_t, torch.full((size,), timestep), torch.full((size,), UNCONDITIONAL))
        took.append((time.perf_counter() - began) / size)
    return statistics.median(took[1:])


@torch.no_grad()
def draw(
    family: Family, noise: Tensor, *, steps: int | Trajectory, start: float | None = None,
    prompt_ids: Tensor | None = None, decode: bool = True, advance: Callable[[int], object] = lambda n: None,
) -> Tensor:  # fmt: skip
    """Sample images (N, C, H, W) in [-1, 1] from noise, or from x_t at timestep `start`, a batch at a time.

    `steps` are those of a whole sampling run, or a way of its own; `prompt_ids` are (N,), or (1,) for the same
    everywhere. Returns x_0 unless it is to `decode`; `advance` is told how many passes are done.
    """
    prompt_ids = torch.tensor([UNCONDITIONAL]) if prompt_ids is None else prompt_ids
    size = passes.drawn_in_one_pass(family)
    calls = passes.calls(family, steps, start) if isinstance(steps, int) else len(steps.between(start).timesteps)
    prompt_ids, parts = prompt_ids.expand(len(noise)), torch.split(torch.arange(len(noise)), size)

    def make(rows: Tensor) -> Tensor:
        own = steps if isinstance(steps, int) else steps.of(rows)
        x_0 = family.denoise(noise[rows], steps=own, start=start, prompt_ids=prompt_ids[rows])
        advance(passes.drawn(family, prompt_ids[rows].tolist(), calls) * distributed.world_size())
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
