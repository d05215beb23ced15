"""One unlearning run over the engine: the two pools of pictures, the pace, and when it is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unforget import data, engine
from unforget.config import Recipe
from unforget.domain import Family, Instance
from unforget.errors import CannotRun
from unforget.metrics import margin, pairwise_rms
from unforget.objectives import Context

CHECK_EVERY = 5
"""Updates between two looks at the margin."""
LEVELS = (250, 400, 550)
"""Noise levels, timesteps of 1000, at which the margin is measured."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after how many updates, why, and at which worst margin."""

    steps: int
    stopped: Literal["margin", "budget"]
    margin: float


class Pace:
    """The learning rate: warm up, hold, and cool down once the margin is reached or the budget nears its end.

    Whatever ends the run, its last updates are small: averaging away the noise of the last batches is worth a
    third of the drift.

    Args:
        recipe: Gives budget, warm-up and cool-down.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.warmup, self.budget = recipe.warmup_steps, recipe.max_train_steps
        self.cooldown = min(recipe.cooldown_steps, recipe.max_train_steps - 1)
        self.start = self.budget - self.cooldown
        self.reached = False

    @property
    def end(self) -> int:
        """Updates after which the run is over, as things stand."""
        return self.start + self.cooldown

    def reach(self, step: int) -> None:
        """The margin is there after `step` updates: begin to cool down, unless that has begun."""
        if step < self.start:
            self.start, self.reached = step, True

    def factor(self, step: int) -> float:
        """Share of the learning rate for the update that follows `step` updates, in (0, 1]."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        done = (step - self.start) / self.cooldown if self.cooldown and step > self.start else 0.0
        return warm * max(0.5 * (1 + math.cos(math.pi * min(1.0, done))), 1e-3)


@torch.no_grad()
def worst_margin(family: Family, instances: tuple[Instance, ...], draws: int = 4) -> float:
    """Smallest mean margin of the one-step clean image over targets and noise levels, in [-1, 1]."""
    schedule, worst = family.schedule, math.inf
    noise = data.random_noise(draws, family.shape, 77)
    for instance in instances:
        for level in LEVELS:
            index = torch.full((draws,), schedule.index_of(level / 1000 * float(schedule.timesteps[-1])))
            x_t = schedule.add_noise(instance.target.expand_as(noise), noise, index)
            clean, _ = schedule.split(x_t, family.predict(x_t, index), index)
            worst = min(worst, float(margin(clean.clamp(-1, 1), instance.target, instance.surrogate).mean()))
    return worst


def neighbours(keep: Tensor, instances: tuple[Instance, ...], count: int) -> Tensor:
    """Pictures to keep that lie nearest to any target: where forgetting spills over first."""
    if not len(keep):
        return keep
    distance = pairwise_rms(keep, torch.stack([i.target for i in instances])).min(1).values
    return keep[distance.argsort(stable=True)[: count * len(instances)]]


def train(
    patched: Family,
    context: Context,
    near: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    micro_batch: int | None = None,
    on_step: Callable[[dict[str, Any]], object] = lambda row: None,
) -> Outcome:
    """Change the weights of `patched` in place.

    Args:
        patched: Starts as the base.
        context: The base, the targets and the pictures to keep.
        near: Pictures to keep that are near a target, drawn more often.
        recipe: How.
        seed: Of every random draw.
        micro_batch: Pictures in one pass.
        on_step: Told the figures of every update.

    Raises:
        CannotRun: If a loss is NaN; the weights are then those of the last good update.
    """
    pace = Pace(recipe)
    patched.network.requires_grad_(True)
    optimizer = torch.optim.Adam(patched.network.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, pace.factor)
    worst, before = worst_margin(patched, context.instances), -math.inf
    try:
        for step in _steps(patched, context, near, recipe, seed, micro_batch, optimizer, scheduler):
            if not step.finite:
                raise CannotRun(
                    f"the loss is not a number at step {step.number}; the last good weights are kept",
                    "Lower --learning-rate.",
                )
            if step.number % CHECK_EVERY == 0:
                before, worst = worst, worst_margin(patched, context.instances)
                if recipe.stop_margin is not None and min(before, worst) >= recipe.stop_margin:
                    pace.reach(step.number)
            on_step(_row(step, float(scheduler.get_last_lr()[0]), worst, pace))
            if step.number >= pace.end:
                break
    finally:
        patched.network.requires_grad_(False)
    return Outcome(step.number, "margin" if pace.reached else "budget", worst_margin(patched, context.instances))


def _steps(
    patched: Family, context: Context, near: Tensor, recipe: Recipe, seed: int, micro_batch: int | None,
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> Iterator[engine.Step]:  # fmt: skip
    pairs = data.batches(
        context.instances,
        context.keep,
        near,
        context.schedule,
        steps=recipe.max_train_steps,
        forget_batch=recipe.forget_batch_size,
        retain_batch=recipe.retain_batch_size,
        neighbour_share=recipe.neighbour_share,
        forget_range=recipe.forget_range,
        seed=seed,
    )
    return engine.run(
        pairs,
        lambda batch: recipe.objective.forget(patched.predict, batch, context),
        lambda batch: recipe.objective.retain(patched.predict, batch, context),
        surgery=recipe.surgery,
        optimizer=optimizer,
        scheduler=scheduler,
        max_grad_norm=recipe.max_grad_norm,
        micro_batch=micro_batch,
    )


def _row(step: engine.Step, rate: float, worst: float, pace: Pace) -> dict[str, Any]:
    return {
        "step": step.number,
        "of": pace.end,
        "forget": step.forget,
        "retain": step.retain,
        "cosine": step.gram.cosine,
        "weight_forget": step.weights.forget,
        "weight_retain": step.weights.retain,
        "grad_norm": step.norm,
        "learning_rate": rate,
        "margin": worst,
    }
