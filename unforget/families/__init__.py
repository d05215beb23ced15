"""Model families, and how a reference on the command line becomes a loaded one.

A new family is one file here and one line in `FAMILIES`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unforget.errors import CannotRun, UnforgetError, UsageError
from unforget.files.storage import read_json

if TYPE_CHECKING:
    import torch

    from unforget.core.types import Family

EMBEDDED = ("faces", "flags")
"""Models inside the package: no download."""
HUB_ALIASES = {
    "ddpm-celebahq": "google/ddpm-celebahq-256",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
}
FAMILIES = {"DDPMPipeline": "ddpm", "StableDiffusion3Pipeline": "sd3"}
"""Kind of family by `_class_name` in model_index.json."""


class Hints(BaseModel):
    """What a model folder may say about itself to this tool, in `unforget.json` beside model_index.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    guidance: float | None = Field(None, ge=1)
    retain_prompts: tuple[str, ...] = ()
    made: dict[str, Any] | None = None
    """Where an exported folder came from: `exports.made.Made`."""


@dataclass(frozen=True)
class Options:
    """How to open a model; see `load`.

    Without a precision the network's and that of the rest are the family's choice. A network that is given is not
    loaded again.
    """

    allow_pickle: bool = False
    device: str = "cpu"
    resolution: int | None = None
    guidance: float | None = None
    pipeline_config: Path | None = None
    t5: bool = True
    network_dtype: torch.dtype | None = None
    rest_dtype: torch.dtype | None = None
    network: Any = None


def load(ref: str, options: Options | None = None) -> Family:
    """The model that `ref` names: an alias, a diffusers folder, a single file, or a hub id `owner/name[@revision]`.

    Args:
        ref: What the user said.
        options: `allow_pickle` also opens `.bin` weights (with torch's restricted unpickler); `device` is where the
            weights go; `resolution` and `guidance` replace the model's own; `pipeline_config` is a diffusers folder
            that says what a single file holds; without `t5` a third text encoder is left out.

    Raises:
        UsageError: If `ref` names nothing that can be opened, or only pickled weights.
        CannotRun: If opening it failed.
    """
    options = options or Options()
    source, kind = examined(ref, options)
    opened: Any = _OPENERS[kind](source, ref, options)
    trim_memory(sum(p.numel() for p in opened.network.parameters()))
    for part in opened.pipeline.components.values():
        # The extremes tell of NaN and infinity, too, and take no memory.
        if not all(bool(e.isfinite()) for p in getattr(part, "parameters", list)() if p.numel() for e in p.aminmax()):
            raise CannotRun(f"the model '{ref}' holds NaN or infinite weights", "Give a model that is intact.")
    family: Family = opened
    return family


def examined(ref: str, options: Options) -> tuple[str, str]:
    """Folder, file or hub id that `ref` names, and its kind; what lies here was looked at before a library opens it.

    Raises:
        UsageError: If it is not what it says.
        CannotRun: If weights are missing or do not fit.
    """
    source = _source(ref)
    kind = _kind(source, ref)
    if Path(source).is_dir():
        from unforget.families.safety import check

        check(Path(source), kind, options.allow_pickle)
    elif Path(source).is_file():
        _check_single(Path(source), options.pipeline_config)
    return source, kind


def trim_memory(numbers: int) -> None:
    """Give freed memory back, after what was done with a network of so many numbers, if they are many.

    glibc keeps what lies between pieces in use, and that can be gigabytes: the table of positions of an SD3 alone takes
    1.3 GiB while it is computed, in float64.
    """
    from unforget.core.types import LARGE

    if numbers <= LARGE:
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def kind(ref: str) -> str:
    """The kind of family that `ref` names, a value of `FAMILIES`, without loading any weights."""
    return _kind(_source(ref), ref)


def home(ref: str) -> Path | None:
    """The folder of a model that was loaded: its own, or the snapshot in the hub's cache; None for a single file."""
    source = _source(ref)
    if Path(source).exists():
        return Path(source) if Path(source).is_dir() else None
    from huggingface_hub import hf_hub_download

    where = _where(source)
    index = hf_hub_download(
        where["pretrained_model_name_or_path"], "model_index.json", revision=where.get("revision"),
        local_files_only=True,
    )  # fmt: skip
    return Path(index).parent


def _source(ref: str) -> str:
    """A folder or file that exists, or a hub id."""
    source = str(files("unforget.families") / "models" / ref) if ref in EMBEDDED else HUB_ALIASES.get(ref, ref)
    if not Path(source).exists() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        known = ", ".join([*EMBEDDED, *HUB_ALIASES])
        raise UsageError(
            f"no model '{ref}'",
            f"Give an alias ({known}), a diffusers folder, a .safetensors file, or a hub id owner/name.",
        )
    return source


def _kind(source: str, ref: str) -> str:
    """What a source holds; a single file is taken for SD3, the one family that has such."""
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UsageError(f"'{ref}' is not a .safetensors file", "Convert the checkpoint to safetensors.")
        return "sd3"
    name = _class_name(path) if path.is_dir() else _class_on_hub(source, ref)
    if name not in FAMILIES:
        raise UsageError(f"'{ref}' is a {name}", f"Supported pipelines: {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def _class_name(folder: Path) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(
            f"'{folder}' has no model_index.json", "Give the folder that `pipeline.save_pretrained` wrote."
        )
    try:
        return str(read_json(index)["_class_name"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"'{index}' does not name a pipeline class", "Save the pipeline again with diffusers."
        ) from None


def _class_on_hub(source: str, ref: str) -> Any:
    def ask() -> Any:
        from diffusers import DiffusionPipeline

        return DiffusionPipeline.load_config(**_where(source))["_class_name"]

    return _opening(ref, source, ask)


def _where(source: str) -> dict[str, str]:
    repo, at, revision = source.partition("@") if not Path(source).exists() else (source, "", "")
    return {"pretrained_model_name_or_path": repo, **({"revision": revision} if at else {})}


def _check_single(file: Path, config: Path | None) -> None:
    from unforget.families.safety import check_single

    if config is None:
        raise UsageError(
            f"'{file}' does not say what its model is made of",
            "Give --pipeline-config: a diffusers folder of that model (weights are not needed), or its hub id.",
        )
    if config.is_dir():
        check_single(file, config)
    elif str(config).count("/") != 1 or config.is_absolute():
        raise UsageError(f"there is no folder '{config}'", "Give a diffusers folder, or a hub id owner/name.")


def _opening(ref: str, source: str, action: Callable[[], Any]) -> Any:
    """Run what may fail inside diffusers, and say so in one sentence."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return action()
    except UnforgetError:
        raise
    except BaseException as error:  # what tokenizers raise where Rust panics is not even an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise CannotRun(f"cannot open the model '{ref}': {reason}", _hint(source, str(error))) from error


def _hint(source: str, reason: str) -> str:
    if Path(source).is_dir():
        return "Check the files of that folder; the stock pipeline's `from_pretrained` must open it."
    if Path(source).is_file():
        return "Offline a single file needs --pipeline-config DIR: a diffusers folder of that model without weights."
    if "gated" in reason.lower() or "403" in reason or "401" in reason:
        return f"Accept its licence on huggingface.co/{source.partition('@')[0]}, set HF_TOKEN, or give a local folder."
    return (
        "Check the name and the network (HF_HUB_OFFLINE, HF_TOKEN; gated models ask for both), or give a local folder."
    )


def _open_ddpm(source: str, ref: str, options: Options) -> Any:
    from diffusers import DDPMPipeline

    from unforget.families.ddpm import DDPM

    safe = None if options.allow_pickle else True
    return _opening(
        ref,
        source,
        lambda: DDPM(DDPMPipeline.from_pretrained(**_where(source), use_safetensors=safe).to(options.device), ref),
    )


def _open_sd3(source: str, ref: str, options: Options) -> Any:
    from unforget.families.pipelines import from_pretrained, from_single_file
    from unforget.families.sd3 import SD3

    def pipeline() -> Any:
        dtypes = (options.network_dtype, options.rest_dtype)
        parts = {} if options.network is None else {"transformer": options.network}
        if Path(source).is_file():
            return from_single_file(source, options.pipeline_config, t5=options.t5, dtypes=dtypes, **parts)
        safe = None if options.allow_pickle else True
        return from_pretrained(_where(source), use_safetensors=safe, t5=options.t5, dtypes=dtypes, **parts)

    opened = _opening(ref, source, pipeline)
    missing = [n for n in ("text_encoder", "text_encoder_2", "vae") if getattr(opened, n) is None]
    if missing:
        raise CannotRun(f"the model '{ref}' lacks its {missing[0]}", "Only text_encoder_3 (T5) may be left out.")
    said = hints(options.pipeline_config if options.pipeline_config and Path(source).is_file() else Path(source))
    return SD3(
        opened, ref, guidance=options.guidance or said.guidance or 7.0,
        resolution=options.resolution, retain_prompts=said.retain_prompts or _prompts(), device=options.device,
    )  # fmt: skip


_OPENERS: dict[str, Callable[[str, str, Options], Any]] = {"ddpm": _open_ddpm, "sd3": _open_sd3}


def hints(folder: Path) -> Hints:
    """What a model folder says about itself to this tool; nothing for one that does not.

    Raises:
        UsageError: If it says what nobody understands.
    """
    path = folder / "unforget.json"
    if not path.is_file():
        return Hints()
    try:
        return Hints.model_validate(read_json(path))
    except (ValidationError, ValueError):
        raise UsageError(f"'{path}' is not what this tool expects there", "Remove or mend it.") from None


def _prompts() -> tuple[str, ...]:
    """The built-in list of retain prompts: everyday pictures of many kinds."""
    return tuple((files("unforget.families") / "models" / "retain_prompts.txt").read_text().split("\n")[:-1])


def editor(ref: str) -> tuple[Any, str]:
    """An instruction editor, any diffusers pipeline that takes an image and a prompt, and the name of its licence.

    Args:
        ref: Hub id `owner/name[@revision]`, or a folder.

    Raises:
        UsageError: If the pipeline takes no image and prompt.
        CannotRun: If opening it failed.
    """
    import inspect

    from diffusers import DiffusionPipeline

    pipeline = _opening(ref, ref, lambda: DiffusionPipeline.from_pretrained(**_where(ref), use_safetensors=True))
    if not {"image", "prompt"} <= set(inspect.signature(pipeline.__call__).parameters):
        raise UsageError(
            f"'{ref}' is a {type(pipeline).__name__}, which takes no picture and instruction",
            "Give an instruction editor: FLUX.2-klein, FLUX.1-Kontext, Qwen-Image-Edit or InstructPix2Pix.",
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, _licence(ref)


def _licence(ref: str) -> str:
    from huggingface_hub import ModelCard

    try:
        card = Path(ref) / "README.md" if Path(ref).is_dir() else ref.partition("@")[0]
        data = ModelCard.load(card).data
        return str(getattr(data, "license_name", None) or data.license or "a licence that its card does not name")
    except Exception:  # no card, or no network: the weights were opened all the same
        return "a licence that could not be read"
