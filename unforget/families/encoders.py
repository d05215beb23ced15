"""Text encoders in files of their own, as ComfyUI keeps them beside a checkpoint: clip_l, clip_g, t5xxl."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from unforget.errors import UsageError
from unforget.families.parts import STEMS, check_pointer
from unforget.files.storage import BadFile, Lazy, open_tensors

EMBEDDING = ("token_embedding.weight", "shared.weight", "embed_tokens.weight")
PROJECTION = "text_projection.weight"
"""Left out of files whose projection is the identity."""


def matched(files: Iterable[Path], configs: Mapping[str, Any]) -> dict[str, Path]:
    """The file of each text encoder, known by the shape of its embedding of tokens.

    `configs` are those of all that the model lacks, by part. UsageError for a file of none of them, or one too many.
    """
    found: dict[str, Path] = {}
    shapes = {name: (config.vocab_size, config.hidden_size) for name, config in configs.items()}
    for file in files:
        if not shapes:
            sentence = f"'{file}' has no place: the model holds every text encoder that its configuration describes"
            raise UsageError(sentence, "Leave out --text-encoder, or give the --pipeline-config that describes it.")
        own = _embeddings(tensors_of(file))
        names = [name for name, shape in shapes.items() if shape in own and name not in found]
        if not names:
            known = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise UsageError(
                f"'{file}' is no text encoder that this model lacks", f"By their embeddings those are: {known}."
            )
        found[names[0]] = file
    return found


def lacking(files: Iterable[Path], held: Mapping[str, Lazy]) -> tuple[Path, ...]:
    """Those files of text encoders that are not in a single file with such tensors."""
    own = _embeddings(held)
    return tuple(file for file in files if not own & _embeddings(tensors_of(file)))


def _embeddings(tensors: Mapping[str, Lazy]) -> set[tuple[int, ...]]:
    return {tuple(t.shape) for name, t in tensors.items() if name.endswith(EMBEDDING)}


def tensors_of(file: Path) -> dict[str, Lazy]:
    """The tensors of a file; UsageError if it is damaged."""
    try:
        check_pointer(file)
        return dict(open_tensors(file).tensors)
    except BadFile as error:
        raise UsageError(f"'{file}' cannot be opened: {error}", "Get it again.") from None


def opened(file: Path, kind: Any, config: Path, dtype: torch.dtype) -> Any:
    """The text encoder of a class, from a file and the folder of its configuration."""
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").symlink_to((config / "config.json").absolute())
        (Path(scratch) / f"{STEMS['transformers']}.safetensors").symlink_to(file.absolute())
        encoder, said = kind.from_pretrained(
            scratch, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if PROJECTION in said["missing_keys"]:
        encoder.text_projection.weight.data.copy_(torch.eye(len(encoder.text_projection.weight)))
    return encoder
