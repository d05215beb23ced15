"""Models with the structures that other programs know, random weights, few and narrow layers; patches; arithmetic."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from models import CLIP_G, CLIP_L, FLUX, FLUX_VAE, SD, SD3, SD3_VAE, SDXL, VAE
from pipelines import t5
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from unforget.files.patch import Patch, Provenance
from unforget.files.storage import digest

ALPHA = 16
SIZE = 64
"""Of the pictures, in pixels."""
IDS = torch.tensor([[49406, 320, 1125, *[49407] * 74]])
NARROW = 256
"""The width of `flux`."""
BRIEF = {"num_hidden_layers": 3}
"""The depth of text encoders."""
XL = {**SDXL, "sample_size": 8}
SMALL_3 = {
    **SD3, "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128,
    "pos_embed_max_size": 16,
}  # fmt: skip
TINY = {"block_out_channels": [32] * 4, "layers_per_block": 1}
KOALA = {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd": ("StableDiffusionPipeline", {**SD, "sample_size": 8, "block_out_channels": [320] * 4}, VAE),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {**XL, **KOALA, "block_out_channels": [320] * 3, "attention_head_dim": [5] * 3},
        {**VAE, **TINY},
    ),
    "sdxl-32": (
        "StableDiffusionXLPipeline",
        {**XL, "block_out_channels": [32, 64, 128], "attention_head_dim": [1, 1, 2]},
        {**VAE, **TINY},
    ),
    "sd3": ("StableDiffusion3Pipeline", SMALL_3, SD3_VAE),
    "sd3.5": (
        "StableDiffusion3Pipeline",
        {**SMALL_3, "qk_norm": "rms_norm", "dual_attention_layers": [0]},
        {**SD3_VAE, **TINY},
    ),
    "flux": (
        "FluxPipeline",
        {**FLUX, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": NARROW // 128},
        {**FLUX_VAE, **TINY},
    ),
}  # fmt: skip
"""Pipelines, and the configurations of their networks and autoencoders; `sdxl` has the depth of KOALA-700M."""


def built(name: str, home: Path) -> Path:
    """The model's folder; written once."""
    if (home / "unforget.json").is_file():
        return home
    torch.manual_seed(0)
    kind, config, vae = MODELS[name]
    words = CLIPTokenizer().train_new_from_iterator(["a flag"], 520)
    words.model_max_length = 77
    one = CLIPTextConfig(**{**CLIP_L, **BRIEF}, projection_dim=768)
    two = CLIPTextConfig(**{**CLIP_G, **BRIEF}, projection_dim=1280, hidden_act="gelu")
    first = CLIPTextModelWithProjection(one) if "3" in kind else CLIPTextModel(one)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts: dict[str, Any] = {
        "vae": diffusers.AutoencoderKL.from_config(vae), "tokenizer": words, "text_encoder": first,
        "scheduler": diffusers.DDIMScheduler() if "UNet" in config["_class_name"] else flow,
        "unet" if "UNet" in config["_class_name"] else "transformer":
            getattr(diffusers, config["_class_name"]).from_config(config),
    }  # fmt: skip
    if kind == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None}
    elif kind == "FluxPipeline":
        parts["text_encoder_2"], parts["tokenizer_2"] = t5(4096)
    else:
        parts |= {"tokenizer_2": words, "text_encoder_2": CLIPTextModelWithProjection(two)}
    if "3" in kind:
        torch.nn.init.eye_(first.text_projection.weight)  # as stock loaders have it
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    home.parent.mkdir(parents=True, exist_ok=True)
    getattr(diffusers, kind)(**parts).save_pretrained(home)
    (home / "unforget.json").write_text(json.dumps({"guidance": 1.0, "retain_prompts": ["a flag"]}))
    return home


def patched(home: Path, family: Any, rank: int, path: Path) -> Path:
    """A LoRA on every layer that training changes, whose change of a weight is about a tenth of it."""
    state, tensors, g = family.network.state_dict(), {}, torch.Generator().manual_seed(rank)
    for name, weight in state.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and any(layer.endswith(f".{t}") for t in family.spec.lora_targets):
            out, rest = weight.shape
            tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, rest, generator=g) * 0.1 / rest**0.5
            tensors[f"{layer}.lora_B.weight"] = torch.randn(out, rank, generator=g) * rank**0.5 / ALPHA
    made = Provenance(
        base=home.name, base_digest=digest(state), targets=["t"], surrogates=["s"], holds="lora",
        adapter={"rank": rank, "alpha": ALPHA}, recipe={}, seed=0, steps=1, versions={},
    )  # fmt: skip
    Patch(tensors, made).save(path)
    return path


def changes(patch: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the patch does to each weight of the network, zeros to most, by diffusers' names."""
    factors, found = Patch.load(patch).tensors, {n: torch.zeros(t.shape) for n, t in state.items()}
    for name in (n.removesuffix(".lora_A.weight") for n in factors if n.endswith(".lora_A.weight")):
        down, up = (factors[f"{name}.lora_{side}.weight"] for side in "AB")
        found[f"{name}.weight"] = ALPHA / len(down) * up @ down
    return found


def share(applied: Mapping[str, Tensor], meant: Mapping[str, Tensor]) -> tuple[float, float]:
    """How much of the change is applied, and the largest difference, as a share of the largest change."""
    meant, zero = {n: t for n, t in meant.items() if t.any()}, torch.zeros(1)
    pairs = [(applied.get(n, zero).flatten(), meant.get(n, zero).flatten()) for n in {*applied, *meant}]
    norm = sum(float(t.double().square().sum()) for t in meant.values())
    apart = max(float((a - b).abs().max()) for a, b in pairs) / max(float(t.abs().max()) for t in meant.values())
    return sum(float((a.double() * b).sum()) for a, b in pairs) / norm, apart


def vector(pooled: Tensor) -> Tensor:
    """XL's pooled tokens and the six numbers of the size, as the original takes them."""
    size, embedded = SIZE, diffusers.models.embeddings.get_timestep_embedding
    numbers = embedded(torch.tensor([size, size, 0, 0, size, size]), 256, True, 0)
    return torch.cat([pooled, numbers.reshape(1, -1)], 1)


def states(encoders: list[Any]) -> Tensor:
    """What networks are given of a prompt: the last state of one encoder, the last but one of two."""
    found = [encoder(IDS, output_hidden_states=True) for encoder in encoders]
    return found[0][0] if len(found) == 1 else torch.cat([f.hidden_states[-2] for f in found], -1)
