"""The original layout of Stable Diffusion 3, as data.

Stability ships SD3 and SD3.5 as one `.safetensors` file with the names of its own code (`mmditx.py`, `sd3_impls.py`,
`other_impls.py`). diffusers reads that (`diffusers.loaders.single_file_utils`) and cannot write it. The maps here are
that reader's: every tensor of diffusers is one `Piece` of the original, and no bit is lost.

A file may hold more, which diffusers drops and no `Piece` names: `text_encoders.*.logit_scale`, the `position_ids` of
old CLIP files, and what belongs to a T5 in scaled float8 (`scaled_fp8`, `*.scale_weight`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from unforget.errors import CannotRun
from unforget.families.layouts import Layout, Piece
from unforget.files.storage import Lazy

TRANSFORMER = "model.diffusion_model."
VAE = "first_stage_model."
TEXT_ENCODERS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}


def _attention(ours: str, projections: Sequence[str], original: str) -> dict[str, Piece]:
    """Rules of an attention with `projections` (q, k, v, out): the original has q, k and v as one layer, (3 d, d)."""
    *qkv, out = (f"{ours}.{name}" for name in projections)
    return {name: Piece(f"{original}.qkv", (i, 3)) for i, name in enumerate(qkv)} | {out: Piece(f"{original}.proj")}


# Rules name layers, in diffusers and in the original; `_tensors` makes weight and bias of them.
_IMAGE = ("to_q", "to_k", "to_v", "to_out.0")
_CONTEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_ENDS = {
    "pos_embed.proj": Piece("x_embedder.proj"),
    "time_text_embed.timestep_embedder.linear_1": Piece("t_embedder.mlp.0"),
    "time_text_embed.timestep_embedder.linear_2": Piece("t_embedder.mlp.2"),
    "time_text_embed.text_embedder.linear_1": Piece("y_embedder.mlp.0"),
    "time_text_embed.text_embedder.linear_2": Piece("y_embedder.mlp.2"),
    "context_embedder": Piece("context_embedder"),
    "norm_out.linear": Piece("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Piece("final_layer.linear"),
}
_BLOCK = {
    # adaLN: 6 d rows, 9 d with a second attention; only where there are 2 d do the two codes order them differently.
    "norm1.linear": Piece("x_block.adaLN_modulation.1"),
    "norm1_context.linear": Piece("context_block.adaLN_modulation.1"),
    **_attention("attn", _IMAGE, "x_block.attn"),
    **_attention("attn", _CONTEXT, "context_block.attn"),
    "ff.net.0.proj": Piece("x_block.mlp.fc1"),
    "ff.net.2": Piece("x_block.mlp.fc2"),
    "ff_context.net.0.proj": Piece("context_block.mlp.fc1"),
    "ff_context.net.2": Piece("context_block.mlp.fc2"),
}
# The context leaves the last block after its attention: both codes leave out what would follow, and its adaLN has 2 d
# rows. Its q, which has no effect, is in both.
_UNUSED = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
_LAST = {name: piece for name, piece in _BLOCK.items() if name not in _UNUSED} | {
    "norm1_context.linear": Piece("context_block.adaLN_modulation.1", swapped=True)
}
_DUAL = _attention("attn2", _IMAGE, "x_block.attn2")
_NORMS = {
    "attn.norm_q": Piece("x_block.attn.ln_q"),
    "attn.norm_k": Piece("x_block.attn.ln_k"),
    "attn.norm_added_q": Piece("context_block.attn.ln_q"),
    "attn.norm_added_k": Piece("context_block.attn.ln_k"),
}
_DUAL_NORMS = {"attn2.norm_q": Piece("x_block.attn2.ln_q"), "attn2.norm_k": Piece("x_block.attn2.ln_k")}

_RESNET = {name: Piece(name) for name in ("norm1", "conv1", "norm2", "conv2")}
_SHORTCUT = {"conv_shortcut": Piece("nin_shortcut")}
_VAE_ATTENTION = {
    "group_norm": Piece("norm"),
    "to_q": Piece("q", convolution=True),
    "to_k": Piece("k", convolution=True),
    "to_v": Piece("v", convolution=True),
    "to_out.0": Piece("proj_out", convolution=True),
}
_VAE_ENDS = {"conv_in": Piece("conv_in"), "conv_norm_out": Piece("norm_out"), "conv_out": Piece("conv_out")}


def _within(rules: Mapping[str, Piece], ours: str, theirs: str) -> dict[str, Piece]:
    """The rules of a module for where it is: `ours` in diffusers, `theirs` in the original."""
    return {f"{ours}.{name}": replace(p, original=f"{theirs}.{p.original}") for name, p in rules.items()}


def _tensors(rules: Mapping[str, Piece], prefix: str, kinds: Sequence[str] = ("weight", "bias")) -> dict[str, Piece]:
    """The tensors of layers. A bias has one dimension, of a convolution as of a linear layer."""
    return {
        f"{name}.{kind}": replace(
            p, original=f"{prefix}{p.original}.{kind}", convolution=p.convolution and kind == "weight"
        )
        for name, p in rules.items()
        for kind in kinds
    }


def transformer(config: Mapping[str, Any]) -> dict[str, Piece]:
    """Every tensor of `SD3Transformer2DModel(config)`, of SD3 and SD3.5.

    Raises:
        CannotRun: If its attention has a norm that the original does not know.
    """
    norm = config.get("qk_norm")
    if norm not in (None, "rms_norm"):
        raise CannotRun(f"the original layout has no '{norm}' of queries and keys", "Save it as a diffusers folder.")
    layers, norms = dict(_ENDS), dict[str, Piece]()
    for i in range(config["num_layers"]):
        place = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        dual = i in (config.get("dual_attention_layers") or ())
        block = _BLOCK if i < config["num_layers"] - 1 else _LAST
        layers |= _within(block | (_DUAL if dual else {}), *place)
        if norm:
            norms |= _within(_NORMS | (_DUAL_NORMS if dual else {}), *place)
    return {
        "pos_embed.pos_embed": Piece(f"{TRANSFORMER}pos_embed"),  # a buffer, kept by both
        **_tensors(layers, TRANSFORMER),
        **_tensors(norms, TRANSFORMER, ("weight",)),
    }


def vae(config: Mapping[str, Any]) -> dict[str, Piece]:
    """Every tensor of `AutoencoderKL(config)`. SD3's has no `quant_conv`; one that has keeps it under that name.

    Raises:
        CannotRun: If it has other blocks than the original.
    """
    kinds = {*config["down_block_types"], *config["up_block_types"]}
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise CannotRun(f"the original layout has no VAE of {', '.join(sorted(kinds))}", "Save it as a folder.")
    widths, depth = list(config["block_out_channels"]), config["layers_per_block"]
    last = len(widths) - 1
    rules: dict[str, Piece] = {}
    for side, blocks, levels, sample, channels, resnets in (
        ("encoder", "down_blocks", "down", "downsample", widths, depth),
        ("decoder", "up_blocks", "up", "upsample", widths[::-1], depth + 1),
    ):
        rules |= _within(_VAE_ENDS, side, side)
        for j in range(2):
            rules |= _within(_RESNET, f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}")
        if config.get("mid_block_add_attention", True):
            rules |= _within(_VAE_ATTENTION, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1")
        for i, width in enumerate(channels):
            # The original numbers levels by resolution, diffusers by the order of computing.
            ours, theirs = f"{side}.{blocks}.{i}", f"{side}.{levels}.{i if side == 'encoder' else last - i}"
            for j in range(resnets):
                wider = j == 0 and channels[max(i - 1, 0)] != width
                resnet = _RESNET | (_SHORTCUT if wider else {})
                rules |= _within(resnet, f"{ours}.resnets.{j}", f"{theirs}.block.{j}")
            if i < last:
                rules[f"{ours}.{sample}rs.0.conv"] = Piece(f"{theirs}.{sample}.conv")
    for name in ("quant_conv", "post_quant_conv"):
        if config.get(f"use_{name}", True):
            rules[name] = Piece(name)
    return _tensors(rules, VAE)


def text_encoder(part: str, names: Iterable[str]) -> dict[str, Piece]:
    """The tensors of a text encoder, whose names are transformers' in the original, too.

    Stock `from_single_file` puts an identity in place of clip_l's `text_projection.weight`, whatever the file holds:
    SD3 takes clip_l's pooled output as it is. Other files may hold one, so it keeps its place here.

    Args:
        part: Of the pipeline.
        names: As a state dict or file of transformers has them: CLIP with `text_model.` (CLIPTextModelWithProjection)
            or without (CLIPTextModel of transformers 5); T5 with its embedding under two names or, as in files, one.
    """
    names, prefix = list(names), TEXT_ENCODERS[part]
    if part != "text_encoder_3":
        heads = ("text_model.", "text_projection.")
        return {n: Piece(prefix + (n if n.startswith(heads) else f"text_model.{n}")) for n in names}
    layout = {name: Piece(prefix + name) for name in names}
    # transformers ties the two and saves the first alone; the original stores both, and stock `from_single_file`, which
    # does not tie, leaves the second without data unless the file has it.
    first, second = "shared.weight", "encoder.embed_tokens.weight"
    if first in layout and second not in layout:
        layout[first] = replace(layout[first], copies=(prefix + second,))
    return layout


def check(part: str, tensors: Mapping[str, Lazy]) -> None:
    """Refuse a clip_l whose projection stock `from_single_file` would drop: it puts an identity in its place."""
    projection = tensors.get("text_projection.weight")
    if part == "text_encoder" and projection is not None:
        found = projection.make()
        if not torch.equal(found, torch.eye(len(found), dtype=found.dtype)):
            raise CannotRun(
                "text_encoder has a projection that is not the identity: stock loaders of a single file drop it",
                "Give the format diffusers or transformer.",
            )


LAYOUT = Layout("joint_blocks.", TRANSFORMER, VAE, TEXT_ENCODERS, transformer, vae, text_encoder, check)
