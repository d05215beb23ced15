"""What the base draws, made once for a key and read again."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from unforget.core import distributed
from unforget.core.sampling import draw, random_noise
from unforget.core.types import Family
from unforget.errors import CannotRun
from unforget.files import images
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
    """One image for every prompt ("" for none) that the base draws for a seed in `steps` sampler steps.

    `digest` is that of the base's weights; `advance` is told how many passes are done.
    """

    def make() -> Tensor:
        noise = random_noise(len(prompts), family.latent_shape, seed, "retain")
        return draw(family, noise, steps=steps, prompt_ids=family.prompt_ids(prompts), advance=advance)

    return cached(["retain", digest, list(prompts), seed, steps, family.image_shape, family.guidance], make)


def cached(key: Sequence[object], make: Callable[[], Tensor]) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], in 8 bits, made once for a key and then read from the cache."""
    found = _once(
        _place(key, "safetensors"),
        # Contiguous as what is read from a file is: sums depend on how tensors lie in memory.
        lambda: images.to_bytes(make()).contiguous(),
        lambda path: open_tensors(path).load()["images"],
        lambda bytes, path: write_tensors({"images": bytes}, {}, path),
    )
    return images.from_bytes(found)


def cached_figures(key: Sequence[object], make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Figures by name, made once for a key and then read from the cache."""
    return _once(
        _place(key, "json"),
        make,
        lambda path: {str(k): float(v) for k, v in read_json(path).items()},
        lambda figures, path: path.write_text(json.dumps(figures)),
    )


def _once(path: Path, make: Callable[[], T], read: Callable[[Path], T], write: Callable[[T, Path], object]) -> T:
    """What the cache holds, if it does for the first process; else it is made and kept.

    A damaged one is only a cache, and one that cannot be written is no reason to stop.
    """

    def attempt() -> T | None:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            return read(path)
        return None

    found = attempt()
    if distributed.broadcast(found is not None):
        found = attempt() if found is None else found  # the first process may have written it a moment ago
        if found is None:
            raise CannotRun("a process does not see the first one's cache", "Put $UNFORGET_CACHE where all see it.")
        return found
    made = make()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_output(path) as beside:
            write(made, beside)
    return made


def _place(key: Sequence[object], suffix: str) -> Path:
    asked = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_folder() / f"{key[0]}-4-{asked[:32]}.{suffix}"
