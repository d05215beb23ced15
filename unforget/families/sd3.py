"""Text-to-image flow models: diffusers' `StableDiffusion3Pipeline` (SD3, SD3.5)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from unforget.families.layouts.sd3 import LAYOUT
from unforget.families.recipes import latent_recipes
from unforget.families.spec import Config, FamilySpec, Setting

ABSENT = 256
"""Tokens of zeros that the pipeline puts where T5 is missing (its `max_sequence_length`)."""
SCORES = (5.34375, 3.84375)
"""What is added to the scores of tokens that count as all of those: exp(a) + exp(b) is 256.004.

bfloat16 holds both exactly. It has no number near log 256: one token alone would count 252.5.
"""


class _LastCount(TorchFunctionMode):
    """Attention where the last keys count `ABSENT` times."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            query, key = args[:2]
            kwargs["attn_mask"] = query.new_zeros(1, 1, 1, key.shape[2])
            kwargs["attn_mask"][..., -len(SCORES) :] = query.new_tensor(SCORES)
        return func(*args, **kwargs)


class WithoutT5:
    """SD3's attention for two tokens in place of T5's 256 equal ones.

    Context has no positions, so equal tokens stay equal through all layers; one of them, with the logarithm of their
    number added to its score, is all of them. Two share that number, so that it comes out in bfloat16, too.
    """

    def __init__(self) -> None:
        from diffusers.models.attention_processor import JointAttnProcessor2_0

        self.stock = JointAttnProcessor2_0()

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **named: Any
    ) -> Any:
        if encoder_hidden_states is None:  # SD3.5's second attention sees the image alone
            return self.stock(attn, hidden_states, None, *args, **named)
        with _LastCount():
            return self.stock(attn, hidden_states, encoder_hidden_states, *args, **named)


def adapt(network: Any, absent: Sequence[str]) -> None:
    """Attend as stock does to the zeros in place of T5."""
    if "text_encoder_3" in absent:
        network.set_attn_processor(WithoutT5())


def embed(pipeline: Any, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, (1, 77 + 256, D), or (1, 77 + 2, D) without T5, and the pooled ones, (1, P)."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt, prompt, prompt, device=device, do_classifier_free_guidance=False
    )
    tokens = pipeline.tokenizer_max_length + len(SCORES) if pipeline.text_encoder_3 is None else embeds.shape[1]
    return embeds[:, :tokens], pooled


def call(network: Any, x_t: Tensor, timestep: Tensor, conditioning: Sequence[Tensor], setting: Setting) -> Tensor:
    """The velocity of the flow."""
    answer: Tensor = network(x_t, *conditioning, timestep, return_dict=False)[0]
    return answer


def timesteps(sampler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
    """The scheduler's own, shifted by the number of squares where its configuration says so."""
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    if not sampler.config.get("use_dynamic_shifting"):
        sampler.set_timesteps(steps)
        return
    ends = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.16)
    squares = latent_shape[1] * latent_shape[2] // 4
    sampler.set_timesteps(steps, mu=calculate_shift(squares, *(sampler.config.get(*end) for end in ends)))


def architecture(config: Config) -> str:
    """SD3 or SD3.5, by what its attention has."""
    if config.get("dual_attention_layers"):
        return "stable-diffusion-v3.5-medium"
    return "stable-diffusion-v3.5-large" if config.get("qk_norm") else "stable-diffusion-v3-medium"


SPEC = FamilySpec(
    name="sd3",
    title="Stable Diffusion 3",
    pipeline_class="StableDiffusion3Pipeline",
    network_class="SD3Transformer2DModel",
    recipes=latent_recipes(taper=(710, 790), forget_range=(97, 1000), damping=0.1),
    formats=("diffusers", "lora", "peft", "transformer", "single-file"),
    architecture=architecture,
    reference="https://github.com/Stability-AI/sd3-ref",
    # As diffusers' own LoRA script for SD3.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    aliases={
        "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
        "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
        "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    },
    sampler="FlowMatchEulerDiscreteScheduler",
    timesteps=timesteps,
    call=call,
    adapt=adapt,
    text_encoders={
        "text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    },
    optional=("text_encoder_3",),
    # Small models have such a T5, so that stock `from_pretrained` opens them: it refuses a folder without one.
    silent=lambda t5: not bool(t5.encoder.final_layer_norm.weight.any()),
    reads={"text_encoder_3": ABSENT},
    embed=embed,
    conditioning_shapes=lambda config: (
        (77 + ABSENT, config["joint_attention_dim"]), (config["pooled_projection_dim"],)
    ),
    guidance=7.0,
    latent_side=lambda config: (config["patch_size"], config["patch_size"] * config["pos_embed_max_size"]),
    blocks=lambda config: config["num_layers"],
    layout=LAYOUT,
)  # fmt: skip
