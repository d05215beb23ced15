"""Which weights tell a target (SalUn, arXiv:2310.12508): those that the loss at it moves most, found once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unforget.core import engine
from unforget.core.objectives.weighting import regression
from unforget.core.sampling import noised
from unforget.core.schedule import Schedule
from unforget.core.types import Instance, Noised, Predict
from unforget.unlearning.batches import cases

IMAGES = 64
"""Noised targets whose mean loss is taken."""


def masks(
    predict: Predict, weights: list[nn.Parameter], instances: Sequence[Instance], schedule: Schedule, share: float, *,
    seed: int, micro_batch: int | None,
) -> list[Tensor]:  # fmt: skip
    """Which numbers of each weight move, bool: the `share` with the largest gradients of the usual loss at the targets.

    A weight that has no gradient at all says nothing and moves: that is A of a LoRA, whose B begins with zeros.
    """
    targets, surrogates, prompt_ids = cases(instances)
    turn = torch.arange(IMAGES) % len(targets)
    generator = torch.Generator().manual_seed(seed)
    batch = noised(targets[turn], surrogates[turn], prompt_ids[turn], schedule, generator)

    def usual(part: Noised) -> Tensor:
        goal = schedule.target(part.x_0, part.noise, part.timestep)
        return regression(predict, part, goal, torch.ones(()))

    sizes = [g.abs() for g in engine.gradient(usual, batch, weights, micro_batch)[1]]
    told = torch.cat([s.flatten() for s in sizes if s.any()] or [torch.zeros(1)])
    least = told.kthvalue(len(told) + 1 - max(1, round(share * len(told))) if share < 1 else 1).values
    return [(s >= least) | ~s.any() for s in sizes]
