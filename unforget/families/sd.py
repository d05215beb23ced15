"""Text-to-image models with a UNet: diffusers' `StableDiffusionPipeline` (Stable Diffusion 1.x and 2.x)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unforget.families.layouts.unet import SD_LAYOUT
from unforget.families.recipes import latent_recipes
from unforget.families.spec import Config, FamilySpec, Setting


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor]:
    """Tokens of CLIP, (1, 77, D)."""
    embeds, _ = pipeline.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)
    return (embeds,)


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The noise or the velocity, whichever its scheduler's configuration names."""
    answer: Tensor = network(x_t, timestep, *conditioning, return_dict=False)[0]
    return answer


def architecture(config: Config) -> str:
    """1.x, or 2.x by the size of its pictures."""
    if config.get("cross_attention_dim") != 1024:
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if config.get("sample_size") == 96 else "stable-diffusion-v2-512"


def unfit(config: Config) -> str:
    """Inpainting and editing models take pictures besides noise."""
    channels = config["in_channels"], config["out_channels"]
    return "" if channels[0] == channels[1] else "takes {} channels and answers {}".format(*channels)


SPEC = FamilySpec(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
    pipeline_class="StableDiffusionPipeline",
    network="unet",
    network_class="UNet2DConditionModel",
    # SD3's, at the same ratios of noise to image; twice as long, for less leaves halves of both (docs/results.md).
    recipes=latent_recipes(taper=(620, 730), forget_range=(13, 1000), updates=360),
    formats=("diffusers", "lora", "peft", "kohya", "transformer", "single-file"),
    architecture=architecture,
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),  # as diffusers' own LoRA script
    aliases={"sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
    sampler="DDIMScheduler",
    sampler_options={"clip_sample": False},  # as the pipeline does: latents have no bounds
    call=call,
    text_encoders={"text_encoder": "CLIPTextModel"},
    embed=embed,
    conditioning_shapes=lambda config: ((77, config["cross_attention_dim"]),),
    guidance=7.5,
    vae_dtype="float32",
    layout=SD_LAYOUT,
    unfit=unfit,
    blocks=lambda config: 2 * len(config["block_out_channels"]) + 1,
    passed={"requires_safety_checker": False},
)  # fmt: skip
