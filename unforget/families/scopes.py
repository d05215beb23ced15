"""Which weights of a network a scope trains, and in which precision."""

from typing import Any

import torch
from torch import nn

from unforget.core.types import Scope
from unforget.errors import CannotRun
from unforget.families import offload
from unforget.families.spec import FamilySpec, check_scope


def check_precision(network: nn.Module, scope: Scope) -> None:
    """CannotRun if a scope's own weights are not float32: updates smaller than their last digit would be lost.

    Nor can weights be trained that are on the device for the length of a call.
    """
    if scope != "lora" and offload.waits(network):
        raise CannotRun("weights that wait in the host's memory cannot be trained", "Give --train lora.")
    dtypes = {p.dtype for p in network.parameters() if p.is_floating_point()}
    if scope != "lora" and dtypes - {torch.float32}:
        numbers, name = sum(p.numel() for p in network.parameters()), str(min(dtypes, key=str)).removeprefix("torch.")
        # Weights, the base's, both gradients and their sum, two moments.
        sentence = (
            f"training all weights needs them in float32, here they are {name}: {7 * 4 * numbers / 2**30:.1f} GiB"
        )
        raise CannotRun(f"{sentence} for them, gradients and moments", "Give --train lora.")


def trainable(spec: FamilySpec, network: Any, scope: Scope, *, rank: int, alpha: int, seed: int) -> list[nn.Parameter]:
    """The weights of a scope, in the network's order; for `lora`, of an adapter that is added if need be.

    All are float32, and so are their moments: an update is smaller than the last digit of a bfloat16 number. CannotRun
    if the network's own are not.
    """
    check_scope(spec, scope)
    check_precision(network, scope)
    if scope == "full":
        return list(network.parameters())
    if scope == "bottleneck" and spec.bottleneck is not None:
        return list(spec.bottleneck(network))
    if not getattr(network, "_hf_peft_config_loaded", False):
        from peft import LoraConfig, inject_adapter_in_model

        targets, device = list(spec.lora_targets), offload.device_of(network)
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, network)  # not `add_adapter`, which some networks of diffusers lack
        network._hf_peft_config_loaded = True
        for name, part in network.named_modules():
            if name.rsplit(".", 1)[-1].startswith("lora_"):
                part.to(device, torch.float32)
    return [p for name, p in network.named_parameters() if ".lora_" in name]


def switch_adapter(network: nn.Module, on: bool) -> None:
    """Let the LoRA beside a network's weights count, or not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)
