"""Text-to-image flow models with distilled guidance: diffusers' `FluxPipeline` (FLUX.1 dev and schnell)."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unforget.families import sd3
from unforget.families.layouts.flux import LAYOUT
from unforget.families.spec import Config, FamilySpec, Setting

READS = 512
"""Tokens that T5 reads for dev; schnell was made with half as many."""


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of T5, (1, 512 or 256, D), and the pooled ones of CLIP, (1, P)."""
    reads = READS if pipeline.transformer.config.guidance_embeds else READS // 2
    tokens, pooled, _ = pipeline.encode_prompt(prompt, None, device=device, max_sequence_length=reads)
    return tokens, pooled


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The velocity of the flow, asked for in 2x2 squares of latents."""
    from diffusers import FluxPipeline

    (tokens, pooled), (n, channels, height, width) = conditioning, x_t.shape
    guidance = timestep.new_full((n,), setting.guidance or 1) if network.config.guidance_embeds else None
    answer = network(
        FluxPipeline._pack_latents(x_t, n, channels, height, width), tokens, pooled, timestep / 1000,
        FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, x_t.device, x_t.dtype),
        x_t.new_zeros(tokens.shape[1], 3), guidance, return_dict=False,
    )[0]  # fmt: skip
    unpacked: Tensor = FluxPipeline._unpack_latents(answer, height, width, 1)
    return unpacked


def timesteps(sampler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
    """Evenly spaced, and shifted by the number of squares where the scheduler's configuration says so."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if "mu" not in inspect.signature(sampler.set_timesteps).parameters:
        sampler.set_timesteps(steps)
        return
    ends = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
    squares = latent_shape[1] * latent_shape[2] // 4
    mu = calculate_shift(squares, *(sampler.config.get(name, default) for name, default in ends))
    sampler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)


def architecture(config: Config) -> str:
    """dev or schnell, by whether guidance is an input."""
    return "flux-1-dev" if config.get("guidance_embeds") else "flux-1-schnell"


SPEC = FamilySpec(
    name="flux",
    title="FLUX.1",
    pipeline_class="FluxPipeline",
    network_class="FluxTransformer2DModel",
    recipes=sd3.SPEC.recipes,
    formats=("diffusers", "lora", "peft", "kohya", "transformer", "single-file"),
    architecture=architecture,
    reference="https://github.com/black-forest-labs/flux",
    lora_targets=sd3.SPEC.lora_targets,
    aliases={"flux-dev": "black-forest-labs/FLUX.1-dev", "flux-schnell": "black-forest-labs/FLUX.1-schnell"},
    sampler="FlowMatchEulerDiscreteScheduler",
    timesteps=timesteps,
    call=call,
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
    reads={"text_encoder_2": READS},
    embed=embed,
    conditioning_shapes=lambda config: (
        (READS if config["guidance_embeds"] else READS // 2, config["joint_attention_dim"]),
        (config["pooled_projection_dim"],),
    ),
    guidance=3.5,
    distilled=True,
    latent=lambda config: (config["in_channels"] // 4, 128),
    latent_side=lambda config: (2, 512),
    blocks=lambda config: config["num_layers"] + config["num_single_layers"],
    layout=LAYOUT,
)  # fmt: skip
