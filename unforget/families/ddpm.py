"""Unconditional pixel-space models: diffusers' `DDPMPipeline` with a `UNet2DModel`."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unforget.core.recipe import Recipe
from unforget.core.types import UNCONDITIONAL
from unforget.errors import UsageError
from unforget.families.loading import Hints, Options
from unforget.families.model import DiffusionModel, pixels
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
    model=lambda spec, *args: DDPM(*args),
    call=lambda network, x_t, timestep, conditioning: network(x_t, timestep).sample,
    bottleneck=bottleneck,
    float32=True,
)


class DDPM(DiffusionModel):
    """A `DDPMPipeline` behind the `Family` protocol; images are its own pixels in [-1, 1]."""

    retain_prompts = ("",)
    prompts: ClassVar[list[str]] = [""]

    def __init__(
        self, pipeline: Any, name: str = "model", options: Options | None = None, hints: Hints | None = None
    ) -> None:
        super().__init__(SPEC, pipeline, name, (options or Options()).device)
        self.latent_shape = self.image_shape = pixels(self.network.config)

    def _placed(self, network: Any) -> Any:
        return network.to(self.device).float().to(memory_format=torch.channels_last).eval()

    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """`UNCONDITIONAL` for the empty prompt, the only one.

        Raises:
            UsageError: If there is another.
        """
        if any(prompts):
            raise UsageError(f"'{self.name}' takes no prompts", "Leave --prompt out.")
        return torch.full((len(prompts),), UNCONDITIONAL)

    def encode(self, pictures: Tensor) -> Tensor:
        """The pictures themselves."""
        return pictures

    def decode(self, x_0: Tensor) -> Tensor:
        """The pictures themselves, in [-1, 1]."""
        return x_0.clamp(-1, 1)

    def unload_text_encoders(self) -> None:
        """Nothing: there is only the network."""

    def predict(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        """The network's answer at (x_t, timestep), (B, C, H, W), on the device of x_t, wherever the network is."""
        device = next(self.network.parameters()).device
        x_in = x_t.to(device, memory_format=torch.channels_last)
        return SPEC.call(self.network, x_in, timestep.long().to(device), ()).to(x_t.device)
