"""One unlearning run over the engine: the two pools of pictures, the pace, and when it is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unforget.core import engine, sampling
from unforget.core.metrics import margin
from unforget.core.objectives import Context
from unforget.core.recipe import Recipe
from unforget.core.types import Family, Instance, Pool, Predict
from unforget.errors import CannotRun, UsageError
from unforget.unlearning import batches

CHECK_EVERY = 20
"""Updates between two looks at the margin."""
MARGIN_AT = (250, 400, 550)
"""Timesteps at which the margin is measured."""
STEPS = 10
"""Steps of a whole sampling run, for the margin."""


@dataclass(frozen=True)
class State:
    """All that a run needs to go on after an update as if it had never stopped.

    Attributes:
        tensors: Trained weights, the optimiser's state, and the state of the generator that draws the batches.
        figures: Updates made, learning rate, pace and margins, and what the optimiser keeps as numbers.
    """

    tensors: dict[str, Tensor]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after how many updates, why, and at which worst margin (None unless the recipe stops by it)."""

    steps: int
    stopped: Literal["margin", "budget"]
    margin: float | None


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
    """Smallest mean margin of reconstructions over targets, prompts and noise levels, in [-1, 1].

    Margins are of what the network works on: latents, in a latent model.
    """
    cases = [(i, c) for i in instances for c in i.prompt_ids for _ in range(draws)]
    targets = torch.stack([i.target for i, _ in cases])
    surrogates = torch.stack([i.surrogate for i, _ in cases])
    asked = torch.tensor([c for _, c in cases])
    noise = sampling.random_noise(draws, family.latent_shape, 0, "margin").repeat(len(cases) // draws, 1, 1, 1)
    worst = math.inf
    for timestep in MARGIN_AT:
        start = sampling.visited(family, timestep, steps=STEPS)
        x_t = sampling.add_noise(family, targets, noise, start, encoded=True)
        back = sampling.draw(family, x_t, steps=STEPS, start=start, prompt_ids=asked, decode=False)
        worst = min(worst, float(margin(back, targets, surrogates).reshape(-1, draws).mean(1).min()))
    return worst


class _Margin:
    """The worst margin, looked at from time to time; never where the recipe does not stop by it, for it costs."""

    def __init__(self, patched: Family, instances: tuple[Instance, ...], enough: float | None) -> None:
        self.patched, self.instances, self.enough = patched, instances, enough
        self.now: float | None = None
        self.before = -math.inf

    def first(self) -> None:
        if self.enough is not None:
            self.now = worst_margin(self.patched, self.instances)

    def look(self) -> None:
        if self.now is not None:
            self.before, self.now = self.now, worst_margin(self.patched, self.instances)

    @property
    def held(self) -> bool:
        """Whether the last two looks saw enough."""
        return self.now is not None and self.enough is not None and min(self.before, self.now) >= self.enough


def adam(weights: list[nn.Parameter], learning_rate: float, *, eight_bit: bool = False) -> torch.optim.Optimizer:
    """Adam with a short memory, its state in 8 bits on request.

    Raises:
        CannotRun: If bitsandbytes is missing.
    """
    if not eight_bit:
        return torch.optim.Adam(weights, lr=learning_rate, betas=(0.9, 0.99))
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError:
        raise CannotRun("8-bit Adam needs bitsandbytes", "Install unforget-diffusion[8bit].") from None
    return Adam8bit(weights, lr=learning_rate, betas=(0.9, 0.99))  # type: ignore[no-any-return]


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware there; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # private


def computes_half(mixed_precision: Literal["auto", "no", "bf16"], device: torch.device) -> bool:
    """Whether passes are computed in bfloat16."""
    return mixed_precision == "bf16" or (mixed_precision == "auto" and has_bf16(device))


def mixed(predict: Predict, half: bool, *, checkpointed: bool = False) -> Predict:
    """The same answers, computed in bfloat16 where autocast thinks it safe, in float32 again.

    Args:
        predict: A network.
        half: Whether to.
        checkpointed: Whether the network computes blocks again in its backward pass, outside of any context set here.
    """
    if not half:
        return predict

    def answer(x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        # The backward pass of CPU flash attention is slow in bfloat16: a third of the step here.
        plain = sdpa_kernel(SDPBackend.MATH) if x_t.device.type == "cpu" and not checkpointed else nullcontext()
        with torch.autocast(x_t.device.type, torch.bfloat16), plain:
            return predict(x_t, timestep, prompt_ids).float()

    return answer


def train(
    patched: Family,
    context: Context,
    near: Pool,
    recipe: Recipe,
    *,
    seed: int,
    micro_batch: int | None = None,
    mixed_precision: Literal["auto", "no", "bf16"] = "no",
    use_8bit_adam: bool = False,
    on_step: Callable[[dict[str, Any]], object] = lambda row: None,
    resume: State | None = None,
    after: Callable[[int, Callable[[], State]], object] = lambda step, state: None,
) -> Outcome:
    """Change the weights of `patched` in place.

    Args:
        patched: Starts as the base.
        context: The base, the targets and the pictures to keep.
        near: Pictures to keep that are near a target, drawn more often.
        recipe: How.
        seed: Of every random draw.
        micro_batch: Pictures in one pass; as many as have 32 x 32 x 32 pixels unless given.
        mixed_precision: `bf16` computes the passes in bfloat16; `auto` does where the machine has it in hardware.
        use_8bit_adam: Keep the optimiser's state in 8 bits (bitsandbytes).
        on_step: Told the figures of every update.
        resume: Where an earlier run of the same arguments was; it goes on from there, to the same weights.
        after: Called after every update with its number and a function that tells where the run is.

    Raises:
        CannotRun: If a loss is NaN; the weights are then those of the last good update.
    """
    run = _Run(patched, context, recipe, seed, use_8bit_adam)
    half = computes_half(mixed_precision, run.weights[0].device)
    again = bool(getattr(patched.network, "is_gradient_checkpointing", False))
    says = mixed(patched.predict, half, checkpointed=again)
    context = replace(context, base=mixed(context.base, half))
    micro_batch = micro_batch or sampling.in_one_pass(sampling.PIXELS_TRAINED, patched.image_shape)
    try:
        if resume is None:
            run.worst.first()
        else:
            run.restore(resume)
        for step in steps(
            says, context, near, recipe, seed, micro_batch, run.optimizer, run.scheduler, run.generator, run.done
        ) if run.done < run.pace.end else ():  # fmt: skip
            if not step.finite:
                raise CannotRun(
                    f"the loss is not a number at step {step.number}; the last good weights are kept",
                    "Lower --learning-rate.",
                )
            run.look(step.number)
            on_step(_row(step, float(run.scheduler.get_last_lr()[0]), run.worst.now, run.pace))
            after(step.number, run.state)
            if step.number >= run.pace.end:
                break
    finally:
        patched.network.requires_grad_(False)
    run.worst.look()
    return Outcome(run.done, "margin" if run.pace.reached else "budget", run.worst.now)


class _Run:
    """What changes from update to update."""

    def __init__(self, patched: Family, context: Context, recipe: Recipe, seed: int, eight_bit: bool) -> None:
        self.done, self.pace = 0, Pace(recipe)
        self.weights = patched.trainable(recipe.train, rank=recipe.rank, alpha=recipe.lora_alpha, seed=seed)
        for weight in self.weights:
            weight.requires_grad_(True)
        self.optimizer = adam(self.weights, recipe.learning_rate, eight_bit=eight_bit)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.pace.factor)
        self.worst = _Margin(patched, context.instances, recipe.stop_margin)
        self.generator = torch.Generator().manual_seed(seed)

    def look(self, step: int) -> None:
        """Take note of an update, and now and then of the margin."""
        self.done = step
        if step % CHECK_EVERY == 0:
            self.worst.look()
            if self.worst.held:
                self.pace.reach(step)

    def state(self) -> State:
        tensors = {f"weight.{i}": w.detach() for i, w in enumerate(self.weights)}
        tensors["generator"] = self.generator.get_state()
        numbers: dict[str, Any] = {}
        for i, weight in enumerate(self.weights):
            for key, value in self.optimizer.state[weight].items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{i}.{key}"] = value
        figures = {
            "step": self.done, "learning_rate": self.scheduler.get_last_lr()[0], "start": self.pace.start,
            "reached": self.pace.reached, "margin": self.worst.now, "margin_before": self.worst.before,
            "optimizer": numbers,
        }  # fmt: skip
        return State(tensors, figures)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        f = state.figures
        self.done, self.pace.start, self.pace.reached = f["step"], f["start"], f["reached"]
        self.worst.now, self.worst.before = f["margin"], f["margin_before"]
        known = {**state.tensors, **f["optimizer"]}
        for i, weight in enumerate(self.weights):
            found = known.get(f"weight.{i}")
            if not isinstance(found, Tensor) or found.shape != weight.shape or found.dtype != weight.dtype:
                raise UsageError("the checkpoint is not one of this run", "Start again with --force.")
        self.generator.set_state(state.tensors["generator"])
        for i, weight in enumerate(self.weights):
            weight.copy_(known[f"weight.{i}"])
            prefix = f"optimizer.{i}."
            # Adam keeps its count of steps on the CPU, its moments where the weight is.
            self.optimizer.state[weight] = {
                key.removeprefix(prefix): v.to(weight.device) if isinstance(v, Tensor) and v.dim() else v
                for key, v in known.items() if key.startswith(prefix)
            }  # fmt: skip
        # The rate of the next update was fixed before the pace may have changed: taken over, not computed again.
        for group in self.optimizer.param_groups:
            group["lr"] = f["learning_rate"]
        self.scheduler.last_epoch, self.scheduler._last_lr = self.done, [f["learning_rate"]]


def steps(
    says: Predict, context: Context, near: Pool, recipe: Recipe, seed: int, micro_batch: int | None,
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator | None = None, done: int = 0,
) -> Iterator[engine.Step]:  # fmt: skip
    """The updates of a run as `engine.run` yields them: `says` is the network in training, in its precision."""
    pairs = batches.batches(
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
        first=done,
        generator=generator,
    )
    return engine.run(
        pairs,
        lambda batch: recipe.objective.forget(says, batch, context),
        lambda batch: recipe.objective.retain(says, batch, context),
        surgery=recipe.surgery,
        optimization=engine.Optimization(optimizer, scheduler, recipe.max_grad_norm, micro_batch),
        done=done,
    )


def _row(step: engine.Step, rate: float, worst: float | None, pace: Pace) -> dict[str, Any]:
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
        **({} if worst is None else {"margin": worst}),
    }
