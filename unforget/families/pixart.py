"""Text-to-image models that read T5 alone: diffusers' `PixArtSigmaPipeline`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unforget.families import dit, sd
from unforget.families.spec import FamilySpec, Setting

READS = 300
"""Tokens of a prompt, at most; its place is filled up to them."""


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of T5, (1, 300, D), and which of them are the prompt's, (1, 300).

    A draw of the stock pipeline cleans its prompt where bs4 and ftfy are installed.
    """
    from diffusers.utils import is_bs4_available, is_ftfy_available

    tokens, mask, _, _ = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, device=device, max_sequence_length=READS,
        clean_caption=is_bs4_available() and is_ftfy_available(),
    )  # fmt: skip
    return tokens, mask


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The noise; a learnt variance, the other half of the channels, is not used."""
    tokens, mask = conditioning
    answer: Tensor = network(
        x_t, tokens, timestep, added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        encoder_attention_mask=mask, return_dict=False,
    )[0]  # fmt: skip
    return answer[:, : x_t.shape[1]]


SPEC = FamilySpec(
    name="pixart",
    title="PixArt-Sigma",
    pipeline_class="PixArtSigmaPipeline",
    network_class="PixArtTransformer2DModel",
    network_also=("Transformer2DModel",),
    recipes=dit.SPEC.recipes,
    formats=("diffusers", "peft", "transformer"),
    architecture=lambda config: "pixart-ms-sigma-xl-2",
    reference="https://github.com/PixArt-alpha/PixArt-sigma",
    lora_targets=sd.SPEC.lora_targets,
    aliases={"pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"},
    sampler="DDIMScheduler",
    sampler_options=sd.SPEC.sampler_options,
    call=call,
    text_encoders={"text_encoder": "T5EncoderModel"},
    reads={"text_encoder": READS},
    embed=embed,
    conditioning_shapes=lambda config: ((READS, config["caption_channels"]), (READS,)),
    guidance=4.5,
    vae_dtype="float32",  # Stable Diffusion XL's
    latent_side=lambda config: (config["patch_size"], 1024),
    blocks=lambda config: config["num_layers"],
)
