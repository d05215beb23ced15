"""Text-to-image flow models that read Qwen3: diffusers' `Flux2KleinPipeline` (FLUX.2 klein)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unforget.families import sd3
from unforget.families.spec import FamilySpec, Setting

READS = 512
"""Tokens of a prompt in its chat template; all are read, filled up."""


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor]:
    """What three layers of Qwen3 say, (1, 512, 3 D)."""
    tokens, _ = pipeline.encode_prompt(prompt, device=device)
    return (tokens,)


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The velocity of the flow; places count along four axes."""
    from diffusers import Flux2KleinPipeline as Stock

    (tokens,) = conditioning
    ids, text_ids = (make(t).to(x_t.device) for make, t in (
        (Stock._prepare_latent_ids, x_t), (Stock._prepare_text_ids, tokens)
    ))  # fmt: skip
    answer: Tensor = network(
        Stock._pack_latents(x_t), tokens, timestep / 1000, img_ids=ids, txt_ids=text_ids, guidance=None,
        return_dict=False,
    )[0]  # fmt: skip
    return answer.transpose(1, 2).reshape(x_t.shape)


def to_x_0(autoencoder: Any, latents: Tensor) -> Tensor:
    """2x2 squares of latents, each channel with the mean and the variance that the autoencoder counted."""
    from diffusers import Flux2KleinPipeline as Stock

    mean, std = _statistics(autoencoder, latents)
    gathered: Tensor = (Stock._patchify_latents(latents) - mean) / std
    return gathered


def to_latents(autoencoder: Any, x_0: Tensor) -> Tensor:
    """The inverse of `to_x_0`."""
    from diffusers import Flux2KleinPipeline as Stock

    mean, std = _statistics(autoencoder, x_0)
    latents: Tensor = Stock._unpatchify_latents(x_0 * std + mean)
    return latents


def _statistics(autoencoder: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    counted = autoencoder.bn
    mean, variance = (t.reshape(1, -1, 1, 1).to(like) for t in (counted.running_mean, counted.running_var))
    return mean, (variance + autoencoder.config.batch_norm_eps).sqrt()


def timesteps(sampler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
    """Evenly spaced, and shifted by the number of places and of steps."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    mu = compute_empirical_mu(latent_shape[1] * latent_shape[2], steps)
    sampler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)


SPEC = FamilySpec(
    name="flux2-klein",
    title="FLUX.2 klein",
    pipeline_class="Flux2KleinPipeline",
    network_class="Flux2Transformer2DModel",
    autoencoders=("AutoencoderKLFlux2",),
    to_x_0=to_x_0,
    to_latents=to_latents,
    gathered=2,
    recipes=sd3.SPEC.recipes,
    formats=("diffusers", "lora", "peft", "transformer"),
    architecture=lambda config: "flux-2-klein",
    reference="https://github.com/black-forest-labs/flux2",
    # As diffusers' own LoRA script: q, k, v and the output, of image and text, of single blocks too.
    lora_targets=(*sd3.SPEC.lora_targets, "to_qkv_mlp_proj"),
    aliases={"flux2-klein": "black-forest-labs/FLUX.2-klein-4B"},
    sampler="FlowMatchEulerDiscreteScheduler",
    timesteps=timesteps,
    call=call,
    text_encoders={"text_encoder": "Qwen3ForCausalLM"},
    reads={"text_encoder": READS},
    embed=embed,
    conditioning_shapes=lambda config: ((READS, config["joint_attention_dim"]),),
    guidance=1.0,  # of the distilled ones; their base has 4
    latent=lambda config: (config["in_channels"], 64),
    latent_side=lambda config: (1, 256),
    blocks=lambda config: config["num_layers"] + config["num_single_layers"],
)
