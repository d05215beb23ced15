"""The stock pipeline of a family from a folder, the hub or a single file, with what it has of text encoders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from unforget.errors import CannotRun
from unforget.families.loading import Options, where
from unforget.families.safety import variant
from unforget.families.spec import FamilySpec, tokenizer
from unforget.files.storage import open_tensors

SMALL = 500_000_000
"""Weights up to which a network is computed in float32."""


def stock(spec: FamilySpec, source: str, options: Options) -> Any:
    """The loaded pipeline; parts that the row leaves out, and a network that was given, are not loaded."""
    parts = {**spec.passed, **({} if options.network is None else {spec.network: options.network})}
    opener = _from_single_file if Path(source).is_file() else _from_pretrained
    return opener(spec, source, options, parts)


def network_class(spec: FamilySpec) -> Any:
    """The class of its network."""
    return getattr(diffusers, spec.network_class)


def network_config(spec: FamilySpec, source: str) -> dict[str, Any]:
    """The network's configuration in a folder, in the root of an old one, or on the hub."""
    flat = Path(source).is_dir() and not (Path(source) / spec.network).is_dir()
    found: dict[str, Any] = network_class(spec).load_config(**where(source), subfolder=None if flat else spec.network)
    return found


def dtype_of(spec: FamilySpec, config: Mapping[str, Any]) -> torch.dtype:
    """float32 for a small network, else bfloat16: float16 overflows in training and is slow on CPUs."""
    with init_empty_weights():
        size = sum(p.numel() for p in network_class(spec).from_config(config).parameters())
    return torch.float32 if spec.float32 or size <= SMALL else torch.bfloat16


def _from_pretrained(spec: FamilySpec, source: str, options: Options, parts: dict[str, Any]) -> Any:
    """The pipeline of a folder or hub id, without the optional text encoders where it has none or none is wanted.

    Stock `from_pretrained` refuses a folder without T5 unless told so; every part that is null in its index is.
    """
    kind, at = getattr(diffusers, spec.pipeline_class), where(source)
    index = kind.load_config(**at)
    absent = [n for n in spec.text_encoders if index.get(n, [None])[0] is None]
    absent += [] if options.t5 else spec.optional
    absent += [tokenizer(n) for n in spec.text_encoders if n in absent or index.get(tokenizer(n), [None])[0] is None]
    return kind.from_pretrained(
        **at, use_safetensors=None if options.allow_pickle else True,
        variant=variant(Path(source), spec.network) if Path(source).is_dir() else None,
        **_dtypes(spec, source, options), **dict.fromkeys(absent), **parts,
    )  # fmt: skip


def _dtypes(spec: FamilySpec, source: str, options: Options) -> dict[str, Any]:
    """Precision of each part, as stock `from_pretrained` takes it."""
    if spec.float32:
        return {}
    network, rest = options.network_dtype, options.rest_dtype
    if options.network is not None:
        network, rest = None, options.network.dtype
    elif network is None or rest is None:
        # Not beside weights: SD3 computes a table of positions in float64.
        own = dtype_of(spec, network_config(spec, source))
        network, rest = network or own, rest or own
    vae = {spec.autoencoder: getattr(torch, spec.vae_dtype)} if spec.vae_dtype else {}
    return {"dtype": {spec.network: network, "default": rest, **vae}}


def _from_single_file(spec: FamilySpec, path: str, options: Options, parts: dict[str, Any]) -> Any:
    """The pipeline of one checkpoint file; `pipeline_config` is a diffusers folder of that model, or a hub id.

    What the file does not hold, as text encoders in Stability's smallest one of SD3 medium, and the autoencoder, too,
    in one of a network alone, comes from the folder, if it has the weights: stock `from_single_file` looks for text
    encoders there under names that they do not have. It also fails on a file without T5 unless told that there is none.
    """
    config = options.pipeline_config
    local = config is not None and config.is_dir()
    how = {"config": str(config), "local_files_only": local}
    rest = options.rest_dtype or (dtype_of(spec, network_config(spec, str(config))) if local else torch.bfloat16)
    held, layout = open_tensors(Path(path)).tensors, spec.layout
    assert layout is not None
    if not any(n.startswith(layout.vae_prefix) for n in held):
        parts[spec.autoencoder] = _autoencoder(spec, path, config, rest)
    for name, class_name in spec.text_encoders.items():
        inside = any(n.startswith(layout.text_encoders[name]) for n in held)
        here = config is not None and any((config / name).glob("model*.safetensors"))
        if name in spec.optional and not (options.t5 and (inside or here)):
            parts |= dict.fromkeys((name, tokenizer(name)))
        elif not inside and here:
            encoder = getattr(transformers, class_name)
            parts[name] = encoder.from_pretrained(f"{config}/{name}", dtype=rest, use_safetensors=True)
    if options.network_dtype not in (None, rest) and spec.network not in parts:
        how_network = {"subfolder": spec.network, "dtype": options.network_dtype, **how}
        parts[spec.network] = network_class(spec).from_single_file(path, **how_network)
    pipeline = getattr(diffusers, spec.pipeline_class).from_single_file(path, dtype=rest, **how, **parts)
    for name in spec.text_encoders:
        if (encoder := getattr(pipeline, name)) is not None:
            encoder.eval()  # stock leaves T5 in training: it would drop a tenth of what it reads
    return pipeline


def _autoencoder(spec: FamilySpec, path: str, config: Path | None, dtype: torch.dtype) -> Any:
    """That of the folder; CannotRun if there is none, of which stock makes one without data."""
    if config is None or not any((config / spec.autoencoder).glob("*.safetensors")):
        sentence = f"'{path}' holds no {spec.autoencoder}, nor does '{config}'"
        raise CannotRun(sentence, f"Give a --pipeline-config DIR with the weights of its {spec.autoencoder}.")
    return diffusers.AutoencoderKL.from_pretrained(f"{config}/{spec.autoencoder}", dtype=dtype, use_safetensors=True)
