"""Model families, and how a reference on the command line becomes a loaded one.

A new family is one file here and one line in `FAMILIES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unforget.errors import CannotRun, UsageError

if TYPE_CHECKING:
    from unforget.domain import Family

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
HOMES = {"ddpm": ("unet",), "sd3": ("transformer", "vae")}
"""Subfolders that must hold weights."""


class Hints(BaseModel):
    """What a model folder may say about itself to this tool, in `unforget.json` beside model_index.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    guidance: float | None = Field(None, ge=1)
    retain_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to open a model; see `load`."""

    allow_pickle: bool = False
    device: str = "cpu"
    resolution: int | None = None
    guidance: float | None = None
    pipeline_config: Path | None = None
    t5: bool = True


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
    source = _source(ref)
    kind = _kind(source, ref)
    if Path(source).is_dir():
        _check_weights(Path(source), kind, options.allow_pickle)
    opened: Family = _OPENERS[kind](source, ref, options)
    if not all(bool(p.isfinite().all()) for p in opened.network.parameters()):
        raise CannotRun(f"the model '{ref}' holds NaN or infinite weights", "Give a model that is intact.")
    return opened


def kind(ref: str) -> str:
    """The kind of family that `ref` names, a value of `FAMILIES`, without loading any weights."""
    return _kind(_source(ref), ref)


def _source(ref: str) -> str:
    """A folder or file that exists, or a hub id."""
    source = str(files("unforget") / "models" / ref) if ref in EMBEDDED else HUB_ALIASES.get(ref, ref)
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
        return json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
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


def _check_weights(folder: Path, kind: str, allow_pickle: bool) -> None:
    """Say what is wrong with a local folder before diffusers stumbles over it."""
    for part in HOMES[kind]:
        # Old DDPM repositories are flat.
        home = folder if kind == "ddpm" and not (folder / part).is_dir() else folder / part
        shards = home / "diffusion_pytorch_model.safetensors.index.json"
        if shards.is_file():
            for name in sorted(set(json.loads(shards.read_text())["weight_map"].values())):
                if not (home / name).is_file():
                    raise CannotRun(f"'{home}' misses the shard {name}", "Download the model again.")
        elif not (home / "diffusion_pytorch_model.safetensors").is_file():
            if not any(home.glob("*.bin")):
                raise CannotRun(f"'{home}' holds no weights", "Expected diffusion_pytorch_model.safetensors in it.")
            if not allow_pickle:
                raise UsageError(
                    f"'{home}' holds pickled weights only, which can run code when opened",
                    "Convert them to safetensors, or say --allow-pickle if you trust where they come from.",
                )


def _opening(ref: str, source: str, action: Callable[[], Any]) -> Any:
    """Run what may fail inside diffusers, and say so in one sentence."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return action()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
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
    from unforget.families.sd3 import SD3, from_pretrained, from_single_file

    def pipeline() -> Any:
        if Path(source).is_file():
            return from_single_file(source, options.pipeline_config, t5=options.t5)
        return from_pretrained(_where(source), use_safetensors=None if options.allow_pickle else True, t5=options.t5)

    opened = _opening(ref, source, pipeline)
    missing = [n for n in ("text_encoder", "text_encoder_2", "vae") if getattr(opened, n) is None]
    if missing:
        raise CannotRun(f"the model '{ref}' lacks its {missing[0]}", "Only text_encoder_3 (T5) may be left out.")
    hints = _hints(Path(source))
    return SD3(
        opened, ref, guidance=options.guidance or hints.guidance or 7.0,
        resolution=options.resolution, retain_prompts=hints.retain_prompts or _prompts(), device=options.device,
    )  # fmt: skip


_OPENERS: dict[str, Callable[[str, str, Options], Any]] = {"ddpm": _open_ddpm, "sd3": _open_sd3}


def _hints(folder: Path) -> Hints:
    path = folder / "unforget.json"
    if not path.is_file():
        return Hints()
    try:
        return Hints.model_validate_json(path.read_text())
    except (ValidationError, ValueError, UnicodeDecodeError):
        raise UsageError(f"'{path}' is not what this tool expects there", "Remove or mend it.") from None


def _prompts() -> tuple[str, ...]:
    """The built-in list of retain prompts: everyday pictures of many kinds."""
    return tuple((files("unforget") / "models" / "retain_prompts.txt").read_text().split("\n")[:-1])


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
