"""Text-to-image flow models with linear attention that read Gemma: diffusers' `SanaPipeline`."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unforget.families import sd3
from unforget.families.spec import FamilySpec, Setting

READS = 300
"""Tokens of a prompt, the instruction before it not counted."""


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, (1, 300, D), and which of them are some, (1, 300).

    A prompt stands behind the instruction that stock's draws have. "No prompt" is what the pipeline sets against one,
    without an instruction.
    """
    asked = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    tokens, mask, against, against_mask = pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=not prompt, device=device, complex_human_instruction=asked
    )
    return (tokens, mask) if prompt else (against, against_mask)


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The velocity of the flow, without a learnt variance."""
    tokens, mask = conditioning
    answer: Tensor = network(
        x_t, encoder_hidden_states=tokens, encoder_attention_mask=mask,
        timestep=timestep * network.config.timestep_scale, return_dict=False,
    )[0]  # fmt: skip
    return answer[:, : x_t.shape[1]]


SPEC = FamilySpec(
    name="sana",
    title="Sana",
    pipeline_class="SanaPipeline",
    network_class="SanaTransformer2DModel",
    recipes=sd3.SPEC.recipes,
    formats=("diffusers", "lora", "peft", "transformer"),
    architecture=lambda config: "sana",
    reference="https://github.com/NVlabs/Sana",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    aliases={"sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"},
    autoencoders=("AutoencoderDC",),
    sampler="DPMSolverMultistepScheduler",
    schedulers=("FlowMatchEulerDiscreteScheduler",),
    # Euler, which begins anywhere: the second order remembers the steps before.
    sampler_options={"solver_order": 1},
    call=call,
    text_encoders={"text_encoder": "Gemma2Model"},
    reads={"text_encoder": READS},
    embed=embed,
    conditioning_shapes=lambda config: ((READS, config["caption_channels"]), (READS,)),
    guidance=4.5,
    latent_side=lambda config: (config["patch_size"], 128),
    blocks=lambda config: config["num_layers"],
    refused={"SanaSprintPipeline": "Sana-Sprint counts noise in another way: give a Sana model."},
)
