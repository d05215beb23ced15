"""The original layouts of Stable Diffusion 1.x and XL: the names in the files that people share, by those in diffusers.

A file may hold more, which stock loaders drop: `position_ids`, `logit_scale`, schedules, running means (`model_ema.`).
"""

import re
from collections.abc import Iterable, Mapping

from unforget.errors import CannotRun
from unforget.families.layouts import Layout, Piece
from unforget.families.layouts.sd3 import VAE, unknown, vae
from unforget.files.storage import Lazy

UNET = "model.diffusion_model."
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
_QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
SD, SDXL = "cond_stage_model.", "conditioner."
"""How the names of the text encoders begin, which tells the two apart."""


def network(names: Iterable[str]) -> dict[str, Piece]:
    """The pieces of the tensors of a `UNet2DConditionModel`; CannotRun for one that the original does not know."""
    names = list(names)
    layers = 1 + max(int(m[1]) for n in names if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", n)))
    attending = {m[1] for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions", n))}

    def place(name: str) -> str:
        layer, _, kind = name.rpartition(".")
        if layer in _ENDS:
            return f"{_ENDS[layer]}.{kind}"
        block = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
        if block is None:
            raise unknown(name)
        side, which, part, index, rest = block[1], int(block[2] or 0), block[3], int(block[4]), block[5]
        first = (layers + 1) * which  # the original counts through all blocks of a side
        if part == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{kind}"
        if part == "upsamplers":
            return f"output_blocks.{first + layers}.{1 + (block[2] in attending)}.conv.{kind}"
        if part == "resnets":
            inner = rest.rpartition(".")[0]
            part, rest = (part, f"{_RESNET[inner]}.{kind}") if inner in _RESNET else ("", rest)
        if part not in ("resnets", "attentions"):
            raise unknown(name)
        if side is None:
            return f"middle_block.{1 if part == 'attentions' else 2 * index}.{rest}"
        start = f"input_blocks.{first + index + 1}" if side == "down" else f"output_blocks.{first + index}"
        return f"{start}.{int(part == 'attentions')}.{rest}"

    return {name: Piece(UNET + place(name)) for name in names}


def transformers_names(prefix: str, names: Iterable[str]) -> dict[str, Piece]:
    """Those of a CLIP that the original has as transformers has it, `text_model.` before them or not."""
    return {n: Piece(prefix + (n if n.startswith("text_model.") else f"text_model.{n}")) for n in names}


def open_clip(prefix: str, names: Iterable[str]) -> dict[str, Piece]:
    """Those of a CLIP that the original has as OpenCLIP has it: q, k and v as one, the projection turned round."""
    found = {}
    for name in names:
        whole = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
        if whole in _CLIP:
            found[name] = Piece(prefix + _CLIP[whole], transposed=whole == "text_projection.weight")
            continue
        layer = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", whole)
        if layer is None:
            raise unknown(name)
        start, inner, kind = f"{prefix}transformer.resblocks.{layer[1]}.", layer[2], layer[3]
        index = _QKV.get(inner.removeprefix("self_attn."))
        if index is not None:
            found[name] = Piece(f"{start}attn.in_proj_{kind}", (index, 3))
        elif inner in _LAYER:
            found[name] = Piece(f"{start}{_LAYER[inner]}.{kind}")
        else:
            raise unknown(name)
    return found


def text_encoder(part: str, names: Iterable[str]) -> dict[str, Piece]:
    """The pieces of either text encoder of XL."""
    return (open_clip if part == "text_encoder_2" else transformers_names)(SDXL_ENCODERS[part], names)


def check(part: str, tensors: Mapping[str, Lazy]) -> None:
    """Refuse 2.x, whose text encoder lies in its file in another way and with a layer that diffusers drops."""
    if any(name.endswith("token_embedding.weight") and t.shape[1] == 1024 for name, t in tensors.items()):
        raise CannotRun("Stable Diffusion 2.x has another original layout", "Give the format diffusers or transformer.")


SD_ENCODERS = {"text_encoder": SD}  # 1.x goes on with `transformer.`, 2.x with OpenCLIP's `model.`
SDXL_ENCODERS = {"text_encoder": f"{SDXL}embedders.0.transformer.", "text_encoder_2": f"{SDXL}embedders.1.model."}
SD_LAYOUT = Layout(
    SD, VAE, SD_ENCODERS, network, vae, lambda part, names: transformers_names(f"{SD}transformer.", names), check
)
SDXL_LAYOUT = Layout(SDXL, VAE, SDXL_ENCODERS, network, vae, text_encoder, lambda part, tensors: None)
