"""Class-conditional models on latents: diffusers' `DiTPipeline`. A class takes the place of a prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unforget.errors import UsageError
from unforget.families import sd
from unforget.families.recipes import latent_recipes
from unforget.families.spec import FamilySpec, Setting

CLASSES = 1000
"""Of ImageNet, which the stock pipeline counts on: the next number is no class."""


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor]:
    """The number of a class, (1,), by `class:207` or one of its names; UsageError if there is no such class."""
    name = prompt.removeprefix("class:")
    number = CLASSES if not prompt else int(name) if name.isdecimal() else pipeline.labels.get(name, -1)
    if not 0 <= number < CLASSES + (not prompt):
        hint = f"Give class:0 to class:{CLASSES - 1}, or a name that the model knows."
        raise UsageError(f"there is no class '{prompt}'", hint)
    return (torch.tensor([number]),)


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The noise; a learnt variance, the other half of the channels, is not used."""
    answer: Tensor = network(x_t, timestep, class_labels=conditioning[0].long(), return_dict=False)[0]
    return answer[:, : x_t.shape[1]]


SPEC = FamilySpec(
    name="dit",
    title="DiT",
    pipeline_class="DiTPipeline",
    network_class="DiTTransformer2DModel",
    network_also=("Transformer2DModel",),
    everyday=tuple(f"class:{n}" for n in range(0, CLASSES, 8)),
    # Stable Diffusion's, at the same ratios of noise to image: its betas are linear.
    recipes=latent_recipes(taper=(436, 516), forget_range=(29, 1000), updates=360),
    formats=("diffusers", "peft", "transformer"),
    task="unconditional-image-generation",
    architecture=lambda config: "dit-xl-2",
    reference="https://github.com/facebookresearch/DiT",
    lora_targets=sd.SPEC.lora_targets,
    aliases={"dit": "facebook/DiT-XL-2-256"},
    sampler="DDIMScheduler",
    sampler_options=sd.SPEC.sampler_options,
    call=call,
    embed=embed,
    conditioning_shapes=lambda config: ((),),
    guidance=4.0,
    blocks=lambda config: config["num_layers"],
)
