"""What every command needs: a model, a picture, a place to write."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from unforget import families
from unforget.config import ModelConfig
from unforget.core import distributed
from unforget.core.types import Family, Progress
from unforget.errors import UsageError
from unforget.files import images


def load(config: ModelConfig) -> Family:
    """The model that a configuration names, on as many threads as it says."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return families.load(config.model, options(config))


def options(config: ModelConfig, like: Family | None = None) -> families.Options:
    """How to open a model; another one to be compared with `like` draws with the same guidance."""
    guidance = config.guidance or (like.guidance if like else None)
    return families.Options(
        config.allow_pickle,
        distributed.start(config.device),
        config.resolution,
        guidance,
        config.pipeline_config,
        config.t5,
    )


def read(path: Path, family: Family, config: ModelConfig, progress: Progress) -> Tensor:
    """A picture of the model's size, (C, H, W) in [-1, 1]."""
    return images.read_image(path, family.image_shape, resize=config.resize, note=progress.note)


def writable(path: Path, force: bool) -> None:
    """Refuse before any work what could not be written after it."""
    if path.exists() and not force:
        raise UsageError(f"'{path}' exists", "Say --force to overwrite it, or give another --output.")
    home = path.parent
    if not home.is_dir():
        raise UsageError(f"there is no folder '{home}'", "Make it first.")
    if not os.access(home, os.W_OK):
        raise UsageError(f"the folder '{home}' cannot be written", "Give another --output.")


def salted(base_digest: str) -> str:
    """The salt of the ids of pictures: the base, and $UNFORGET_SALT where a team keeps a secret.

    Ids of one picture differ from base to base; with a secret nobody without it can tell which picture an id names.
    """
    return f"{base_digest}/{os.environ.get('UNFORGET_SALT', '')}/"


def versions() -> dict[str, str]:
    """Of what computes, for the record."""
    return {"unforget": version("unforget-diffusion"), "torch": torch.__version__, "diffusers": version("diffusers")}
