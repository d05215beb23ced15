"""A model's network as it lies on disk, and exports opened again by the loaders that everybody has."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from unforget import families
from unforget.core.types import LARGE
from unforget.errors import CannotRun
from unforget.families.layouts import Layout, from_original, originals
from unforget.families.loading import Options
from unforget.families.parts import STEMS, opened
from unforget.families.pipelines import dtype_of, network_class
from unforget.families.spec import FamilySpec
from unforget.files.storage import BadFile, Lazy, Opened, open_tensors, read_json, write_json

if TYPE_CHECKING:
    from unforget.core.types import Family

STEM = STEMS["diffusers"]


@dataclass(frozen=True)
class Source:
    """Where a loaded model came from."""

    tensors: Mapping[str, Lazy]
    """Of its network as they lie on disk, by their names in it; none where they cannot be read so: if they are pickled,
    or diffusers translates them while it loads."""
    metadata: dict[str, str]  # of the file that holds them, the first shard's
    home: Path | None  # folder with the configuration of all parts; None for a single file that came without one
    file: Path | None  # the single file, if it is one
    layout: Layout | None


def source(ref: str, family: Family, pipeline_config: Path | None) -> Source:
    """Where the weights of a model are that `families.load(ref)` gave; CannotRun if a file is damaged."""
    home, spec = families.home(ref), family.spec
    try:
        found = _stored(spec, home or Path(ref))
    except BadFile as error:
        raise CannotRun(f"cannot read the weights of '{ref}': {error}", "Get the model again.") from None
    tensors = _tensors(spec, found, family.network)
    return Source(tensors, found.metadata, home or pipeline_config, None if home else Path(ref), spec.layout)


def _stored(spec: FamilySpec, path: Path) -> Opened:
    """A network's tensors as they lie in a single file, or in a folder, nested or flat; empty if they are pickled."""
    if path.is_file():
        return open_tensors(path)
    part = path / spec.network
    return opened(part if part.is_dir() else path, STEM) or Opened({}, {})


def load(ref: str, options: Options) -> Family:
    """A model as `families.load` gives it, without its network in memory twice.

    Stock loaders map the file and keep the mapping while they convert it: a network of another precision than the one
    that is computed with is there in both. So a large one is read here, a tensor at a time.
    """
    return families.load(ref, replace(options, network=_lean(ref, options)))


def _lean(ref: str, options: Options) -> nn.Module | None:
    """A large network whose weights lie here as safetensors; None leaves it to the stock loader."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        _, spec = families.examined(ref, options)
        home = families.home(ref)
    except (HfHubHTTPError, LocalEntryNotFoundError):  # not here yet
        return None
    file, home = (None, home) if home else (Path(ref), options.pipeline_config)
    if home is None or not (home / spec.network / "config.json").is_file():
        return None
    try:
        found = _stored(spec, file or home)
        config = read_json(home / spec.network / "config.json")
    except BadFile:  # the stock loader has a sentence for it
        return None
    return _built(spec, config, found, dtype_of(spec, config) if file is None else torch.bfloat16)


def _built(spec: FamilySpec, config: Mapping[str, Any], found: Opened, dtype: torch.dtype) -> nn.Module | None:
    """A large network from its files, converted a tensor at a time; None if it is small or does not fit."""
    with init_empty_weights():
        network: nn.Module = network_class(spec).from_config(config)
    if (numbers := sum(p.numel() for p in network.parameters())) <= LARGE:
        return None
    families.trim_memory(numbers)
    tensors = _tensors(spec, found, network)
    for name, lazy in tensors.items():
        value = lazy.make()
        value = value.to(dtype) if value.is_floating_point() else value
        set_module_tensor_to_device(network, name, "cpu", value=value, dtype=value.dtype)
    return network.eval() if tensors else None


def _tensors(spec: FamilySpec, found: Opened, network: nn.Module) -> dict[str, Lazy]:
    """The tensors of a network's files under diffusers' names, in its order, if they are all of its and nothing else.

    Of a single file in the original layout, whatever else it holds.
    """
    tensors, state = found.tensors, network.state_dict()
    if spec.layout is not None and spec.layout.is_in(tensors):
        tensors = from_original(tensors, spec.layout.pieces(state, tensors))
    wanted = {n: tuple(t.shape) for n, t in state.items()}
    return {n: tensors[n] for n in wanted} if {n: t.shape for n, t in tensors.items()} == wanted else {}


def checkpoint(origin: Source, network: Mapping[str, Lazy], config: Any) -> dict[str, Lazy]:
    """All tensors of a single file in the original layout, with `network` in it; the others as they lie on disk.

    CannotRun if a part has no weights that can be read, or the layout no place for one.
    """
    layout = origin.layout
    assert layout is not None
    layout.check("network", network)
    held = {} if origin.file is None else open_tensors(origin.file).tensors
    found = originals(network, layout.pieces(network, held))
    if origin.file is not None:
        return {**held, **found}
    assert origin.home is not None
    tensors = _part(origin.home / "vae", STEM)
    found |= originals(tensors, layout.vae(tensors))
    for name in layout.text_encoders:
        if (origin.home / name).is_dir():
            tensors = _part(origin.home / name, STEMS["transformers"])
            layout.check(name, tensors)
            found |= originals(tensors, layout.text_encoder(name, tensors))
    return found


def _part(folder: Path, stem: str) -> dict[str, Lazy]:
    """The tensors of a part, from its file or shards."""
    found = opened(folder, stem)
    if found is None or not found.tensors:
        raise CannotRun(f"'{folder.name}' has no safetensors", "Export the format diffusers, and that one again.")
    return found.tensors


def large(family: Family) -> bool:
    """Whether its network is to be treated with care for memory."""
    return sum(p.numel() for p in family.network.parameters()) > LARGE


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of the libraries: of parts that are absent on purpose, of casts that are meant."""
    before = {logger: logger.level for logger in map(logging.getLogger, ("diffusers", "transformers"))}
    try:
        with warnings.catch_warnings(action="ignore"):
            for logger in before:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def folder(path: Path, options: Options, dtype: torch.dtype, rest: torch.dtype) -> Family:
    """An exported folder through `from_pretrained`, its network in the precision in which it was written."""
    return families.load(str(path), replace(options, text_encoder=(), network_dtype=dtype, rest_dtype=rest))


def single_file(path: Path, options: Options, home: Path | None, dtype: torch.dtype, rest: torch.dtype) -> Family:
    """An exported checkpoint through `from_single_file`; `rest` is the precision of the other parts."""
    return families.load(str(path), replace(options, pipeline_config=home, network_dtype=dtype, rest_dtype=rest))


def network_file(path: Path, kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A network from one file with diffusers' names, which stock `from_pretrained` opens as a folder's."""
    spec = next(spec for spec in families.FAMILIES if spec.name == kind)
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        (Path(scratch) / f"{STEM}.safetensors").symlink_to(path.absolute())
        network: nn.Module = network_class(spec).from_pretrained(scratch, dtype=dtype, use_safetensors=True)
    families.trim_memory(sum(p.numel() for p in network.parameters()))
    return network


def network_config(network: Any) -> dict[str, Any]:
    """The network's configuration as diffusers writes it, without where it came from."""
    return {k: v for k, v in json.loads(network.to_json_string()).items() if k != "_name_or_path"}


def with_lora(family: Any, folder: Path) -> dict[str, Tensor]:
    """Put a LoRA beside the weights by `load_lora_weights`; returns its factors as they were read."""
    from peft import get_peft_model_state_dict

    family.pipeline.load_lora_weights(str(folder), use_safetensors=True, adapter_name="unforget")
    factors: dict[str, Tensor] = get_peft_model_state_dict(family.network, adapter_name="unforget")
    return factors


def with_peft(family: Any, folder: Path) -> dict[str, Tensor]:
    """Put a LoRA beside the weights by `PeftModel.from_pretrained`; returns its factors as they were read."""
    from peft import PeftModel, get_peft_model_state_dict

    found = get_peft_model_state_dict(PeftModel.from_pretrained(family.network, str(folder)))
    return {name.removeprefix("base_model.model."): factor for name, factor in found.items()}


def save_parts(family: Any, folder: Path, parts: list[str]) -> None:
    """Write parts of a loaded pipeline as diffusers does, and its index where `folder` has none.

    A part that was never loaded, such as a safety checker, is not written and goes out of the index.
    """
    for name in parts:
        part = getattr(family.pipeline, name, None)
        if part is not None:
            part.save_pretrained(folder / name)
    index = folder / "model_index.json"
    if not index.is_file():
        family.pipeline.save_config(folder)
    listed = read_json(index)
    absent = {n: [None, None] for n in parts if n in listed and getattr(family.pipeline, n, None) is None}
    if absent:
        write_json({**listed, **absent}, index)


def converted(family: Family, path: Path, part: str, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Give a family whose network is in the precision of a file the same network in another one, never both at once."""
    if next(family.network.parameters()).dtype == dtype:
        return
    if not large(family):
        family.network.to(dtype)
        return
    family.set_network(None)
    families.trim_memory(LARGE + 1)
    family.set_network(_built(family.spec, config, _stored(family.spec, path), dtype))
