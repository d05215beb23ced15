"""Weights that wait in the host's memory: each layer's are on the card for the length of its call."""

from typing import Any

import torch
from torch import nn

from unforget.core import devices

LAYERS = (nn.Linear, nn.Conv2d)
"""What holds nearly all weights of a network."""
FULL = 0.8
"""Share of a card's memory from which on networks are too many for it: the rest is for what is computed."""


def wanted(asked: bool | None, device: torch.device, size: int) -> bool:
    """Whether networks of so many bytes are to wait: as the user says, else if the card is too small for them."""
    if device.type == "cpu" or asked is not None:
        return bool(asked) and device.type != "cpu"
    room = devices.memory(str(device))
    return bool(room) and size > FULL * room


def place(network: nn.Module, device: torch.device) -> None:
    """Put a network on a device, but for the weights of its layers, which come there when they are called.

    A graph holds the copies that its backward pass needs, all of them unless blocks are computed again. A LoRA that is
    put beside these layers later is no part of this.
    """
    layers: list[Any] = [m for m in network.modules() if isinstance(m, LAYERS)]
    held = [(m, name, weight) for m in layers for name, weight in _own(m).items()]
    for module, name, _ in held:
        module._parameters[name] = None
    network.to(device)
    for module, name, weight in held:
        weight.data = weight.data.cpu()
        if device.type == "cuda":
            weight.data = weight.data.pin_memory()  # copies come twice as fast
        module._parameters[name] = weight
    for module in layers:
        if not waits(module):
            module.register_forward_pre_hook(_bring)
            # Always: a backward pass that computes a block again breaks it off where it has what it needs.
            module.register_forward_hook(_send_away, always_call=True)
        module._waits_for = device


def waits(network: nn.Module) -> bool:
    """Whether a network's weights wait in the host's memory."""
    return any(hasattr(m, "_waits_for") for m in network.modules())


def device_of(network: nn.Module) -> torch.device:
    """Where a network computes."""
    called: Any = (m._waits_for for m in network.modules() if hasattr(m, "_waits_for"))
    device: torch.device = next(called, next(network.parameters()).device)
    return device


def resident(network: nn.Module) -> tuple[int, int]:
    """Bytes of the weights that stay on the card, and of those that wait."""
    layers = {id(p) for m in network.modules() if isinstance(m, LAYERS) for p in _own(m).values()}
    sizes = [(id(p) in layers, p.numel() * p.element_size()) for p in network.parameters()]
    return sum(s for waiting, s in sizes if not waiting), sum(s for waiting, s in sizes if waiting)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module._parameters.items() if weight is not None}


def _bring(module: Any, given: Any) -> None:
    """Other parameters, not the same with other data: a graph then holds what it was computed with."""
    module._waiting = dict(module._parameters)
    for name, weight in _own(module).items():
        module._parameters[name] = nn.Parameter(weight.to(module._waits_for, non_blocking=True), requires_grad=False)


def _send_away(module: Any, given: Any, answer: Any) -> None:
    module._parameters.update(module.__dict__.pop("_waiting", {}))
