"""A diffusers folder: the network anew, in shards, and every other part copied as it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from unforget import families
from unforget.exports.manifest import PATH, Made
from unforget.files.storage import BadFile, Digested, Lazy, read_json, write_json, write_tensors

STEM = "diffusion_pytorch_model"
WEIGHTS = re.compile(r"[\w-]+?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""Files with weights, and indexes of such; a variant has a word more between two dots."""
TEXTS = (".json", ".txt", ".model")
CONTENT = ("vocab.json", "tokenizer.json")
"""Large files of words, in which a slash is a word."""
LICENCES = re.compile(r"(LICEN[CS]E|NOTICE)[\w-]*(\.(md|txt))?", re.IGNORECASE)
NAMES = ("_name_or_path", "name_or_path")


@dataclass(frozen=True)
class Copy:
    """A file to copy: from where, and to where in the new folder."""

    start: Path
    to: Path


def parts(home: Path) -> list[str]:
    """The parts that a pipeline's index lists and that are not null; plain names only."""
    index = read_json(home / "model_index.json")
    listed = {n: v for n, v in index.items() if isinstance(v, list) and v and v[0] is not None}
    return sorted(n for n in listed if re.fullmatch(r"\w+", n))


def copies(home: Path, network: str) -> tuple[list[Copy], list[str]]:
    """What of a base's folder goes into the new one.

    Args:
        home: The base's folder.
        network: The subfolder whose weights are written anew.

    Returns:
        The files, and the parts whose weights are in no form that can be copied.
    """
    found = [Copy(home / "model_index.json", Path("model_index.json"))]
    found += [Copy(f, Path(f.name)) for f in sorted(home.iterdir()) if LICENCES.fullmatch(f.name) and f.is_file()]
    if not (home / network).is_dir():  # all in the root, as old DDPM repositories
        found.append(Copy(home / "config.json", Path(network) / "config.json"))
        name = "scheduler_config.json"
        return [*found, Copy(home / name, Path("scheduler") / name)], []
    missing = []
    for part in parts(home):
        files = [f for f in sorted((home / part).iterdir()) if f.is_file()] if (home / part).is_dir() else []
        weights = [f for f in files if WEIGHTS.fullmatch(f.name)]
        texts = [f for f in files if f.suffix in TEXTS and ".index." not in f.name]
        if part != network:
            texts += weights
            if not weights and any(f.name == "config.json" for f in files):
                missing.append(part)
        found += [Copy(f, Path(part) / f.name) for f in texts]
    return found, missing


def copy(files: list[Copy], folder: Path) -> None:
    """Copy, following links, for the hub's cache is made of them; JSON loses what names a place on a disk."""
    for one in files:
        to = folder / one.to
        to.parent.mkdir(parents=True, exist_ok=True)
        if one.start.suffix == ".json" and one.start.name not in CONTENT and ".index." not in one.start.name:
            content = one.start.read_text()
            try:
                value = json.loads(content)
            except ValueError:
                raise BadFile(f"'{one.to}' is not JSON") from None
            cleaned = clean(value)
            to.write_text(content if cleaned == value else json.dumps(cleaned, indent=2) + "\n")
        else:
            shutil.copyfile(one.start, to)


def clean(value: Any) -> Any:
    """JSON without the entries that say where something lay."""
    if isinstance(value, dict):
        lies = {k for k, v in value.items() if k in NAMES or (isinstance(v, str) and PATH.fullmatch(v) and len(v) > 2)}
        return {k: clean(v) for k, v in value.items() if k not in lies}
    return [clean(v) for v in value] if isinstance(value, list) else value


def write_network(
    folder: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str], most: str, digested: Digested
) -> None:
    """The network's weights as diffusers lays them out: one file, or shards and their index.

    Args:
        folder: The network's.
        tensors: By name, in the order in which they are dealt out.
        metadata: For every header.
        most: Largest size of a shard, such as 10GB.
        digested: Told every tensor.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda lazy: lazy.size, max_shard_size=most,
        filename_pattern=f"{STEM}{{suffix}}.safetensors",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in split.filename_to_tensors.items():
        write_tensors({n: tensors[n] for n in members}, metadata, folder / name, digested=digested)
    if split.is_sharded:
        write_json(
            {"metadata": split.metadata, "weight_map": split.tensor_to_filename},
            folder / f"{STEM}.safetensors.index.json",
        )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """The network's configuration, without what names a place on a disk."""
    write_json(clean(dict(config)), folder / "config.json")


def tidy(folder: Path) -> None:
    """Take what names a place on a disk out of every JSON file that a library wrote."""
    for path in sorted(folder.rglob("*.json")):
        if path.name not in CONTENT and ".index." not in path.name:
            value = json.loads(path.read_text())
            if (cleaned := clean(value)) != value:
                path.write_text(json.dumps(cleaned, indent=2) + "\n")


def write_hints(home: Path | None, folder: Path, made: Made) -> None:
    """`unforget.json`: what the base's said, and where the folder came from."""
    hints = families.hints(home) if home is not None else families.Hints()
    value = {k: v for k, v in hints.model_dump(mode="json").items() if v not in (None, [])}
    write_json({**value, "made": made.model_dump(mode="json")}, folder / "unforget.json")


def watched(tensors: Mapping[str, Lazy], advance: Callable[..., Any]) -> dict[str, Lazy]:
    """The same tensors, telling when one is made."""

    def one(lazy: Lazy) -> Lazy:
        def make() -> Any:
            advance(1)
            return lazy.make()

        return Lazy(lazy.dtype, lazy.shape, make)

    return {name: one(lazy) for name, lazy in tensors.items()}
