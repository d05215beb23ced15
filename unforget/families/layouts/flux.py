"""The original layout of FLUX.1: Black Forest Labs' names, and ComfyUI's before them in a file with all parts.

diffusers reads both and cannot write them.
"""

import re
from collections.abc import Iterable, Mapping

from unforget.errors import CannotRun
from unforget.families.layouts import Layout, Piece, sd3
from unforget.files.storage import Lazy

PREFIX = sd3.TRANSFORMER
VAE = "vae."
CLIP, T5 = "text_encoder", "text_encoder_3"
"""What the same text encoders are called beside SD3."""
TEXT_ENCODERS = {"text_encoder": sd3.TEXT_ENCODERS[CLIP], "text_encoder_2": sd3.TEXT_ENCODERS[T5]}
WIDTH = 3072
"""Of every FLUX.1. Stock readers take it for granted where they divide `linear1`."""
_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{ours}_embedder.linear_{i}": f"{theirs}_in.{side}_layer"
        for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for i, side in ((1, "in"), (2, "out"))
    },
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    **{f"attn.to_{x}": "img_attn.qkv" for x in "qkv"},
    **{f"attn.add_{x}_proj": "txt_attn.qkv" for x in "qkv"},
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1"),
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_QKV = {f"attn.{name}": i for i, x in enumerate("qkv") for name in (f"to_{x}", f"add_{x}_proj")}


def transformer(names: Iterable[str]) -> dict[str, Piece]:
    """The pieces of the tensors of a `FluxTransformer2DModel`; CannotRun for one unknown there."""
    return {name: _piece(name) for name in names}


def _piece(name: str) -> Piece:
    layer, _, kind = name.rpartition(".")
    block = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", layer)
    single, number, layer = block.groups() if block else (None, "", layer)
    table = _SINGLE if single else _DOUBLE if block else _ENDS
    original = table.get(layer)
    if original is None or (original.endswith("_norm") and kind == "bias"):
        raise sd3.unknown(name)
    start = f"{PREFIX}{'single' if single else 'double'}_blocks.{number}." if block else PREFIX
    place = f"{start}{original}.{'scale' if original.endswith('_norm') else kind}"
    if original == "linear1":  # q, k and v, and a perceptron that is four times as wide as each
        return Piece(place, (_QKV.get(layer, 3), 7), width=1 if layer in _QKV else 4)
    if layer in _QKV:
        return Piece(place, (_QKV[layer], 3))
    return Piece(place, swapped=layer == "norm_out.linear")


def text_encoder(part: str, names: Iterable[str]) -> dict[str, Piece]:
    """The pieces of CLIP, or of T5, which lie as in a file of SD3."""
    return sd3.text_encoder(CLIP if part == "text_encoder" else T5, names)


def check(part: str, tensors: Mapping[str, Lazy]) -> None:
    """Refuse a network of another width than the released ones'."""
    if part == "network" and (width := tensors["x_embedder.bias"].shape[0]) != WIDTH:
        sentence = f"a FLUX.1 is {WIDTH} wide, this one {width}: stock loaders would divide its layers wrongly"
        raise CannotRun(sentence, "Give the format diffusers, lora or transformer.")


LAYOUT = Layout(
    # Not `double_blocks.` alone: FLUX.2 and Chroma have those, too, and no modulation in each.
    mark=f"{PREFIX}double_blocks.0.img_mod.lin.", vae_prefix=VAE, text_encoders=TEXT_ENCODERS, network=transformer,
    vae=lambda names: sd3.vae(names, VAE), text_encoder=text_encoder, check=check, prefix=PREFIX,
    kohya="networks.lora_flux",
)  # fmt: skip
