"""Unconditional pixel-space models: diffusers' `DDPMPipeline` with a `UNet2DModel`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import Tensor, nn

from unforget.core.schedule import Schedule
from unforget.core.types import Scope
from unforget.errors import UsageError
from unforget.families import spec
from unforget.families.samplers import named, step


class DDPM:
    """A `DDPMPipeline` behind the `Family` protocol; images are its own pixels in [-1, 1].

    Args:
        pipeline: The loaded pipeline.
        name: What the user called it.
    """

    kind = "ddpm"
    spec = spec.DDPM
    guidance = None
    retain_prompts = ("",)
    prompts: ClassVar[list[str]] = [""]

    def __init__(self, pipeline: DDPMPipeline, name: str = "model") -> None:
        self.pipeline, self.name = pipeline, name
        self.network = pipeline.unet.float().to(memory_format=torch.channels_last).eval()
        self.schedule = Schedule.from_diffusers(pipeline.scheduler)
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = self.image_shape = (pipeline.unet.config.in_channels, height, width)

    @property
    def scheduler_config(self) -> Any:
        """Configuration of its diffusers scheduler."""
        return self.pipeline.scheduler.config

    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """Row 0 for the empty prompt, the only one.

        Raises:
            UsageError: If there is another.
        """
        if any(prompts):
            raise UsageError(f"'{self.name}' takes no prompts", "Leave --prompt out.")
        return torch.zeros(len(prompts), dtype=torch.long)

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
        x_in, timesteps = x_t.to(device, memory_format=torch.channels_last), timestep.long().to(device)
        answer: Tensor = self.network(x_in, timesteps).sample
        return answer.to(x_t.device)

    def trainable(self, scope: Scope, *, rank: int = 16, alpha: int = 16, seed: int = 0) -> list[nn.Parameter]:
        """See `trainable` below."""
        return trainable(self.network, scope)

    def _sampler(self, steps: int) -> Any:
        sampler = DDIMScheduler.from_config(self.scheduler_config)
        sampler.set_timesteps(steps)
        return sampler

    @torch.no_grad()
    def replay(self, seed: int, *, steps: int, scheduler: str | None, prompt_ids: Tensor) -> Tensor:
        """What `DDPMPipeline` or `DDIMPipeline` draws with `torch.Generator().manual_seed(seed)`."""
        generator = torch.Generator().manual_seed(seed)
        sampler = named(scheduler or "DDIMScheduler", self.scheduler_config)
        sampler.set_timesteps(steps)
        x_t: Tensor = torch.randn((1, *self.latent_shape), generator=generator) * sampler.init_noise_sigma
        for t in sampler.timesteps:
            answer = self.predict(sampler.scale_model_input(x_t, t), t.expand(1), prompt_ids)
            x_t = step(sampler, answer, t, x_t, generator)
        return x_t

    def sampling_timesteps(self, steps: int) -> list[float]:
        """The timesteps that `denoise` visits, from noisy to clean."""
        return [float(t) for t in self._sampler(steps).timesteps]

    def denoise(
        self, x_t: Tensor, *, steps: int, start: float | None = None, stop: float = -1, prompt_ids: Tensor | None = None
    ) -> Tensor:
        """DDIM (arXiv:2010.02502, eta 0) from pure noise, or from the visited timesteps at `start` and below."""
        sampler, no_prompt = self._sampler(steps), torch.zeros(len(x_t), dtype=torch.long)
        for t in sampler.timesteps:
            if (start is None or t <= start) and t > stop:
                x_t = sampler.step(self.predict(x_t, t.expand(len(x_t)), no_prompt), t, x_t).prev_sample
        return x_t

    def copy(self) -> DDPM:
        """An independent model with equal, frozen weights."""
        twin = copy.copy(self)
        twin.pipeline = DDPMPipeline(copy.deepcopy(self.pipeline.unet), self.pipeline.scheduler)
        twin.network = twin.pipeline.unet.requires_grad_(False).eval()
        return twin

    def frozen_reference(self, scope: Scope) -> DDPM:
        """A copy: every scope trains the weights in place."""
        return self.copy()

    def set_network(self, network: nn.Module | None) -> None:
        """Another `UNet2DModel`, or none."""
        if network is not None:
            network = network.float().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.pipeline.unet = self.network = network


def trainable(network: nn.Module, scope: Scope) -> list[nn.Parameter]:
    """The weights of a scope of a `UNet2DModel`.

    `bottleneck`: convolutions and attention of the middle block and of the first block up, where the features have the
    fewest pixels. What lies outside draws every image, and training it shifts them all.
    """
    if scope == "lora":
        raise UsageError("a DDPM has no LoRA training", "Give --train bottleneck or full.")
    blocks: tuple[nn.Module, ...] = (network.mid_block, network.up_blocks[0])  # type: ignore[index,assignment]
    inside = {
        id(p)
        for block in blocks
        for module in block.modules()
        # A trained GroupNorm behind frozen layers crashes torch 2.13's backward pass on CPU.
        if not isinstance(module, nn.GroupNorm)
        for p in module.parameters(recurse=False)
    }
    return [p for p in network.parameters() if scope == "full" or id(p) in inside]
