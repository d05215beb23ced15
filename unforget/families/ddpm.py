"""Unconditional pixel-space models: diffusers' `DDPMPipeline` with a `UNet2DModel`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from torch import Tensor, nn

from unforget.domain import Scope
from unforget.schedule import Schedule


class DDPM:
    """A `DDPMPipeline` behind the `Family` protocol; images are its own pixels in [-1, 1].

    Args:
        pipeline: The loaded pipeline.
        name: What the user called it.
    """

    pipeline_classes = ("DDPMPipeline", "DDIMPipeline")

    def __init__(self, pipeline: DDPMPipeline, name: str = "model") -> None:
        self.pipeline, self.name = pipeline, name
        self.network = pipeline.unet.float().to(memory_format=torch.channels_last).eval()
        self.schedule = Schedule.from_diffusers(pipeline.scheduler)
        size = pipeline.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (pipeline.unet.config.in_channels, height, width)

    @property
    def scheduler_config(self) -> Any:
        """Configuration of its diffusers scheduler."""
        return self.pipeline.scheduler.config

    def predict(self, x_t: Tensor, index: Tensor) -> Tensor:
        """The network's answer at (x_t, index), (B, C, H, W), on the device of x_t, wherever the network is."""
        device = next(self.network.parameters()).device
        timesteps = self.schedule.timesteps[index.cpu()].long().to(device)
        answer: Tensor = self.network(x_t.to(device, memory_format=torch.channels_last), timesteps).sample
        return answer.to(x_t.device)

    def trainable(self, scope: Scope) -> list[nn.Parameter]:
        """`bottleneck`: convolutions and attention of the middle block and of the first block up, where the features
        have the fewest pixels. What lies outside draws every image, and training it shifts them all."""
        inside = {
            id(p)
            for block in (self.network.mid_block, self.network.up_blocks[0])
            for module in block.modules()
            # A trained GroupNorm behind frozen layers crashes torch 2.13's backward pass on CPU.
            if not isinstance(module, nn.GroupNorm)
            for p in module.parameters(recurse=False)
        }
        return [p for p in self.network.parameters() if scope == "full" or id(p) in inside]

    def _sampler(self, steps: int) -> Any:
        sampler = DDIMScheduler.from_config(self.scheduler_config)
        sampler.set_timesteps(steps)
        return sampler

    def levels(self, steps: int) -> list[int]:
        """The schedule rows that `denoise` visits, from noisy to clean."""
        return [int(t) for t in self._sampler(steps).timesteps]

    @torch.no_grad()
    def denoise(self, x_t: Tensor, *, steps: int, start: int | None = None) -> Tensor:
        """DDIM (arXiv:2010.02502, eta 0) from pure noise, or from the visited level nearest to row `start`."""
        sampler = self._sampler(steps)
        for t in sampler.timesteps:
            if start is None or t <= start:
                index = torch.full((len(x_t),), int(t))
                x_t = sampler.step(self.predict(x_t, index), t, x_t).prev_sample
        return x_t.clamp(-1, 1)

    def copy(self) -> DDPM:
        """An independent model with equal, frozen weights."""
        twin = copy.copy(self)
        twin.pipeline = DDPMPipeline(copy.deepcopy(self.pipeline.unet), self.pipeline.scheduler)
        twin.network = twin.pipeline.unet.requires_grad_(False).eval()
        return twin

    def save(self, folder: Path) -> None:
        """A diffusers folder, in the weights' own precision."""
        self.pipeline.save_pretrained(folder)
