"""Model families, and how a reference on the command line becomes a loaded one.

A new family is one file here and one line in `FAMILIES`.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unforget.errors import CannotRun, UsageError

if TYPE_CHECKING:
    from unforget.domain import Family

EMBEDDED = ("faces",)
"""Models inside the package: no download."""
HUB_ALIASES = {"ddpm-celebahq": "google/ddpm-celebahq-256"}
FAMILIES = ("DDPMPipeline",)
"""`_class_name` in model_index.json of every pipeline that can be unlearned from."""


def load(ref: str, *, allow_pickle: bool = False, device: str = "cpu") -> Family:
    """The model that `ref` names: an alias, a local diffusers folder, or a hub id `owner/name[@revision]`.

    Args:
        ref: What the user said.
        allow_pickle: Also open `.bin` weights (with torch's restricted unpickler).
        device: Where the weights go.

    Raises:
        UsageError: If `ref` names nothing that can be opened, or only pickled weights.
        CannotRun: If opening it failed.
    """
    source = str(files("unforget") / "models" / ref) if ref in EMBEDDED else HUB_ALIASES.get(ref, ref)
    if Path(source).exists():
        _check_folder(Path(source), allow_pickle)
        return _open(source, None, ref, allow_pickle, device)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        known = ", ".join([*EMBEDDED, *HUB_ALIASES])
        raise UsageError(f"no model '{ref}'", f"Give an alias ({known}), a diffusers folder, or a hub id owner/name.")
    repo, _, revision = source.partition("@")
    return _open(repo, revision or None, ref, allow_pickle, device)


def _check_folder(folder: Path, allow_pickle: bool) -> None:
    """Say what is wrong with a local folder before diffusers stumbles over it."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(
            f"'{folder}' has no model_index.json", "Give the folder that `pipeline.save_pretrained` wrote."
        )
    try:
        kind = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise UsageError(
            f"'{index}' does not name a pipeline class", "Save the pipeline again with diffusers."
        ) from None
    _check_class(kind, str(folder))
    home = folder / "unet" if (folder / "unet").is_dir() else folder
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


def _check_class(kind: Any, where: str) -> None:
    if kind not in FAMILIES:
        raise UsageError(f"'{where}' is a {kind}", f"Supported pipelines: {', '.join(FAMILIES)}.")


def _open(source: str, revision: str | None, name: str, allow_pickle: bool, device: str) -> Family:
    from diffusers import DDPMPipeline, DiffusionPipeline
    from diffusers.utils import logging

    from unforget.families.ddpm import DDPM

    logging.disable_progress_bar()
    where = {} if revision is None else {"revision": revision}
    try:
        if not Path(source).is_dir():
            _check_class(DiffusionPipeline.load_config(source, **where)["_class_name"], source)
        pipeline = DDPMPipeline.from_pretrained(source, use_safetensors=None if allow_pickle else True, **where)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = (
            "Check the files of that folder; `DDPMPipeline.from_pretrained` must open it."
            if Path(source).is_dir()
            else "Check the name and the network (HF_HUB_OFFLINE, HF_TOKEN), or give a local folder."
        )
        raise CannotRun(f"cannot open the model '{name}': {reason}", hint) from error
    if not all(bool(p.isfinite().all()) for p in pipeline.unet.parameters()):
        raise CannotRun(f"the model '{name}' holds NaN or infinite weights", "Give a model that is intact.")
    return DDPM(pipeline.to(device), name)
