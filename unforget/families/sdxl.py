"""Text-to-image models with a large UNet: diffusers' `StableDiffusionXLPipeline`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unforget.families import sd
from unforget.families.layouts.unet import SDXL_LAYOUT
from unforget.families.spec import FamilySpec, Setting


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of both encoders, (1, 77, D), and the second one's pooled ones, (1, P).

    "No prompt" is what the pipeline sets against a prompt: zeros, if its configuration says so.
    """
    asked, against, pooled, pooled_against = pipeline.encode_prompt(
        prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=not prompt
    )
    return (asked, pooled) if prompt else (against, pooled_against)


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The noise or the velocity, of a picture that was never larger and is not cropped."""
    tokens, pooled = conditioning
    time_ids = x_t.new_tensor([*setting.size, 0, 0, *setting.size]).expand(len(x_t), -1)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    answer: Tensor = network(x_t, timestep, tokens, added_cond_kwargs=added, return_dict=False)[0]
    return answer


SPEC = FamilySpec(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline_class="StableDiffusionXLPipeline",
    network="unet",
    network_class="UNet2DConditionModel",
    recipes=sd.SPEC.recipes,
    formats=("diffusers", "lora", "peft", "kohya", "transformer", "single-file"),
    architecture=lambda config: "stable-diffusion-xl-v1-base",
    reference="https://github.com/Stability-AI/generative-models",
    lora_targets=sd.SPEC.lora_targets,
    aliases={"sdxl": "stabilityai/stable-diffusion-xl-base-1.0"},
    sampler="DDIMScheduler",
    sampler_options=sd.SPEC.sampler_options,
    call=call,
    text_encoders={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
    embed=embed,
    # The pooled ones are beside six embedded numbers of the size.
    conditioning_shapes=lambda config: (
        (77, config["cross_attention_dim"]),
        (config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],),
    ),
    guidance=5.0,
    vae_dtype="float32",  # its numbers overflow in half precision (`force_upcast`)
    layout=SDXL_LAYOUT,
    unfit=sd.unfit,
    blocks=sd.SPEC.blocks,
    refused={"StableDiffusionXLImg2ImgPipeline": "A refiner draws no picture of its own: give the base model."},
    passed={"add_watermarker": False},
)  # fmt: skip
