"""From a reference on the command line to a loaded model: an alias, a folder, a single file, or a hub id."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from unforget import families
from unforget.errors import CannotRun, UnforgetError, UsageError, is_full
from unforget.families import safety
from unforget.families.parts import HINTS, INDEX, LORA, PEFT_CONFIG, check_pointer
from unforget.files.licence import licence
from unforget.files.storage import BadFile, open_tensors, read_json

if TYPE_CHECKING:
    import torch

    from unforget.core.types import Family
    from unforget.families.spec import FamilySpec


ADAPTED = re.compile(r"\blora_|[._]lora[._]|\bhada_w|\blokr_w")
"""In names of tensors of an adapter."""


class Hints(BaseModel):
    """What a model folder may say about itself to this tool, in `unforget.json` beside model_index.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    guidance: float | None = Field(None, ge=1, le=100)
    retain_prompts: tuple[Annotated[str, Field(max_length=2**12)], ...] = Field((), max_length=2**12)
    made: dict[str, Any] | None = None
    """Where an exported folder came from, as `unforget.exports` writes it."""


@dataclass(frozen=True)
class Options:
    """How to open a model; `resolution` and `guidance` replace the model's own."""

    allow_pickle: bool = False
    """Also open `.bin` weights, with torch's restricted unpickler."""
    device: str = "cpu"
    resolution: int | None = None
    guidance: float | None = None
    batch_size: int | None = None
    """Images in one pass without gradients; None: by their size."""
    note: Callable[[str], object] = lambda sentence: None
    """Where sentences for the user go."""
    pipeline_config: Path | None = None
    """A diffusers folder, or a hub id, that says what a single file holds."""
    text_encoder: tuple[Path, ...] = ()
    """Files of text encoders that a single file lacks."""
    t5: bool = True
    """Whether to load optional text encoders."""
    network_dtype: torch.dtype | None = None
    rest_dtype: torch.dtype | None = None
    network: Any = None
    """Taken instead of the model's own, which is not loaded then."""
    cpu_offload: bool | None = None
    """Whether the network's weights wait in the host's memory; None: if `networks` of them do not fit the device."""
    networks: int = 1
    """How many there will be at once."""


def load(ref: str, options: Options | None = None) -> Family:
    """The model that `ref` names: an alias, a diffusers folder, a single file, or a hub id `owner/name[@revision]`.

    UsageError if `ref` names nothing that can be opened, or only pickled weights; CannotRun if opening it failed.
    """
    options = options or Options()
    source, spec = examined(ref, options)
    if source != ref and Path(ref).exists():
        options.note(f"'{ref}' is taken for the alias; the folder or file of that name is ./{ref}")
    with opening(ref, source):
        return _opened(ref, source, spec, options)


def _opened(ref: str, source: str, spec: FamilySpec, options: Options) -> Family:
    from unforget.families.model import DiffusionModel
    from unforget.families.pipelines import stock

    pipeline = stock(spec, source, options)
    needed = [n for n in spec.text_encoders if n not in spec.optional] + [spec.autoencoder] * bool(spec.autoencoder)
    if missing := [n for n in needed if getattr(pipeline, n) is None]:
        raise CannotRun(f"the model '{ref}' lacks its {missing[0]}", "Get the model again, with all its parts.")
    single = options.pipeline_config if Path(source).is_file() else None
    model = DiffusionModel(spec, pipeline, ref, options, hints(single or Path(source)))
    families.trim_memory(sum(p.numel() for p in model.network.parameters()))
    if not bool(model.schedule.alphas.isfinite().all() and model.schedule.sigmas.isfinite().all()):
        raise CannotRun(f"the scheduler of '{ref}' describes no noise", "Get the model again.")
    model.sampling_timesteps(2)  # a scheduler that wants what it is not given says so before any work
    for part in pipeline.components.values():
        # The extremes tell of NaN and infinity, too, and take no memory.
        if not all(bool(e.isfinite()) for p in getattr(part, "parameters", list)() if p.numel() for e in p.aminmax()):
            raise CannotRun(f"the model '{ref}' holds NaN or infinite weights", "Give a model that is intact.")
    return model


def examined(ref: str, options: Options) -> tuple[str, FamilySpec]:
    """Folder, file or hub id that `ref` names, and its row; what lies here was looked at before a library opens it."""
    source = source_of(ref)
    spec = _spec(source, ref)
    if options.text_encoder and not Path(source).is_file():
        raise UsageError(f"'{ref}' is no single file, and has its text encoders", "Leave out --text-encoder.")
    if Path(source).is_dir():
        safety.check(Path(source), spec, options.allow_pickle)
    elif Path(source).is_file():
        _check_single(Path(source), spec, options)
    return source, spec


def planned(ref: str, options: Options) -> tuple[str, FamilySpec, Path]:
    """The folder or hub id with the configuration of what `ref` names, its row, and where that lies, looked at."""
    source, spec = examined(ref, options)
    single = Path(source).is_file()
    config = str(options.pipeline_config) if single else source
    with opening(ref, config):
        folder = described(config)
    if folder != Path(config):  # the hub's, which came just now
        if single:
            safety.check_single(Path(source), spec, folder, options.text_encoder)
        else:
            left = () if options.t5 else spec.optional
            safety.check(folder, spec, options.allow_pickle, left, described=True)
    return config, spec, folder


def spec_of(ref: str) -> FamilySpec:
    """The row of the family that `ref` names, without loading any weights."""
    return _spec(source_of(ref), ref)


def home(ref: str) -> Path | None:
    """The folder of a model that was loaded: its own, or the snapshot in the hub's cache; None for a single file."""
    source = source_of(ref)
    if Path(source).exists():
        return Path(source) if Path(source).is_dir() else None
    from huggingface_hub import hf_hub_download

    repo, revision = at(source)
    return Path(hf_hub_download(repo, INDEX, revision=revision, local_files_only=True)).parent


def described(source: str) -> Path:
    """The folder itself, or what the hub's has besides weights."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    repo, revision = at(source)
    few = ["*.json", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=few))


def hints(folder: Path) -> Hints:
    """What a model folder says about itself to this tool; UsageError for what nobody understands."""
    path = folder / HINTS
    if not path.is_file():
        return Hints()
    try:
        return Hints.model_validate(read_json(path))
    except ValueError:
        raise UsageError(f"'{path}' is not what this tool expects there", "Remove or mend it.") from None


def editor(ref: str, device: str | torch.device = "cpu") -> tuple[Any, str]:
    """An instruction editor, any diffusers pipeline that takes an image and a prompt, and the name of its licence."""
    from unforget.families.pipelines import stock_editor

    with opening(ref, ref):
        pipeline = stock_editor(ref, _pipeline_class(ref, ref))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device), _licence(ref)


def _licence(ref: str) -> str:
    from huggingface_hub import hf_hub_download

    home = Path(ref)
    if not home.is_dir():
        with suppress(Exception):  # no card, or no network: the weights were opened all the same
            home = Path(hf_hub_download(ref.partition("@")[0], "README.md")).parent
    if not (home / "README.md").is_file():
        return "a licence that could not be read"
    found = licence(home / "README.md")
    named = found.get("license_name") or found.get("license") or "a licence that its card does not name"
    return (named if isinstance(named, str) else ", ".join(named))[:100]


def source_of(ref: str) -> str:
    """A folder or file that exists, or a hub id."""
    aliases = families.HUB_ALIASES
    source = str(files("unforget.families") / "models" / ref) if ref in families.EMBEDDED else aliases.get(ref, ref)
    if not (Path(source).is_dir() or Path(source).is_file() or _names_repository(source)):
        known = ", ".join([*families.EMBEDDED, *aliases])
        hint = f"Give an alias ({known}), a diffusers folder, a .safetensors file, or a hub id owner/name."
        raise UsageError(f"no model '{ref}'", hint)
    return source


def _spec(source: str, ref: str) -> FamilySpec:
    """The row of what a source holds: by its pipeline class, or by the names of a single file's tensors."""
    if Path(source).is_file():
        return _spec_of_single(Path(source), ref)
    name = _pipeline_class(source, ref)
    for spec in families.FAMILIES:
        if name in (spec.pipeline_class, *spec.also):
            return spec
    known = ", ".join(spec.pipeline_class for spec in families.FAMILIES)
    instead = [spec.refused[name] for spec in families.FAMILIES if name in spec.refused]
    hint = f"Supported pipelines: {known}. Another is one file with its row: docs/architecture.md."
    raise UsageError(f"'{ref}' is a {name}", instead[0] if instead else hint)


def _pipeline_class(source: str, ref: str) -> str:
    """What a folder or the hub calls the pipeline."""
    if Path(source).is_dir():
        return _class_name(Path(source))
    from huggingface_hub import hf_hub_download

    with opening(ref, source):
        repo, revision = at(source)
        return _class_name(Path(hf_hub_download(repo, INDEX, revision=revision)).parent)


def _spec_of_single(file: Path, ref: str) -> FamilySpec:
    if file.suffix != ".safetensors":
        raise UsageError(f"'{ref}' is not a .safetensors file", "Convert the checkpoint to safetensors.")
    try:
        check_pointer(file)
        names = set(open_tensors(file).tensors)
    except BadFile as error:
        raise UsageError(f"'{ref}' cannot be opened: {error}", "Get it again.") from None
    if any(ADAPTED.search(name) for name in names):
        hint = "Give the model that it is for; `pipeline.fuse_lora()` and `save_pretrained` put it into one."
        raise UsageError(f"'{ref}' is a LoRA (an adapter), not a model", hint)
    safety.check_scales(names, f"'{ref}'")
    layouts = [(spec, spec.layout) for spec in families.FAMILIES if spec.layout is not None]
    for spec, layout in layouts:
        if layout.is_in(names):
            return spec
    known = ", ".join(spec.title for spec, _ in layouts)
    raise UsageError(f"'{ref}' is a checkpoint of no family that has such", f"Give one of: {known}; or a folder.")


def _class_name(folder: Path) -> str:
    index, hint = folder / INDEX, "Give the folder that `pipeline.save_pretrained` wrote."
    if any((folder / name).is_file() for name in (PEFT_CONFIG, LORA)):
        raise UsageError(f"'{folder}' is a LoRA (an adapter), not a model", "Give the model that it is for.")
    if not index.is_file():
        raise UsageError(f"'{folder}' has no model_index.json", hint)
    try:
        check_pointer(index)
        return str(read_json(index)["_class_name"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"'{index}' does not name a pipeline class", hint) from None


def _names_repository(source: str) -> bool:
    """Whether the hub may be asked for it: what lies here, whatever it is, or is called as a file, names none."""
    ours = os.path.lexists(source) or source.endswith(".safetensors") or source.startswith((".", "/", "~"))
    return source.count("/") == 1 and not ours


def at(source: str) -> tuple[str, str | None]:
    """A hub id as the name of a repository and the revision, if one is named."""
    repo, _, revision = source.partition("@")
    return repo, revision or None


def _check_single(file: Path, spec: FamilySpec, options: Options) -> None:
    if (config := options.pipeline_config) is None:
        hint = "Give --pipeline-config: a diffusers folder of that model (weights are not needed), or its hub id."
        raise UsageError(f"'{file}' does not say what its model is made of", hint)
    if config.is_dir():
        safety.check_single(file, spec, config, options.text_encoder)
    elif not _names_repository(str(config)):
        raise UsageError(f"there is no folder '{config}'", "Give a diffusers folder, or a hub id owner/name.")


@contextmanager
def opening(ref: str, source: str) -> Iterator[None]:
    """Let what fails inside diffusers be said in one sentence."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    given, sys.stdin = sys.stdin, io.StringIO()  # nobody answers what a library asks
    try:
        yield
    except BaseException as error:
        if not _of_a_library(error):
            raise
        reason = safety.reason(error)[:300]
        raise CannotRun(f"cannot open the model '{ref}': {reason}", _hint(source, str(error))) from error
    finally:
        sys.stdin = given


@contextmanager
def asking(ref: str) -> Iterator[None]:
    """Let what fails inside a library while an opened model works be said in one sentence: its files fit their classes,
    but what they say together cannot be done. What the memory does not hold is another matter."""
    try:
        yield
    except BaseException as error:
        if not _of_a_library(error) or is_full(error):
            raise
        hint = "Check its configurations; the stock pipeline must draw with it."
        raise CannotRun(f"the model '{ref}' cannot work: {safety.reason(error)[:300]}", hint) from error


def _of_a_library(error: BaseException) -> bool:
    """Whether it says nothing to the user yet; what tokenizers raise where Rust panics is not even an Exception."""
    kind = type(error).__name__
    if (
        isinstance(error, UnforgetError) or kind == "_StopRecomputationError"
    ):  # by which a checkpoint ends a block early
        return False
    return isinstance(error, Exception) or kind == "PanicException"


def _hint(source: str, reason: str) -> str:
    if Path(source).is_dir():
        return "Check the files of that folder; the stock pipeline's `from_pretrained` must open it."
    if Path(source).is_file():
        return "Check the file, and whether its --pipeline-config is of the same model, with what the file lacks."
    if "gated" in reason.lower() or "403" in reason or "401" in reason:
        return f"Accept its licence on huggingface.co/{source.partition('@')[0]}, set HF_TOKEN, or give a local folder."
    return (
        "Check the name and the network (HF_HUB_OFFLINE, HF_TOKEN; gated models ask for both), or give a local folder."
    )
