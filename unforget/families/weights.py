"""A model's network as it lies on disk, and exports opened again by the loaders that everybody has."""

from __future__ import annotations

import json
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
from diffusers import SD3Transformer2DModel, UNet2DModel
from torch import Tensor, nn

from unforget import families
from unforget.core.types import LARGE
from unforget.errors import CannotRun
from unforget.families import Options
from unforget.families.layouts import sd3 as sd3_layout
from unforget.families.layouts.sd3 import Piece
from unforget.families.pipelines import dtype_of
from unforget.files.storage import BadFile, Lazy, Opened, open_tensors, read_json

if TYPE_CHECKING:
    from unforget.core.types import Family

PARTS = {"ddpm": "unet", "sd3": "transformer"}
"""The network's subfolder, by kind of family."""
CLASSES: dict[str, Any] = {"ddpm": UNet2DModel, "sd3": SD3Transformer2DModel}
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Source:
    """Where a loaded model came from.

    Attributes:
        tensors: Of its network as they lie on disk, by the names they have in it; empty where they cannot be read so:
            pickled weights, or a layout that diffusers translates while it loads.
        metadata: Of the file that holds them, the first shard's.
        home: Folder with the configuration of all parts; None for a single file that came without one.
        file: The single file, if it is one.
    """

    tensors: Mapping[str, Lazy]
    metadata: dict[str, str]
    home: Path | None
    file: Path | None = None

    def flat(self, part: str) -> bool:
        """Whether the folder has the layout of old DDPM repositories, all in its root."""
        return self.home is not None and not (self.home / part).is_dir()


def source(ref: str, family: Family, pipeline_config: Path | None) -> Source:
    """Where the weights of a model are that `families.load(ref)` gave.

    Raises:
        CannotRun: If a file is damaged.
    """
    home = families.home(ref)
    try:
        if home is None:
            opened = open_tensors(Path(ref))
            tensors = _named([opened], family.network.config)
            return Source(_matching(tensors, family.network), opened.metadata, pipeline_config, Path(ref))
        found = _opened(home / PARTS[family.kind] if (home / PARTS[family.kind]).is_dir() else home, STEM)
    except BadFile as error:
        raise CannotRun(f"cannot read the weights of '{ref}': {error}", "Get the model again.") from None
    tensors = {name: lazy for opened in found for name, lazy in opened.tensors.items()}
    return Source(_matching(tensors, family.network), found[0].metadata if found else {}, home)


def load(ref: str, options: Options) -> Family:
    """A model as `families.load` gives it, without its network in memory twice.

    Stock loaders map the file and keep the mapping while they convert it: a network of another precision than the one
    that is computed with is there in both. So a large one is read here, a tensor at a time.
    """
    return families.load(ref, replace(options, network=_lean(ref, options)))


def _lean(ref: str, options: Options) -> nn.Module | None:
    """The network of a large SD3 whose weights lie here as safetensors; None leaves it to the stock loader."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if families.examined(ref, options)[1] != "sd3":
            return None
        home = families.home(ref)
    except (HfHubHTTPError, LocalEntryNotFoundError):  # not here yet
        return None
    file = Path(ref) if home is None else None
    home = home or options.pipeline_config
    if home is None or not (home / "transformer" / "config.json").is_file():
        return None
    try:
        opened = [open_tensors(file)] if file else _opened(home / "transformer", STEM)
        config = read_json(home / "transformer" / "config.json")
    except BadFile:  # the stock loader has a sentence for it
        return None
    return built(config, opened, dtype_of(config) if file is None else torch.bfloat16)


def built(config: Mapping[str, Any], opened: list[Opened], dtype: torch.dtype) -> nn.Module | None:
    """A large transformer from its files, converted a tensor at a time; None if it is small or does not fit."""
    with init_empty_weights():
        network = SD3Transformer2DModel.from_config(config)
    if (numbers := sum(p.numel() for p in network.parameters())) <= LARGE:
        return None
    families.trim_memory(numbers)
    tensors = _matching(_named(opened, network.config), network)
    for name, lazy in tensors.items():
        value = lazy.make()
        value = value.to(dtype) if value.is_floating_point() else value
        set_module_tensor_to_device(network, name, "cpu", value=value, dtype=value.dtype)
    return network.eval() if tensors else None


def _named(opened: list[Opened], config: Any) -> dict[str, Lazy]:
    """The tensors of a network's files under diffusers' names, which some have and others get."""
    tensors = {name: lazy for one in opened for name, lazy in one.tensors.items()}
    if not any(name.startswith(sd3_layout.TRANSFORMER) for name in tensors):
        return tensors
    layout = sd3_layout.transformer(config)
    return {n: _piece(tensors[p.original], p) for n, p in layout.items() if p.original in tensors}


def _opened(folder: Path, stem: str) -> list[Opened]:
    """The file of a part, or its shards; none if they are pickled."""
    index = folder / f"{stem}.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [f"{stem}.safetensors"]
    return [open_tensors(folder / name) for name in names if (folder / name).is_file()]


def _matching(tensors: Mapping[str, Lazy], network: nn.Module) -> Mapping[str, Lazy]:
    """The tensors in the network's order, if they are all of its and nothing else."""
    wanted = {n: tuple(t.shape) for n, t in network.state_dict().items()}
    return {n: tensors[n] for n in wanted} if {n: t.shape for n, t in tensors.items()} == wanted else {}


def _piece(whole: Lazy, piece: Piece) -> Lazy:
    """A tensor of diffusers from the original's."""
    shape = (whole.shape[0] // piece.part[1], *whole.shape[1:]) if whole.shape else ()
    shape = shape[:2] if piece.convolution else shape
    return Lazy(whole.dtype, shape, lambda: sd3_layout.to_diffusers(piece, whole.make()))


def _original(tensors: Mapping[str, Lazy], layout: Mapping[str, Piece]) -> dict[str, Lazy]:
    """The tensors under the original's names; q, k and v are put together when they are wanted.

    Raises:
        CannotRun: If there is a tensor that the original has no place for, or one is missing.
    """
    if strange := sorted(set(tensors) ^ set(layout)):
        raise CannotRun(f"the original layout and '{strange[0]}' do not go together", "Give the format diffusers.")
    found = {}
    for name, parts in sd3_layout.grouped(layout).items():
        first, count, piece = tensors[parts[0]], len(parts), layout[parts[0]]
        shape = (first.shape[0] * count, *first.shape[1:]) if first.shape else ()
        found[name] = Lazy(
            first.dtype, (*shape, 1, 1) if piece.convolution else shape,
            lambda parts=parts: sd3_layout.to_original([(layout[n], tensors[n].make()) for n in parts]),  # type: ignore[misc]
        )  # fmt: skip
    return found


def checkpoint(origin: Source, network: Mapping[str, Lazy], config: Any) -> dict[str, Lazy]:
    """All tensors of a single file in the original layout, with `network` in it; the others as they lie on disk.

    Raises:
        CannotRun: If a part has no weights that can be read, or the layout no place for one.
    """
    layout = sd3_layout.transformer(config)
    if origin.file is not None:
        rest = dict(open_tensors(origin.file).tensors)
        known = any(name.startswith(sd3_layout.TRANSFORMER) for name in rest)
        return {**rest, **(_original(network, layout) if known else network)}
    assert origin.home is not None
    found = _original(network, layout)
    tensors = _part(origin.home / "vae", STEM)
    found |= _original(tensors, sd3_layout.vae(read_json(origin.home / "vae" / "config.json")))
    for which, name in ((1, "text_encoder"), (2, "text_encoder_2"), (3, "text_encoder_3")):
        if (origin.home / name).is_dir():
            tensors = _part(origin.home / name, "model")
            _check_projection(which, tensors)
            found |= _original(tensors, sd3_layout.text_encoder(which, tensors))
    return found


def _check_projection(which: int, tensors: Mapping[str, Lazy]) -> None:
    """Refuse a clip_l whose projection stock `from_single_file` would drop: it puts an identity in its place."""
    projection = tensors.get("text_projection.weight")
    if which == 1 and projection is not None:
        found = projection.make()
        if not torch.equal(found, torch.eye(len(found), dtype=found.dtype)):
            raise CannotRun(
                "text_encoder has a projection that is not the identity: stock loaders of a single file drop it",
                "Give the format diffusers or transformer.",
            )


def _part(folder: Path, stem: str) -> dict[str, Lazy]:
    """The tensors of a part, from its file or shards."""
    tensors = {n: lazy for opened in _opened(folder, stem) for n, lazy in opened.tensors.items()}
    if not tensors:
        raise CannotRun(f"'{folder.name}' has no safetensors", "Export the format diffusers, and that one again.")
    return tensors


def large(family: Family) -> bool:
    """Whether its network is to be treated with care for memory."""
    return sum(p.numel() for p in family.network.parameters()) > LARGE


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of the libraries: of parts that are absent on purpose, of casts that are meant."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    before = ours.get_verbosity(), theirs.get_verbosity()
    ours.set_verbosity_error()
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ours.set_verbosity(before[0])
        theirs.set_verbosity(before[1])


def folder(path: Path, options: Options, dtype: torch.dtype, rest: torch.dtype) -> Family:
    """An exported folder through `from_pretrained`, its network in the precision in which it was written."""
    return families.load(str(path), replace(options, network_dtype=dtype, rest_dtype=rest))


def single_file(path: Path, options: Options, home: Path | None, dtype: torch.dtype, rest: torch.dtype) -> Family:
    """An exported checkpoint through `from_single_file`; `rest` is the precision of the other parts."""
    return families.load(str(path), replace(options, pipeline_config=home, network_dtype=dtype, rest_dtype=rest))


def network_file(path: Path, kind: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A network from one file with diffusers' names: `from_single_file`, or for a UNet, which has none, a folder."""
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        network: nn.Module
        if kind == "sd3":
            network = SD3Transformer2DModel.from_single_file(
                str(path), config=scratch, dtype=dtype, local_files_only=True
            )
        else:
            (Path(scratch) / f"{STEM}.safetensors").symlink_to(path.absolute())
            network = UNet2DModel.from_pretrained(scratch, dtype=dtype, use_safetensors=True)
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
    """Write parts of a loaded pipeline as diffusers does, and its index where `folder` has none."""
    for name in parts:
        part = getattr(family.pipeline, name, None)
        if part is not None:
            part.save_pretrained(folder / name)
    if not (folder / "model_index.json").is_file():
        family.pipeline.save_config(folder)


def converted(family: Family, path: Path, part: str, config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Give a family whose network is in the precision of a file the same network in another one, never both at once."""
    if family.network is not None and next(family.network.parameters()).dtype == dtype:
        return
    if not large(family):
        family.network.to(dtype)
        return
    family.set_network(None)
    families.trim_memory(LARGE + 1)
    opened = [open_tensors(path)] if path.is_file() else _opened(path / part, STEM)
    family.set_network(built(config, opened, dtype))
