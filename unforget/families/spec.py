"""What is particular of a family of models, as data: a row a family, and nothing about one of them elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from unforget.core.objectives import CleanSpace, Linear, PosteriorSwap, Surrogate
from unforget.core.recipe import Recipe
from unforget.core.types import Scope


@dataclass(frozen=True)
class FamilySpec:
    """A row.

    Attributes:
        name: Its name: sd3.
        pipeline_class: The stock pipeline, `_class_name` in model_index.json.
        network: The part that is trained, its name in the pipeline and its subfolder.
        prompted: Whether prompts say what is drawn.
        scopes: Which weights can be trained, the default first.
        recipes: By name; there is a `default` and a `paper`.
        formats: Export formats that it has.
        task: What the hub calls what it does.
        architecture: ModelSpec's name of a network with a configuration.
        reference: ModelSpec's name of the code that reads its original layout.
        lora_targets: Names of the projections that a LoRA is beside.
    """

    name: str
    pipeline_class: str
    network: str
    prompted: bool
    scopes: tuple[Scope, ...]
    recipes: Mapping[str, Recipe]
    formats: tuple[str, ...]
    task: str
    architecture: Callable[[Mapping[str, Any]], str]
    reference: str = ""
    lora_targets: tuple[str, ...] = ()


def _sd3_architecture(config: Mapping[str, Any]) -> str:
    if config.get("dual_attention_layers"):
        return "stable-diffusion-v3.5-medium"
    return "stable-diffusion-v3.5-large" if config.get("qk_norm") else "stable-diffusion-v3-medium"


DDPM = FamilySpec(
    name="ddpm",
    pipeline_class="DDPMPipeline",
    network="unet",
    prompted=False,
    scopes=("bottleneck", "full"),
    recipes={
        "default": Recipe(),
        # arXiv:2603.10445 on google/ddpm-celebahq-256: all weights, batch 8, 240 steps. Its learning rate of 5e-6
        # belongs
        # to a model of 114 M parameters.
        "paper": Recipe(
            objective=Surrogate(),
            train="full",
            learning_rate=5e-6,
            max_train_steps=240,
            warmup_steps=0,
            cooldown_steps=0,
            forget_batch_size=8,
            retain_batch_size=8,
            neighbour_share=0,
            forget_range=(1, 1000),
            stop_margin=None,
        ),
    },
    formats=("diffusers", "transformer"),
    task="unconditional-image-generation",
    architecture=lambda config: "ddpm-unet",
)
SD3 = FamilySpec(
    name="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    network="transformer",
    prompted=True,
    scopes=("lora", "full"),
    recipes={
        # A prompt says at pure noise what will be drawn, so forgetting reaches up to there.
        "default": Recipe(
            objective=PosteriorSwap(weighting=CleanSpace(cap=1.0, retain=32.0), taper=(710, 790)),
            train="lora",
            learning_rate=2e-3,
            max_train_steps=360,
            cooldown_steps=140,
            forget_range=(97, 1000),
            neighbour_share=0.5,
            stop_margin=None,
        ),
        # arXiv:2603.10445 on Stable Diffusion 3: LoRA, 100 steps, batch 8; the rate belongs to 2 B parameters.
        "paper": DDPM.recipes["paper"].model_copy(
            update={
                "objective": Surrogate(weighting=Linear(beta=2e-4)),
                "train": "lora",
                "learning_rate": 1e-5,
                "max_train_steps": 100,
            }
        ),
    },
    formats=("diffusers", "lora", "peft", "transformer", "single-file"),
    task="text-to-image",
    architecture=_sd3_architecture,
    reference="https://github.com/Stability-AI/sd3-ref",
    lora_targets=(
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    ),  # as diffusers' own LoRA script for SD3
)  # fmt: skip
FAMILIES = (DDPM, SD3)
