"""Unconditional pixel-space models: diffusers' `DDPMPipeline` with a `UNet2DModel`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unforget.families.recipes import pixel_recipes
from unforget.families.spec import Config, FamilySpec


def bottleneck(network: Any) -> Iterator[nn.Parameter]:
    """Convolutions and attention of the middle block and of the first block up, where features have the fewest pixels.

    What lies outside draws every image, and training it shifts them all.
    """
    inside = {
        id(p)
        for block in (network.mid_block, network.up_blocks[0])
        if block is not None
        for module in block.modules()
        # A trained GroupNorm behind frozen layers crashes torch 2.13's backward pass on CPU.
        if not isinstance(module, nn.GroupNorm)
        for p in module.parameters(recurse=False)
    }
    return (p for p in network.parameters() if id(p) in inside)


def call(network: Any, x_t: Tensor, timestep: Tensor, *_: Any) -> Tensor:
    """What the network says of the image; a learnt variance, the other half of its channels, is not used."""
    answer: Tensor = network(x_t.to(memory_format=torch.channels_last), timestep.long()).sample
    return answer[:, : x_t.shape[1]]


def unfit(config: Config) -> str:
    """Class-conditional ones, and those that draw no grey or coloured pictures."""
    channels, answered = config["in_channels"], config["out_channels"]
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        return "is class-conditional"
    if channels not in (1, 3) or answered not in (channels, 2 * channels):
        return f"takes {channels} channels and answers {answered}"
    return ""


SPEC = FamilySpec(
    name="ddpm",
    title="DDPM",
    pipeline_class="DDPMPipeline",
    also=("DDIMPipeline",),
    network="unet",
    network_class="UNet2DModel",
    prompted=False,
    autoencoder="",
    scopes=("bottleneck", "full"),
    recipes=pixel_recipes(),
    formats=("diffusers", "transformer"),
    task="unconditional-image-generation",
    architecture=lambda config: "ddpm-unet",
    aliases={"ddpm-celebahq": "google/ddpm-celebahq-256"},
    sampler="DDIMScheduler",
    call=call,
    adapt=lambda network, absent: network.float().to(memory_format=torch.channels_last),
    bottleneck=bottleneck,
    unfit=unfit,
    float32=True,
)
