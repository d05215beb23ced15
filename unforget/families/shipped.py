"""A model as it is shipped: any form that `export` writes, opened by the stock loaders beside its base."""

import json
import os
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from unforget import families
from unforget.core.types import Family
from unforget.errors import CannotRun, UsageError
from unforget.families import weights
from unforget.families.encoders import lacking
from unforget.families.loading import Options, opening, source_of
from unforget.families.parts import INDEX, LORA, PEFT, PEFT_CONFIG, classes, listed
from unforget.files.storage import BadFile, open_tensors, read_json

FACTOR = re.compile(r"[A-Za-z0-9_.]+([._]lora[._](A|B|down|up)\.weight|\.alpha)")
"""Names of factors; libraries make patterns of them."""
SAID = (
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout",
)  # fmt: skip
"""Keys of a LoRA's configuration that change nothing of what it puts on weights."""
RANK = 2**14  # largest rank
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf", ".sft", ".pkl")
"""How files of weights end, of any library."""


def check_there(path: Path) -> None:
    """UsageError for what neither lies here nor is the name of a model."""
    try:
        path.exists() or source_of(str(path))
    except UsageError:
        raise UsageError(f"there is no candidate '{path}'", "Check the path.") from None


def load(path: Path, ref: str, options: Options) -> Family:
    """The model that a folder, a LoRA of either kind or a file comes to, where the base is `ref`.

    UsageError if it is of no form that is known here; CannotRun if it is damaged, or does not fit the base.
    """
    if (path / INDEX).is_file() or not path.exists():
        if path.exists():
            _check_parts(path, ref, options.allow_pickle)
        return families.load(str(path), replace(options, text_encoder=()))
    with opening(str(path), str(path)):
        if path.is_dir():
            return _with_adapter(path, ref, options)
        return _from_file(path, ref, options)


def _check_parts(folder: Path, ref: str, pickled: bool) -> None:
    """CannotRun for weights beside those of the parts that are judged."""
    with opening(str(folder), str(folder)):
        found = listed(folder, classes(families.spec_of(ref)))
        read = [p.weights() or (p.weights(pickled=True) if pickled else {}) for p in found if p.loaded]
        idle = [p.home for p in found if not p.loaded and p.home != folder]
        _check_alone(folder, {file for files in read for file in files.values()}, idle)


def _check_alone(folder: Path, read: Collection[Path], idle: Collection[Path] = ()) -> None:
    """CannotRun for weights in a folder beside those that are read: another program may take them instead."""
    for place, _, names in os.walk(folder):
        for file in (Path(place, name) for name in sorted(names)):
            if file.suffix in WEIGHTS and file not in read and not any(file.is_relative_to(home) for home in idle):
                raise CannotRun(
                    f"'{folder}' also holds '{file.relative_to(folder)}', which another program may take instead",
                    "Remove it, or judge it by itself.",
                )


def _with_adapter(folder: Path, ref: str, options: Options) -> Family:
    """The base with a LoRA merged, for probes ask for plain weights."""
    found = [folder / name for name in (LORA, PEFT) if (folder / name).is_file()]
    if len(found) != 1:
        forms = "a diffusers folder, a LoRA's folder, or a .safetensors file"
        raise UsageError(f"'{folder}' is nothing that `unforget export` writes", f"Give {forms}, or a --patch.")
    _check_alone(folder, found)
    _check_adapter(folder, found[0])
    model: Any = families.load(ref, options)
    if found[0].name == LORA:
        weights.with_lora(model, folder)
        model.pipeline.fuse_lora(components=[model.spec.network])
        model.pipeline.unload_lora_weights()
    else:
        from peft import PeftModel

        model.set_network(PeftModel.from_pretrained(model.network, str(folder)).merge_and_unload())
    return model  # type: ignore[no-any-return]


def _check_adapter(folder: Path, file: Path) -> None:
    """Refuse what is no LoRA before a library opens it."""
    try:
        opened = open_tensors(file)
        names, said = opened.tensors, opened.metadata.get("lora_adapter_metadata", "{}")
        kind = read_json(folder / PEFT_CONFIG) if file.name == PEFT else {"peft_type": "LORA", **json.loads(said)}
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise CannotRun(f"'{folder}' is no sound LoRA: {error}", "Export again.") from None
    strange = [name for name in names if not FACTOR.fullmatch(name)]
    if strange or not isinstance(kind, dict) or kind.get("peft_type") != "LORA":
        what = f"the tensor '{strange[0][:80]}'" if strange else "another kind of adapter"
        raise CannotRun(f"'{folder}' holds {what}, which is no LoRA", "Export again.")
    for key, value in kind.items():
        if not _is_plain(key.rpartition(".")[2], value):
            sentence = f"'{folder}' is a LoRA that is read otherwise than by its rank, alpha and layers ({key[:40]})"
            raise CannotRun(sentence, "Export again, or give a --patch.")


def _is_plain(key: str, value: Any) -> bool:
    """Whether an entry of a LoRA's configuration is one of the few that are needed, or says nothing.

    Others are patterns, which may take forever on a name, ways to compute factors anew, and more modules.
    """
    if key in ("r", "lora_alpha"):
        return isinstance(value, (int, float)) and 0 < value <= RANK
    if key == "target_modules":
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if key == "init_lora_weights":
        return isinstance(value, bool)
    return key in SAID or value in (None, False, 0, "", "none", [], {})


def _from_file(file: Path, ref: str, options: Options) -> Family:
    """A single file in the original layout, its other parts as in the base, or the network alone."""
    try:
        held = open_tensors(file).tensors
    except BadFile as error:
        raise CannotRun(f"'{file}' cannot be judged: {error}", "Export again.") from None
    spec, home = families.spec_of(ref), options.pipeline_config or families.home(ref)
    if spec.layout is not None and spec.layout.is_in(held):
        beside = lacking(options.text_encoder, held)  # of those that the base lacks
        return families.load(str(file), replace(options, pipeline_config=home, text_encoder=beside))
    model: Any = families.load(ref, options)
    model.set_network(weights.network_file(file, spec.name, weights.network_config(model.network), model.dtype))
    return model  # type: ignore[no-any-return]
