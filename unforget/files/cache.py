"""What the base draws, made once for a key and read again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from unforget.core import distributed
from unforget.core.sampling import draw, random_noise
from unforget.core.types import Family
from unforget.errors import CannotRun
from unforget.files.storage import atomic_output, open_tensors, read_json, write_tensors

T = TypeVar("T")


def cache_folder() -> Path:
    """`$UNFORGET_CACHE`, else `unforget` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("UNFORGET_CACHE") or home / "unforget")


def drawn_cached(
    family: Family, digest: str, prompts: Sequence[str], *, seed: int, steps: int,
    advance: Callable[[int], object] = lambda n: None,
) -> Tensor:  # fmt: skip
    """One picture for every prompt that the base draws for this seed, from the cache if it was asked before.

    Args:
        family: The base.
        digest: Of its weights.
        prompts: Empty ones for a model without.
        seed: Of the draws.
        steps: Sampler steps.
        advance: Told how many pictures are done.
    """

    def make() -> Tensor:
        noise = random_noise(len(prompts), family.latent_shape, seed, "retain")
        return draw(family, noise, steps=steps, prompt_ids=family.prompt_ids(prompts), advance=advance)

    return cached(["retain", digest, list(prompts), seed, steps, family.image_shape, family.guidance], make)


def cached(key: Sequence[object], make: Callable[[], Tensor]) -> Tensor:
    """Pictures (N, C, H, W) in [-1, 1], in 8 bits, made once for a key and then read from the cache."""
    path = _place(key, "safetensors")

    def read() -> Tensor:
        return open_tensors(path).load()["images"].float() / 127.5 - 1

    if (known := _known(read)) is not None:
        return known
    # Contiguous as what is read from a file is: sums depend on how tensors lie in memory.
    eight = ((make().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).contiguous()
    _keep(path, lambda beside: write_tensors({"images": eight}, {}, beside))
    return eight.float() / 127.5 - 1


def cached_figures(key: Sequence[object], make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Figures by name, made once for a key and then read from the cache."""
    path = _place(key, "json")
    if (known := _known(lambda: {str(k): float(v) for k, v in read_json(path).items()})) is not None:
        return known
    figures = make()
    _keep(path, lambda beside: beside.write_text(json.dumps(figures)))
    return figures


def _known(read: Callable[[], T]) -> T | None:
    """What the cache holds, if it does for the first process; a damaged one is only a cache."""

    def attempt() -> T | None:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            return read()
        return None

    found = attempt()
    if not distributed.broadcast(found is not None):
        return None
    if found is None:  # the first process may have written it a moment ago
        found = attempt()
    if found is None:
        raise CannotRun("a process does not see the cache of the first one", "Put $UNFORGET_CACHE where all see it.")
    return found


def _place(key: Sequence[object], suffix: str) -> Path:
    asked = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_folder() / f"{key[0]}-4-{asked[:32]}.{suffix}"


def _keep(path: Path, write: Callable[[Path], object]) -> None:
    """Store in the cache; one that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(path) as beside:
            write(beside)
