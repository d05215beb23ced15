"""The loop: two gradients, their Gram matrix, surgery, clip, step, yield. It knows neither models nor objectives."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unforget.core import distributed
from unforget.core.surgery import Gram, Weights
from unforget.core.types import Noised

Loss = Callable[[Noised], Tensor]


@dataclass(frozen=True)
class Optimization:
    """How a gradient becomes an update; `micro_batch` images go through in one pass, all before the surgery."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    max_grad_norm: float = 1.0  # of the combined gradient, over all parameters at once
    micro_batch: int | None = None
    masks: list[Tensor] | None = None  # of each parameter, which of its numbers move; all if None
    # By which the combined gradient of each parameter, as a matrix, is multiplied from the right; None: by nothing.
    preconditioners: list[Tensor | None] | None = None


@dataclass(frozen=True)
class Step:
    """What one update, counted from 1, saw and did: losses and gradients are those before it; 0 where none is taken."""

    number: int
    forget: float
    retain: float
    gram: Gram
    weights: Weights
    norm: float  # of the combined gradient before clipping

    @property
    def finite(self) -> bool:
        """Whether losses and gradients are numbers; if not, no update was made."""
        return bool(torch.isfinite(torch.tensor([self.forget, self.retain, *self.gram])).all())


def run(
    batches: Iterable[tuple[Noised, Noised]], forget: Loss | None, retain: Loss | None, *,
    surgery: Callable[[Gram], Weights], optimization: Optimization, done: int = 0,
) -> Iterator[Step]:  # fmt: skip
    """Minimise two mean losses over the optimizer's parameters, an update a pair of batches; steps follow on `done`.

    A loss that the surgery does not use may be None: its batch is not looked at.
    """
    optimizer, micro_batch = optimization.optimizer, optimization.micro_batch
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for number, (forget_batch, retain_batch) in enumerate(batches, done + 1):
        forget_loss, g_f = gradient(forget, forget_batch, parameters, micro_batch)
        retain_loss, g_r = gradient(retain, retain_batch, parameters, micro_batch)
        for g, mask in zip((*g_f, *g_r), 2 * (optimization.masks or []), strict=False):
            g *= mask
        gram = Gram(_dot(g_f, g_f), _dot(g_f, g_r), _dot(g_r, g_r))
        weights = surgery(gram)
        for p, f, r in zip(parameters, g_f, g_r, strict=True):
            p.grad = f.mul_(weights.forget).add_(r, alpha=weights.retain)
        del g_f, g_r
        norm = float(nn.utils.clip_grad_norm_(parameters, optimization.max_grad_norm))
        step = Step(number, forget_loss, retain_loss, gram, weights, norm)
        if step.finite:
            _precondition(parameters, optimization)
            optimizer.step()
            if optimization.scheduler is not None:
                optimization.scheduler.step()
        optimizer.zero_grad()
        yield step


def _precondition(parameters: list[nn.Parameter], optimization: Optimization) -> None:
    for k, (p, inverse) in enumerate(zip(parameters, optimization.preconditioners or [], strict=False)):
        if p.grad is not None and inverse is not None:
            p.grad = (p.grad.flatten(1) @ inverse.to(p.device)).view_as(p)
            if optimization.masks:
                p.grad *= optimization.masks[k]


def gradient(
    loss: Loss | None, batch: Noised, parameters: list[nn.Parameter], micro_batch: int | None
) -> tuple[float, list[Tensor]]:
    """Mean loss over the batch and its gradient, a few images at a time, of which several processes take turns."""
    total, gradient = 0.0, [torch.zeros_like(p) for p in parameters]
    if loss is None:
        return total, gradient
    size = len(batch.x_0)
    mine = batch[distributed.rank() :: distributed.world_size()]
    few = micro_batch or size
    for part in (mine[i : i + few] for i in range(0, len(mine.x_0), few)):
        share = len(part.x_0) / size
        value = loss(part) * share
        for sum_, g in zip(gradient, torch.autograd.grad(value, parameters, allow_unused=True), strict=True):
            if g is not None:
                sum_ += g
        total += float(value.detach())
    distributed.all_reduce(gradient)
    return sum(distributed.gather([total])), gradient


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    """Inner product over all tensors, summed in float32 a tensor and float64 between them."""
    return float(sum(torch.dot(x.flatten().float(), y.flatten().float()).double() for x, y in zip(a, b, strict=True)))
