"""How a run computes: precision, passes, the optimiser."""

import statistics
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unforget.core import passes
from unforget.core.types import Predict
from unforget.errors import CannotRun


@dataclass(frozen=True)
class Compute:
    """What costs or saves memory and time, and may change the last bits; fields as in the configuration.

    CannotRun if a package is missing.
    """

    micro_batch: int | None = None
    mixed_precision: Literal["auto", "no", "bf16"] = "no"
    use_8bit_adam: bool = False
    gradient_checkpointing: bool = False  # blocks are computed again in the backward pass

    def __post_init__(self) -> None:
        if self.use_8bit_adam:
            _adam8bit()

    def half(self, device: torch.device) -> bool:
        """Whether passes are computed in bfloat16 on a device."""
        return self.mixed_precision == "bf16" or (self.mixed_precision == "auto" and has_bf16(device))

    def in_one_pass(self, image_shape: tuple[int, int, int]) -> int:
        """How many images go through the network at once, with gradients."""
        return self.micro_batch or passes.in_one_pass(passes.PIXELS_TRAINED, image_shape)


def adam(weights: list[nn.Parameter], learning_rate: float, *, eight_bit: bool = False) -> torch.optim.Optimizer:
    """Adam with a short memory, its state in 8 bits on request."""
    kind = _adam8bit() if eight_bit else torch.optim.Adam
    return kind(weights, lr=learning_rate, betas=(0.9, 0.99))


def _adam8bit() -> Any:
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError:
        raise CannotRun("8-bit Adam needs bitsandbytes", "Install unforget-diffusion[8bit].") from None
    return Adam8bit


def matched_rate(network: nn.Module, weights: list[nn.Parameter], share: float) -> float:
    """The learning rate at which an update of Adam changes what a projection answers by `share` of it at most.

    Adam moves every number by the rate. If all moves agree, a projection W of n inputs answers sqrt(n) / rms(W) times
    the rate differently, and a LoRA beside it, whose A has the scale of diffusers' scripts (1 / rank), scaling /
    rms(W) times. The median over what is trained counts: wide networks get smaller rates than narrow ones.
    """
    modules: Iterable[Any] = network.modules()
    adapted = [m for m in modules if hasattr(m, "lora_A") and len(m.lora_A)]
    if adapted:
        rates = [_rms(m.base_layer.weight) / next(iter(m.scaling.values())) for m in adapted]
    else:
        rates = [_rms(w) / w[0].numel() ** 0.5 for w in weights if w.ndim > 1]
    return float(share * statistics.median(rates))


def _rms(weight: Tensor) -> float:
    return float(weight.detach().float().square().mean().sqrt())


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware there; emulated, it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # private


def mixed(predict: Predict, half: bool, device: torch.device, *, checkpointed: bool = False) -> Predict:
    """The same answers; if `half`, computed in bfloat16 where autocast thinks it safe, in float32 again.

    `device` is where the network works; x_t is on the CPU wherever that is. A `checkpointed` network computes blocks
    again in its backward pass, outside of any context that is set here.
    """
    if not half:
        return predict

    def answer(x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        # The backward pass of CPU flash attention is slow in bfloat16: a third of the step here.
        plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and not checkpointed else nullcontext()
        with torch.autocast(device.type, torch.bfloat16), plain:
            return predict(x_t, timestep, prompt_ids).float()

    return answer
