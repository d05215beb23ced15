"""The stock pipeline of SD3 from a folder, the hub or a single file, with what it has of text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from unforget.families.layouts import sd3 as sd3_layout
from unforget.files.storage import open_tensors

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
Dtypes = tuple[torch.dtype | None, torch.dtype | None]
SMALL = 500_000_000
"""Weights up to which the transformer is computed in float32."""


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """float32 for a small transformer, else bfloat16: float16 overflows in training and is slow on CPUs."""
    with init_empty_weights():
        size = sum(p.numel() for p in SD3Transformer2DModel.from_config(config).parameters())
    return torch.float32 if size <= SMALL else torch.bfloat16


def from_pretrained(
    where: dict[str, str], *, use_safetensors: bool | None, t5: bool, dtypes: Dtypes = (None, None), **parts: Any
) -> Any:
    """The pipeline of a folder or hub id, without T5 where it has none or none is wanted.

    Stock `from_pretrained` refuses a folder without T5 unless told so; every part that is null in its index is.
    `dtypes` are the precisions of the transformer and of the rest; `dtype_of` its configuration unless given. `parts`
    are not loaded.
    """
    index = StableDiffusion3Pipeline.load_config(**where)
    absent = [n for n in (*ENCODERS, *TOKENIZERS) if index.get(n, [None])[0] is None]
    if not t5:
        absent += [ENCODERS[2], TOKENIZERS[2]]
    if "transformer" in parts:
        dtypes = (None, parts["transformer"].dtype)
    elif None in dtypes:
        # Not beside weights: it computes a table of positions in float64.
        dtype = dtype_of(SD3Transformer2DModel.load_config(**where, subfolder="transformer"))
        dtypes = (dtypes[0] or dtype, dtypes[1] or dtype)
    network, rest = dtypes
    return StableDiffusion3Pipeline.from_pretrained(
        **where, use_safetensors=use_safetensors, dtype={"transformer": network, "default": rest},
        **dict.fromkeys(absent), **parts,
    )  # fmt: skip


def from_single_file(path: str, config: Path | None, *, t5: bool, dtypes: Dtypes = (None, None), **parts: Any) -> Any:
    """The pipeline of one checkpoint file; `config` is a diffusers folder of that model, or a hub id.

    Text encoders that the file does not hold, as Stability's smallest one of SD3 medium, come from the folder, if it
    has their weights: stock `from_single_file` looks for them there under names that they do not have. It also fails on
    a file without T5 unless told that there is none.
    `dtypes` are the precisions of the transformer and of the rest; `dtype_of` its configuration unless given, and
    bfloat16 where that lies on the hub. `parts` are not loaded.
    """
    local = config is not None and config.is_dir()
    where = {"config": str(config), "local_files_only": local}
    own = dtype_of(SD3Transformer2DModel.load_config(f"{config}/transformer")) if local else torch.bfloat16
    rest = dtypes[1] or own
    held = open_tensors(Path(path)).tensors
    kinds: dict[str, Any] = dict(
        zip(ENCODERS, (CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel), strict=True)
    )
    for number, name in enumerate(ENCODERS, 1):
        inside = any(n.startswith(sd3_layout.TEXT_ENCODERS[number]) for n in held)
        if number == 3 and not (t5 and (inside or _has_weights(config, name))):
            parts |= dict.fromkeys((ENCODERS[2], TOKENIZERS[2]))
        elif not inside and _has_weights(config, name):
            parts[name] = kinds[name].from_pretrained(f"{config}/{name}", dtype=rest, use_safetensors=True)
    if dtypes[0] not in (None, rest) and "transformer" not in parts:
        parts["transformer"] = SD3Transformer2DModel.from_single_file(
            path, subfolder="transformer", dtype=dtypes[0], **where
        )
    return StableDiffusion3Pipeline.from_single_file(path, dtype=rest, **where, **parts)


def _has_weights(config: Path | None, part: str) -> bool:
    """Whether a folder holds the weights of a text encoder."""
    return config is not None and any((config / part).glob("model*.safetensors"))
