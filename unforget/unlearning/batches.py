"""The noised batches that training draws from its images."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unforget.core.recipe import Recipe
from unforget.core.sampling import noised
from unforget.core.schedule import Schedule
from unforget.core.types import UNCONDITIONAL, Instance, Noised, Pool

UNPROMPTED = 0.2  # share of the prompted retain images that training shows under the empty prompt


def batches(
    instances: Sequence[Instance], retain: Pool, neighbours: Pool, schedule: Schedule, recipe: Recipe, *,
    generator: torch.Generator, first: int = 0,
) -> Iterator[tuple[Noised, Noised]]:  # fmt: skip
    """Pairs (forget batch, retain batch), from update `first` on; every draw comes from one CPU generator.

    Targets take turns, each under every prompt of its own, or, if `sequential`, have equal shares of all updates, one
    after another. Of a retain batch, `neighbour_share` are images near a
    target, the rest any; where they have prompts, some are shown without, as guidance asks.
    """
    targets, surrogates, asked = cases(instances)
    near = round(recipe.retain_batch_size * recipe.neighbour_share) if len(neighbours) else 0
    for step in range(first, recipe.max_train_steps):
        turn = _turns(instances, recipe, step)
        # Others of the batch at each step, so that every target takes its turn on both sides.
        arrived = (torch.arange(recipe.forget_batch_size) + step) % recipe.forget_batch_size
        arrived = arrived < round(recipe.surrogate_share * recipe.forget_batch_size)
        x_0 = targets[turn].where(~arrived[:, None, None, None], surrogates[turn])
        forget = noised(x_0, surrogates[turn], asked[turn], schedule, generator, recipe.forget_range)
        others = recipe.retain_batch_size - near
        shown = Pool.cat(_choose(neighbours, near, generator), _choose(retain, others, generator))
        prompt_ids = shown.prompt_ids
        if (prompt_ids != UNCONDITIONAL).any():
            prompted = torch.rand(len(shown), generator=generator) >= UNPROMPTED
            prompt_ids = prompt_ids.where(prompted, UNCONDITIONAL)
        yield forget, noised(shown.x_0, shown.x_0, prompt_ids, schedule, generator)


def cases(instances: Sequence[Instance], draws: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, surrogates (N, C, H, W) and prompt ids (N,): each instance under each of its prompts, `draws` times."""
    rows = [(i.target, i.surrogate, id) for i in instances for id in i.prompt_ids for _ in range(draws)]
    targets, surrogates, prompt_ids = zip(*rows, strict=True)
    return torch.stack(targets), torch.stack(surrogates), torch.tensor(prompt_ids)


def _turns(instances: Sequence[Instance], recipe: Recipe, step: int) -> Tensor:
    """Rows of `cases` that a forget batch shows."""
    ids = [i.id for i in instances for _ in i.prompt_ids]
    rows = torch.arange(len(ids))
    if recipe.sequential:
        order = list(dict.fromkeys(ids))
        now = order[step * len(order) // recipe.max_train_steps]
        rows = rows[[id == now for id in ids]]
    return rows[(torch.arange(recipe.forget_batch_size) + step * recipe.forget_batch_size) % len(rows)]


def _choose(pool: Pool, count: int, generator: torch.Generator) -> Pool:
    return pool[torch.randint(len(pool), (count,), generator=generator)] if count else pool[:0]
