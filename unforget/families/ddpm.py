"""Unconditional pixel-space models: diffusers' `DDPMPipeline` with a `UNet2DModel`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from unforget.core.recipe import Recipe
from unforget.families.spec import PAPER, FamilySpec


def bottleneck(network: Any) -> Iterator[nn.Parameter]:
    """Convolutions and attention of the middle block and of the first block up, where features have the fewest pixels.

    What lies outside draws every image, and training it shifts them all.
    """
    inside = {
        id(p)
        for block in (network.mid_block, network.up_blocks[0])
        for module in block.modules()
        # A trained GroupNorm behind frozen layers crashes torch 2.13's backward pass on CPU.
        if not isinstance(module, nn.GroupNorm)
        for p in module.parameters(recurse=False)
    }
    return (p for p in network.parameters() if id(p) in inside)


SPEC = FamilySpec(
    name="ddpm",
    title="DDPM",
    pipeline_class="DDPMPipeline",
    network="unet",
    network_class="UNet2DModel",
    prompted=False,
    scopes=("bottleneck", "full"),
    recipes={"default": Recipe(), "paper": PAPER},
    formats=("diffusers", "transformer"),
    task="unconditional-image-generation",
    architecture=lambda config: "ddpm-unet",
    aliases={"ddpm-celebahq": "google/ddpm-celebahq-256"},
    sampler="DDIMScheduler",
    call=lambda network, x_t, timestep, *_: network(x_t.to(memory_format=torch.channels_last), timestep.long()).sample,
    adapt=lambda network, absent: network.float().to(memory_format=torch.channels_last),
    bottleneck=bottleneck,
    float32=True,
)
