"""Text-to-image flow models that read Qwen3: diffusers' `ZImagePipeline` (Z-Image and Z-Image-Turbo)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from unforget.families import flux, sd3
from unforget.families.spec import Config, FamilySpec, Setting

READS = 512
"""Tokens of a prompt in its chat template, at most."""


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, filled up with zeros, (1, 512, D), and how many there are, (1, 1)."""
    (tokens,), _ = pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
    length = tokens.new_full((1, 1), len(tokens), dtype=torch.float32)
    return functional.pad(tokens, (0, 0, 0, READS - len(tokens)))[None], length


def unpadded(conditioning: Sequence[Tensor]) -> list[Tensor]:
    """The tokens of each prompt, (length, D); all where the lengths have no content."""
    tokens, lengths = conditioning
    if lengths.is_meta:
        return list(tokens)
    return [t[: int(n)] for t, n in zip(tokens, lengths[:, 0].tolist(), strict=True)]


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The velocity of the flow; the network counts from noise to image, and answers the velocity that way."""
    frames = list(x_t[:, :, None])
    answer = network(frames, (1000 - timestep) / 1000, unpadded(conditioning), return_dict=False)[0]
    return -torch.stack(list(answer))[:, :, 0]


def blocks(config: Config) -> int:
    """Of noise, of text, and of both."""
    return int(config["n_layers"] + 2 * config["n_refiner_layers"])


SPEC = FamilySpec(
    name="z-image",
    title="Z-Image",
    pipeline_class="ZImagePipeline",
    network_class="ZImageTransformer2DModel",
    recipes=sd3.SPEC.recipes,
    formats=("diffusers", "lora", "peft", "transformer"),
    architecture=lambda config: "z-image",
    reference="https://github.com/Tongyi-MAI/Z-Image",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),  # as diffusers' own LoRA script
    aliases={"z-image": "Tongyi-MAI/Z-Image", "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo"},
    sampler="FlowMatchEulerDiscreteScheduler",
    timesteps=flux.timesteps,
    call=call,
    text_encoders={"text_encoder": "Qwen3Model"},
    reads={"text_encoder": READS},
    embed=embed,
    conditioning_shapes=lambda config: ((READS, config["cap_feat_dim"]), (1,)),
    guidance=1.0,  # Turbo's, whose folder does not tell it from the other
    latent=lambda config: (config["in_channels"], 128),
    latent_side=lambda config: (2, 512),
    blocks=blocks,
)
