"""Training over the engine: the learning rate, the margin, when it is enough, and how it goes on after a stop."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from unforget.core import engine, sampling
from unforget.core.metrics import margin
from unforget.core.objectives import Context
from unforget.core.recipe import Recipe
from unforget.core.types import Family, Instance
from unforget.errors import CannotRun, UsageError, is_full
from unforget.unlearning.batches import batches, cases
from unforget.unlearning.compute import Compute, adam, matched_rate, mixed
from unforget.unlearning.preconditioner import init_lora, preconditioners, shown
from unforget.unlearning.prepare import Prepared
from unforget.unlearning.saliency import masks

CHECK_EVERY = 20  # updates between two looks at the margin
MARGIN_AT = (250, 400, 550)  # timesteps at which the margin is measured
STEPS = 10  # steps of a whole sampling run, for the margin
DRAWS = 4  # reconstructions of each case at each of them
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of each weight


Saved = tuple[dict[str, Any], dict[str, Tensor]]
"""All that training needs to go on after an update as if it had never stopped: figures, and tensors by name."""


class LrSchedule:
    """The learning rate: warm up, hold, and cool down once the margin is reached or the budget nears its end.

    Whatever ends the run, its last updates are small: to average away their noise is worth a third of the drift.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.warmup = recipe.warmup_steps
        self.cooldown = min(recipe.cooldown_steps, recipe.max_train_steps - 1)
        self.start = recipe.max_train_steps - self.cooldown
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
def worst_margin(family: Family, instances: tuple[Instance, ...], draws: int = DRAWS) -> float:
    """Smallest mean margin of reconstructions, encoded, over targets, prompts and noise levels, in [-1, 1]."""
    targets, surrogates, prompt_ids = cases(instances, draws)
    noise = sampling.random_noise(draws, family.latent_shape, 0, "margin").repeat(len(targets) // draws, 1, 1, 1)
    worst = math.inf
    for timestep in MARGIN_AT:
        start = sampling.visited(family, timestep, steps=STEPS)
        x_t = sampling.add_noise(family, targets, noise, start, encoded=True)
        back = sampling.draw(family, x_t, steps=STEPS, start=start, prompt_ids=prompt_ids, decode=False)
        worst = min(worst, float(margin(back, targets, surrogates).reshape(-1, draws).mean(1).min()))
    return worst


class Trainer:
    """Changes the weights of `patched` in place, an update an iteration; `base` is an equal model, which stays.

    With `resume`, where an earlier run of the same arguments was, it goes on from there to the same weights.
    """

    def __init__(
        self, patched: Family, base: Family, prepared: Prepared, recipe: Recipe, *, seed: int, compute: Compute,
        resume: Saved | None = None,
    ) -> None:  # fmt: skip
        self.patched, self.prepared, self.recipe = patched, prepared, recipe
        self.done, self.lr_schedule = 0, LrSchedule(recipe)
        self.margin: float | None = None
        self.margin_before = -math.inf
        self.weights = patched.trainable(recipe.train, rank=recipe.rank, alpha=recipe.lora_alpha, seed=seed)
        for weight in self.weights:
            weight.requires_grad_(True)
        rate = recipe.learning_rate or matched_rate(patched.network, self.weights, recipe.update_share)
        self.optimizer = adam(self.weights, rate, eight_bit=compute.use_8bit_adam)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_schedule.factor)
        self.generator = torch.Generator().manual_seed(seed)
        device = self.weights[0].device
        half = compute.half(device)
        again = bool(getattr(patched.network, "is_gradient_checkpointing", False))
        self.predict = mixed(patched.predict, half, device, checkpointed=again)
        frozen = mixed(torch.no_grad()(base.predict), half, device)
        self.context = Context(
            base.schedule, frozen, prepared.encoded, prepared.retain, prepared.prior_counts,
            surrogates=recipe.surrogate_share > 0,
        )  # fmt: skip
        self.micro_batch = compute.in_one_pass(patched.image_shape)
        self.masks: list[Tensor] | None = None
        self.preconditioners: list[Tensor | None] | None = None
        if recipe.damping is not None:  # of the weights that the base has, whenever the run goes on
            batch = shown(prepared.retain, base.schedule, recipe.forget_range, seed=seed)
            self.preconditioners = preconditioners(
                patched.network, self.predict, self.weights, batch, recipe.damping, micro_batch=self.micro_batch
            )
            init_lora(patched.network, self.weights, self.preconditioners)
        if resume is not None:
            self._restore(resume)
        elif recipe.saliency is not None:
            self.masks = masks(
                self.predict, self.weights, prepared.encoded, base.schedule, recipe.saliency, seed=seed,
                micro_batch=self.micro_batch,
            )  # fmt: skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Train; gives the figures of every update, after it. If a loss is NaN the last good weights stay."""
        try:
            if not self.done and self.recipe.stop_margin is not None:
                self.margin = worst_margin(self.patched, self.context.instances)
            for step in self._steps() if self.done < self.lr_schedule.end else ():
                if not step.finite:
                    raise CannotRun(
                        f"the loss is not a number at step {step.number}; the last good weights are kept",
                        "Lower --learning-rate.",
                    )
                self.done = step.number
                if self.done % CHECK_EVERY == 0:
                    self._look()
                yield _row(step, self)
                if self.done >= self.lr_schedule.end:
                    break
        finally:
            self.patched.network.requires_grad_(False)
        self._look()

    def _steps(self) -> Iterator[engine.Step]:
        context, recipe, predict, objective = self.context, self.recipe, self.predict, self.recipe.objective
        drawn = batches(
            context.instances, context.retain, self.prepared.neighbours, context.schedule, recipe,
            generator=self.generator, first=self.done,
        )  # fmt: skip
        pairs = (objective.pair(forget, retain, context, self.generator) for forget, retain in drawn)
        losses: dict[str, engine.Loss] = {
            "forget": lambda batch: objective.forget(predict, batch, context),
            "retain": lambda batch: objective.retain(predict, batch, context),
        }
        taken = {name: losses[name] for name in recipe.surgery.uses}
        optimization = engine.Optimization(
            self.optimizer, self.scheduler, recipe.max_grad_norm, self.micro_batch, self.masks, self.preconditioners
        )
        return engine.run(
            pairs, taken.get("forget"), taken.get("retain"), surgery=recipe.surgery, optimization=optimization,
            done=self.done,
        )  # fmt: skip

    def _look(self) -> None:
        """Measure the margin, unless the recipe does not stop by it: it costs. Twice in a row enough, cool down."""
        enough = self.recipe.stop_margin
        if enough is not None and self.margin is not None:
            self.margin_before, self.margin = self.margin, worst_margin(self.patched, self.context.instances)
            if min(self.margin_before, self.margin) >= enough:
                self.lr_schedule.reach(self.done)

    def state(self) -> Saved:
        """Where training is, between two updates."""
        tensors = {f"weight.{i}": w.detach() for i, w in enumerate(self.weights)}
        tensors |= {f"mask.{i}": mask for i, mask in enumerate(self.masks or ())}
        tensors["generator"] = self.generator.get_state()
        numbers: dict[str, Any] = {}
        for i, weight in enumerate(self.weights):
            for key, value in self.optimizer.state[weight].items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{i}.{key}"] = value
        figures = {
            "step": self.done, "learning_rate": self.scheduler.get_last_lr()[0], "start": self.lr_schedule.start,
            "reached": self.lr_schedule.reached, "margin": self.margin, "margin_before": self.margin_before,
            "optimizer": numbers,
        }  # fmt: skip
        return figures, tensors

    def _restore(self, saved: Saved) -> None:
        """UsageError for what `state` does not say."""
        try:
            self._take(*saved)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if is_full(error):
                raise
            raise UsageError("the checkpoint is of another run or version", "Start again with --force.") from error

    @torch.no_grad()
    def _take(self, f: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        margins = [m for m in (f["margin"], f["margin_before"]) if m is not None]
        if type(f["step"]) is not int or type(f["start"]) is not int or type(f["reached"]) is not bool:
            raise TypeError
        if f["start"] < 1 or not 0 < f["step"] <= f["start"] + self.lr_schedule.cooldown <= self.recipe.max_train_steps:
            raise ValueError
        if not 0 < f["learning_rate"] < math.inf or not all(isinstance(m, float) for m in margins):
            raise ValueError
        self.done, self.lr_schedule.start, self.lr_schedule.reached = f["step"], f["start"], f["reached"]
        self.margin, self.margin_before = f["margin"], f["margin_before"]
        known = {**tensors, **f["optimizer"]}
        self.generator.set_state(tensors["generator"])
        if self.recipe.saliency is not None:
            self.masks = [tensors[f"mask.{i}"].to(w.device) for i, w in enumerate(self.weights)]
        for i, weight in enumerate(self.weights):
            prefix = f"optimizer.{i}."
            like = {f"weight.{i}": weight, **{f"{prefix}{n}": weight for n in MOMENTS}, f"{prefix}step": torch.ones(())}
            same = [(known[n].shape, known[n].dtype) == (t.shape, t.dtype) for n, t in like.items() if n in tensors]
            if not all(same) or (self.masks and self.masks[i].shape != weight.shape):
                raise ValueError
            weight.copy_(known[f"weight.{i}"])
            # Adam keeps its count of steps on the CPU, its moments where the weight is.
            self.optimizer.state[weight] = {
                key.removeprefix(prefix): v.to(weight.device) if isinstance(v, Tensor) and v.dim() else v
                for key, v in known.items() if key.startswith(prefix)
            }  # fmt: skip
        # The next update's rate was fixed before the schedule may have changed: taken over, not computed again.
        for group in self.optimizer.param_groups:
            group["lr"] = f["learning_rate"]
        self.scheduler.last_epoch, self.scheduler._last_lr = self.done, [f["learning_rate"]]


def _row(step: engine.Step, trainer: Trainer) -> dict[str, Any]:
    return {
        "step": step.number, "of": trainer.lr_schedule.end, "forget": step.forget, "retain": step.retain,
        "cosine": step.gram.cosine, "weight_forget": step.weights.forget, "weight_retain": step.weights.retain,
        "grad_norm": step.norm, "learning_rate": float(trainer.scheduler.get_last_lr()[0]),
        **({} if trainer.margin is None else {"margin": trainer.margin}),
    }  # fmt: skip
