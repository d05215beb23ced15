"""Gradients divided by what retain images feed each layer: forgetting goes where they hardly look.

A layer W answers W x. A change D of it moves that by D x, over retain images by tr(D C D^T) in the mean square, where C
is the second moment of x, the mean of x x^T. Of all changes that cost as much, the gradient times C^-1 lowers the loss
most: the input factor of K-FAC (arXiv:1503.05671). Editors of facts spare what they do not edit in the same way (MEMIT,
arXiv:2210.07229). A LoRA looks where its random A looks, so that is turned away from them as well.

The matrices of a large network fill a card, so they wait on the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unforget.core import distributed
from unforget.core.sampling import noised
from unforget.core.schedule import Schedule
from unforget.core.strategy import Span
from unforget.core.types import Noised, Pool, Predict
from unforget.errors import CannotRun, is_full

IMAGES = 192
"""Images over which the second moments are taken."""
WIDEST = 4608
"""Inputs of a layer, at most: a 3x3 convolution of 512 channels. The matrix of a wider one costs too much."""


def shown(retain: Pool, schedule: Schedule, span: Span, *, seed: int) -> Noised:
    """Noised images to retain, over which the second moments are taken."""
    images = retain[torch.arange(IMAGES) % len(retain)]
    generator = torch.Generator().manual_seed(seed)
    return noised(images.x_0, images.x_0, images.prompt_ids, schedule, generator, span)


def preconditioners(
    network: nn.Module, predict: Predict, weights: list[nn.Parameter], batch: Noised, damping: float, *,
    micro_batch: int,
) -> list[Tensor | None]:  # fmt: skip
    """For each weight what its gradient, (outputs, inputs), is multiplied by from the right, (inputs, inputs).

    None for what is no matrix: biases, norms, layers that are too wide. CannotRun if a matrix has no inverse.
    """
    layers = {layer.weight: layer for layer in _layers(network)}
    moments = {w: torch.zeros(_width(w), _width(w)) for w in weights if w in layers}
    hooks = [layers[w].register_forward_pre_hook(_adding(moment)) for w, moment in moments.items()]
    mine = batch[distributed.rank() :: distributed.world_size()]
    try:
        with torch.no_grad():
            for part in (mine[i : i + micro_batch] for i in range(0, len(mine.x_0), micro_batch)):
                predict(part.x_t, part.timestep, part.prompt_ids)
    finally:
        for hook in hooks:
            hook.remove()

    def inverse(weight: nn.Parameter) -> Tensor:
        moment = moments.pop(weight).to(weight.device)  # the host holds each matrix once
        distributed.all_reduce([moment])
        return _inverse(moment, damping).cpu()

    return [inverse(w) if w in moments else None for w in weights]


@torch.no_grad()
def init_lora(network: nn.Module, weights: list[nn.Parameter], inverses: list[Tensor | None]) -> None:
    """Multiply each A of a LoRA, (rank, inputs), as its gradients are, and keep its norm. B is 0: no answer changes."""
    factors = {part.weight for m in network.modules() for part in getattr(m, "lora_A", nn.ModuleDict()).values()}
    for w, inverse in zip(weights, inverses, strict=True):
        if w in factors and inverse is not None:
            turned = w @ inverse.to(w.device)
            w.copy_(turned * (w.norm() / turned.norm()))


def memory(network: nn.Module) -> int:
    """Bytes of them all, on the host, for the weights that are trained."""
    return sum(4 * _width(layer.weight) ** 2 for layer in _layers(network) if layer.weight.requires_grad)


def _layers(network: nn.Module) -> list[Any]:
    """Those that are one matrix over their inputs, of a size that is worth it."""
    return [m for m in network.modules() if _plain(m) and _width(m.weight) <= WIDEST]


def _plain(layer: Any) -> bool:
    if isinstance(layer, nn.Conv2d):  # `unfold` knows no padding by name
        return layer.groups == 1 and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _width(weight: Any) -> int:
    """Numbers that one output of a layer is made of."""
    return int(weight[0].numel())


def _adding(moment: Tensor) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """A hook of a layer that adds up x x^T of its inputs."""

    def add(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        if hasattr(layer, "kernel_size"):
            x = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
        rows = x.flatten(0, -2)
        with torch.autocast(rows.device.type, enabled=False):
            moment.add_((rows.T @ rows).to(moment.device))

    return add


def _inverse(moment: Tensor, damping: float) -> Tensor:
    """Of the moment in units of its mean eigenvalue, with the damping added; close to the identity if that is large."""
    unit = torch.eye(len(moment), device=moment.device)
    scaled = moment / moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    try:
        return (1 + damping) * torch.cholesky_inverse(torch.linalg.cholesky(scaled + damping * unit))
    except RuntimeError as error:  # of torch.linalg
        if is_full(error):
            raise
        sentence = "what retain images feed a layer cannot be inverted, or is not a number"
        raise CannotRun(sentence, "Raise --damping, or look at what the model draws.") from None
