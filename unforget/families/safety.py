"""A model folder is looked at before any library opens it: names, sizes and numbers that no model has.

What a folder says decides what is read and how much memory is taken, and it may come from anywhere. So every file name
in it must be plain, every configuration modest, and every tensor that a part's configuration asks for must be in its
file with that shape, which is found out on torch's meta device, where tensors take no memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unforget.errors import CannotRun, UsageError
from unforget.files.storage import BadFile, Lazy, Opened, open_tensors, read_json

if TYPE_CHECKING:
    from unforget.families.spec import FamilySpec

PLAIN = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")
"""File names and names of parts: nothing that leads elsewhere."""
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Names of weights, by where a part's class may come from; another name would be a module of the folder's own."""
MOST = 2**20  # largest whole number in a configuration; vocabularies have a tenth of it
FEW = {"num_layers": 512, "num_hidden_layers": 512, "layers_per_block": 64, "pos_embed_max_size": 1024}
"""Numbers whose cost is more than their own size."""
UNLIMITED = "model_max_length"  # 1e30 where a tokenizer has no limit; nothing is made of that size
SIDE = 8192  # largest `sample_size`
SPARE = 1.05  # how many numbers a transformer may ask for, as a share of those in a single file
WORDS = 2**26  # largest file of a tokenizer, bytes; Gemma's has half of it, Qwen's a sixth
VARIANT = "fp16"  # the word in the names of weights that some repositories have in half precision


def check(folder: Path, spec: FamilySpec, allow_pickle: bool) -> None:
    """Refuse a diffusers folder, nested or flat, that is not what it says; parts that are never loaded apart.

    Pickled weights, where allowed, are left to torch's restricted unpickler.
    """
    try:
        index = read_json(folder / "model_index.json")
        of = variant(folder, spec.network)
        for name, value in index.items():
            if isinstance(value, list) and spec.passed.get(name, name) is not None:
                _check_part(folder, name, *_part(name, value), of, allow_pickle)
    except BadFile as error:
        raise UsageError(f"the model in '{folder}' is no sound one: {error}", "Get it again from its source.") from None


def check_single(file: Path, spec: FamilySpec, config: Path) -> None:
    """Refuse a single file, or a diffusers folder for it whose configuration asks for more than the file holds."""
    try:
        tensors = open_tensors(file).tensors
        for name, value in read_json(config / "model_index.json").items():
            if isinstance(value, list) and spec.passed.get(name, name) is not None and _part(name, value)[1]:
                for table in sorted((config / name).glob("*config.json")):
                    _check_numbers(read_json(table), f"{name}/{table.name}")
        network = _made("diffusers", spec.network_class, read_json(config / spec.network / "config.json"))
    except (BadFile, OSError, AttributeError) as error:
        reason = error if isinstance(error, BadFile) else f"'{config}' is no diffusers folder"
        hint = "Get it again, or give another --pipeline-config."
        raise UsageError(f"'{file}' cannot be opened: {reason}", hint) from None
    wanted = sum(p.numel() for p in network.parameters())
    held = sum(math.prod(t.shape) for t in tensors.values())
    if wanted > SPARE * held:
        sentence = f"'{config}' asks for {wanted:,} numbers, '{file}' holds {held:,}"
        raise CannotRun(sentence, "Give the model's --pipeline-config.")


def variant(folder: Path, network: str) -> str | None:
    """`fp16` for a folder whose network has no other weights."""
    home, stem = folder / network, STEMS["diffusers"]
    plain = any((home / f"{stem}.{suffix}").is_file() for suffix in ("safetensors", "safetensors.index.json", "bin"))
    return VARIANT if not plain and (home / f"{stem}.{VARIANT}.safetensors").is_file() else None


def opened(home: Path, stem: str, of: str | None = None) -> Opened | None:
    """The safetensors of a part: one file, of the variant if it is there, or shards; None if there are no such.

    BadFile if they are not what they say, CannotRun if a shard is missing.
    """
    index, single = home / f"{stem}.safetensors.index.json", home / f"{stem}.safetensors"
    if of is not None and (home / f"{stem}.{of}.safetensors").is_file():
        return open_tensors(home / f"{stem}.{of}.safetensors")
    if not index.is_file():
        return open_tensors(single) if single.is_file() else None
    try:
        table = dict(read_json(index, most=2**24)["weight_map"])
    except (KeyError, TypeError, ValueError):
        raise BadFile(f"'{index.name}' names no shards") from None
    found = []
    for shard in sorted(set(map(str, table.values()))):
        if not PLAIN.fullmatch(shard):
            raise BadFile(f"'{index.name}' names the file '{shard[:40]}'")
        if not (home / shard).is_file():
            raise CannotRun(f"'{home}' misses the shard {shard}", "Download the model again.")
        found.append(open_tensors(home / shard))
    tensors = {name: lazy for one in found for name, lazy in one.tensors.items()}
    if set(tensors) != set(table):
        raise BadFile(f"'{index.name}' and its shards disagree")
    return Opened(found[0].metadata if found else {}, tensors)


def _part(name: str, value: list[Any]) -> tuple[str, str]:
    """Library and class of a part; empty where it is absent."""
    if not PLAIN.fullmatch(name) or len(value) != 2:
        raise BadFile(f"model_index.json describes '{name[:40]}' wrongly")
    library, class_name = value
    if library is None or class_name is None:
        return "", ""
    if library not in [*STEMS] or not isinstance(class_name, str) or not class_name.isidentifier():
        raise BadFile(f"'{name}' is to be made by '{library}.{class_name}', which is code of its own")
    return library, class_name


def _check_part(folder: Path, name: str, library: str, class_name: str, of: str | None, allow_pickle: bool) -> None:
    # Old DDPM repositories are flat, and diffusers takes every part that has no folder for such.
    flat = not (folder / name).is_dir() and (folder / "config.json").is_file()
    home = folder if flat else folder / name
    if "Scheduler" in class_name:
        if (file := home / "scheduler_config.json").is_file():
            _check_numbers(read_json(file), f"{name}/{file.name}")
        return
    if "Tokenizer" in class_name and home.is_dir():
        for file in home.iterdir():
            if file.is_file() and file.stat().st_size > WORDS:
                raise BadFile(f"'{name}/{file.name}' has more than {WORDS} bytes")
    if not class_name or (library == "transformers" and not (home / "config.json").is_file()):
        return  # absent, or without weights: a tokenizer
    if not (home / "config.json").is_file():
        raise CannotRun(f"'{home}' has no config.json", "Get the model again.")
    config = read_json(home / "config.json")
    _check_numbers(config, f"{name}/config.json")
    found = opened(home, STEMS[library], of)
    if found is not None:
        _fits(config, name, library, class_name, found.tensors)
    elif not any(home.glob("*.bin")):
        raise CannotRun(f"'{home}' holds no weights", f"Expected {STEMS[library]}.safetensors in it.")
    elif not allow_pickle:
        hint = "Convert them to safetensors, or say --allow-pickle if you trust where they come from."
        raise UsageError(f"'{home}' holds pickled weights only, which can run code when opened", hint)


def _check_numbers(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Refuse a configuration that no model has, before anything is made from it."""
    if depth > 16:
        raise BadFile(f"{where} is nested too deeply")
    if isinstance(value, Mapping):
        if "auto_map" in value:
            raise BadFile(f"{where} asks for code of its own (auto_map)")
        for inner, item in value.items():
            _check_numbers(item, where, str(inner), depth + 1)
    elif isinstance(value, list):
        if len(value) > 4096:
            raise BadFile(f"{where} has a list of {len(value)} entries")
        for item in value:
            _check_numbers(item, where, key, depth + 1)
    elif isinstance(value, (int, float)) and key != UNLIMITED:
        most = FEW.get(key, SIDE if key == "sample_size" else MOST)
        least = 1 if key in FEW or key.endswith(("_dim", "_size", "_channels")) else -MOST
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= most:
            raise BadFile(f"{where} says {key} = {str(value)[:24]}")
    elif depth == 0:
        raise BadFile(f"{where} is not a table")


def _fits(config: Any, name: str, library: str, class_name: str, tensors: Mapping[str, Lazy]) -> None:
    """Compare what a configuration asks for with what the file holds."""
    part = _made(library, class_name, config)
    there = {_named(n, library): tuple(t.shape) for n, t in tensors.items()}
    stored = set(part.state_dict())
    own = [*part.named_parameters(), *((n, t) for n, t in part.named_buffers() if n in stored)]  # each tensor once
    for tensor, shape in ((_named(n, library), tuple(t.shape)) for n, t in own):
        if tensor not in there:
            raise CannotRun(f"'{name}' lacks '{tensor}'", "Get the model again.")
        if there[tensor] != shape and not (len(there[tensor]) == len(shape) + 2 and there[tensor][:-2] == shape):
            raise CannotRun(f"'{name}' has '{tensor}' as {there[tensor]}, wanted {shape}", "Get the model again.")


OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention in files older than diffusers 0.15, which it translates; 1 x 1 convolutions then."""


def _named(name: str, library: str) -> str:
    """A tensor's name, whichever version of a library wrote it."""
    if library == "transformers":
        return name.replace("text_model.", "")
    for old, new in OLD.items():
        name = name.replace(old, new)
    return name


def _made(library: str, class_name: str, config: Any) -> Any:
    """A part without content, as a configuration describes it."""
    try:
        kind = getattr(import_module(library), class_name)
        with torch.device("meta"):
            return kind.from_config(config) if library == "diffusers" else kind(kind.config_class.from_dict(config))
    except Exception as error:  # whatever a library makes of a configuration that is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadFile(f"the configuration describes no {class_name}: {reason[:120]}") from None
