"""The original layout of Stable Diffusion 3: the names in the files that Stability ships, by the names in diffusers.

diffusers reads such a file (`diffusers.loaders.single_file_utils`) and cannot write it. A file may hold more, which it
drops: `text_encoders.*.logit_scale`, the `position_ids` of old CLIP files, and what belongs to a T5 in float8.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

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
_QKV = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
"""The original has q, k and v as one layer, (3 d, d)."""
_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    **{f"{attn}.to_{x}": f"x_block.{attn}.qkv" for attn in ("attn", "attn2") for x in "qkv"},
    **{f"attn.add_{x}_proj": "context_block.attn.qkv" for x in "qkv"},
    **{f"{attn}.norm_{x}": f"x_block.{attn}.ln_{x}" for attn in ("attn", "attn2") for x in "qk"},
    **{f"attn.norm_added_{x}": f"context_block.attn.ln_{x}" for x in "qk"},
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_VAE = {
    "mid_block.attentions.0": "mid.attn_1", ".resnets.": ".block.", "samplers.0.": "sample.", "to_q": "q", "to_k": "k",
    "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}  # fmt: skip


def transformer(names: Iterable[str]) -> dict[str, Piece]:
    """The pieces of the tensors of an `SD3Transformer2DModel`, of SD3 and SD3.5; CannotRun for one unknown there."""
    names = list(names)
    last = max((int(n.split(".")[1]) for n in names if n.startswith("transformer_blocks.")), default=0)
    return {name: _transformer_piece(name, last) for name in names}


def _transformer_piece(name: str, last: int) -> Piece:
    if name == "pos_embed.pos_embed":
        return Piece(f"{TRANSFORMER}pos_embed")  # a buffer, kept by both
    layer, _, kind = name.rpartition(".")
    block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
    prefix, layer = (f"joint_blocks.{block[1]}.", block[2]) if block else ("", layer)
    original = (_BLOCK if block else _ENDS).get(layer)
    if original is None or (".ln_" in original and kind == "bias"):
        raise unknown(name)
    index = _QKV.get(layer.rpartition(".")[2])
    # adaLN: 6 d rows, 9 d with a second attention; only where there are 2 d do the two codes order them differently.
    swapped = layer == "norm_out.linear" or (prefix == f"joint_blocks.{last}." and layer == "norm1_context.linear")
    return Piece(f"{TRANSFORMER}{prefix}{original}.{kind}", (0, 1) if index is None else (index, 3), swapped)


def vae(names: Iterable[str], prefix: str = VAE) -> dict[str, Piece]:
    """The pieces of the tensors of an `AutoencoderKL`; CannotRun for one that the original does not know."""
    names = list(names)
    last = max(int(m[1]) for n in names if (m := re.search(r"up_blocks\.(\d+)", n)))

    def level(m: re.Match[str]) -> str:
        # The original numbers levels by resolution, diffusers by the order of computing.
        return f"{m[1]}.{int(m[2]) if m[1] == 'down' else last - int(m[2])}"

    found = {}
    for name in names:
        if re.search(r"_blocks\.\d+\.attentions", name):
            raise unknown(name)
        original = re.sub(r"(down|up)_blocks\.(\d+)", level, name)
        original = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", original)
        for ours, theirs in _VAE.items():
            original = original.replace(ours, theirs)
        found[name] = Piece(prefix + original, convolution=bool(re.search(r"attentions\.0\.to_.*weight", name)))
    return found


def unknown(name: str) -> CannotRun:
    """What is said of a tensor that the original does not know."""
    return CannotRun(f"the original layout has no place for '{name}'", "Give the format diffusers.")


def text_encoder(part: str, names: Iterable[str]) -> dict[str, Piece]:
    """The pieces of the tensors of a text encoder, whose names are transformers' in the original, too.

    CLIP has `text_model.` before them (CLIPTextModelWithProjection) or not (CLIPTextModel of transformers 5); T5 has
    its embedding under two names or, as in files, one.
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
            sentence = "text_encoder has a projection that is not the identity: stock loaders of a single file drop it"
            raise CannotRun(sentence, "Give the format diffusers or transformer.")


LAYOUT = Layout(f"{TRANSFORMER}joint_blocks.", VAE, TEXT_ENCODERS, transformer, vae, text_encoder, check)
