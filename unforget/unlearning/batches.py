"""The noised batches that training draws from its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from unforget.core.sampling import noised
from unforget.core.schedule import Schedule
from unforget.core.types import Instance, Noised, Pool

UNPROMPTED = 0.2
"""Share of the prompted pictures to keep that training shows under the empty prompt."""


def batches(
    instances: Sequence[Instance],
    keep: Pool,
    neighbours: Pool,
    schedule: Schedule,
    *,
    steps: int,
    forget_batch: int,
    retain_batch: int,
    neighbour_share: float,
    forget_range: tuple[float, float],
    seed: int,
    first: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Noised, Noised]]:
    """Pairs of noised batches; every draw comes from one CPU generator: that of the seed, or one that is on its way.

    Targets take turns, each under every prompt of its own. Of a retain batch, `neighbour_share` are pictures near a
    target, the rest any; where they have prompts, some are shown without, as guidance asks.
    """
    generator = generator or torch.Generator().manual_seed(seed)
    cases = [(i, c) for i in instances for c in i.prompt_ids]
    targets = torch.stack([i.target for i, _ in cases])
    surrogates = torch.stack([i.surrogate for i, _ in cases])
    asked = torch.tensor([c for _, c in cases])
    near = round(retain_batch * neighbour_share) if len(neighbours) else 0
    for step in range(first, steps):
        turn = (torch.arange(forget_batch) + step * forget_batch) % len(cases)
        forget = noised(targets[turn], surrogates[turn], asked[turn], schedule, generator, forget_range)
        kept = Pool.cat(_choose(neighbours, near, generator), _choose(keep, retain_batch - near, generator))
        prompt_ids = kept.prompt_ids
        if prompt_ids.any():
            prompt_ids = prompt_ids.where(torch.rand(len(kept), generator=generator) >= UNPROMPTED, 0)
        yield forget, noised(kept.x_0, kept.x_0, prompt_ids, schedule, generator)


def _choose(pool: Pool, count: int, generator: torch.Generator) -> Pool:
    return pool[torch.randint(len(pool), (count,), generator=generator)] if count else pool[:0]
