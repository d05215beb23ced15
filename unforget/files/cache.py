"""What the base does, made once for a key and read again: images that it draws, and figures.

The cache decides nothing that it does not know of itself. An entry is keyed by all that made it, and signed together
with its key by a secret that does not lie in the cache: what somebody else wrote, what was damaged, and what was made
for another key is as if it were not there. Then it is made again.
"""

import contextlib
import functools
import hashlib
import hmac
import importlib.metadata
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from unforget.core import distributed
from unforget.core.sampling import draw, random_noise
from unforget.core.types import Family
from unforget.errors import CannotRun, UsageError
from unforget.files import images
from unforget.files.secret import own_folder, secret, user_folder
from unforget.files.storage import BadFile, atomic_output, digest, open_tensors, read_json, write_tensors

T = TypeVar("T")
ENTRY = re.compile(r"\.?[a-z]+-\d+-[0-9a-f]{32}\.(safetensors|json)(\.\d+\.partial)?")
"""Names of our files in the folder, those of a writer that was killed included: nothing else there is touched."""
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "onnxruntime", "dlib-bin")
SIZE = "4GiB"
UNITS = ("KB", "MB", "GB", "TB")


def cache_folder() -> Path | None:
    """`$UNFORGET_CACHE`, else `unforget` in the user's cache folder; None for a user without a home."""
    if given := os.environ.get("UNFORGET_CACHE"):
        return Path(given)
    home = user_folder("XDG_CACHE_HOME", ".cache")
    return home and home / "unforget"


def limit() -> int:
    """Bytes that the cache may take: `$UNFORGET_CACHE_SIZE`, such as 500MB; UsageError if that is no size."""
    given = os.environ.get("UNFORGET_CACHE_SIZE") or SIZE
    found = re.fullmatch(r"(\d{1,15})\s*([KMGT]i?B)?", given.strip())
    if not found:
        raise UsageError(f"$UNFORGET_CACHE_SIZE is '{given}', which is no size", "Say it as 500MB or 4GiB.")
    unit = found[2] or ""
    power = UNITS.index(unit.replace("i", "")) + 1 if unit else 0
    return int(found[1]) * int((1024 if "i" in unit else 1000) ** power)


def entries() -> list[Path]:
    """The files of the cache, those first that were not used for longest."""
    folder = cache_folder()
    files = [p for p in folder.iterdir() if ENTRY.fullmatch(p.name)] if folder and folder.is_dir() else []
    files = [p for p in files if not stat.S_ISDIR(p.lstat().st_mode)]  # which none of ours is
    return [path for _, path in sorted((p.lstat().st_mtime_ns, p) for p in files)]


def state() -> dict[str, Any]:
    """Where the cache lies, how many entries it has, and bytes: those that they take, and those that they may."""
    sizes = [path.lstat().st_size for path in entries()]
    return {"folder": cache_folder(), "entries": len(sizes), "bytes": sum(sizes), "limit": limit()}


def clear() -> int:
    """Remove all entries, and nothing else that lies there; returns how many."""
    found = entries()
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


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

    key = ["retain", digest, family.made_by(prompts), list(prompts), seed, steps]
    return cached(key, (len(prompts), *family.image_shape), make)


def cached(key: Sequence[object], shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """Images of a shape (N, C, H, W) in [-1, 1], in 8 bits, made once for a key and then read from the cache."""
    whole = _whole(key)

    def read(path: Path) -> Tensor:
        opened = open_tensors(path)
        if opened.tensors["images"].shape != shape:  # before memory is taken
            raise BadFile("of another shape")
        found = opened.load()
        _check(whole, digest(found), opened.metadata["signature"])
        return found["images"]

    def write(bytes: Tensor, path: Path) -> None:
        tensors = {"images": bytes}
        write_tensors(tensors, {"signature": _signature(whole, digest(tensors))}, path)

    # Contiguous as what is read from a file is: sums depend on how tensors lie in memory.
    return images.from_bytes(_once(whole, "safetensors", lambda: images.to_bytes(make()).contiguous(), read, write))


def cached_figures(key: Sequence[object], make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Figures by name, made once for a key and then read from the cache."""
    whole = _whole(key)

    def read(path: Path) -> dict[str, float]:
        found = read_json(path)
        _check(whole, json.dumps(found["figures"], sort_keys=True), found["signature"])
        return {str(k): float(v) for k, v in found["figures"].items()}

    def write(figures: dict[str, float], path: Path) -> None:
        signature = _signature(whole, json.dumps(figures, sort_keys=True))
        path.write_text(json.dumps({"figures": figures, "signature": signature}))

    return _once(whole, "json", make, read, write)


def _whole(key: Sequence[object]) -> str:
    """A key with the code and the libraries that make what belongs to it."""
    return json.dumps([*key, _code()])


@functools.cache
def _code() -> list[str]:
    """Digest of this package's own code, and versions of the libraries."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    known = []
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known.append(f"{name} {importlib.metadata.version(name)}")
    return [found.hexdigest(), *known]


def _signature(key: str, content: str) -> str:
    known = secret()
    if known is None:
        raise OSError("there is no place for a secret")
    return hmac.new(known, f"{hashlib.sha256(key.encode()).hexdigest()} {content}".encode(), "sha256").hexdigest()


def _check(key: str, content: str, signature: str) -> None:
    if not hmac.compare_digest(_signature(key, content), signature):
        raise BadFile("of somebody else, of another key, or damaged")


def _once(
    key: str, suffix: str, make: Callable[[], T], read: Callable[[Path], T], write: Callable[[T, Path], None]
) -> T:
    """What the cache holds, if it does for the first process; else it is made and kept.

    What does not fit is made again, and a cache that cannot be written is no reason to stop.
    """
    folder = cache_folder()
    name = f"{json.loads(key)[0]}-5-{hashlib.sha256(key.encode()).hexdigest()[:32]}.{suffix}"

    def attempt() -> T | None:
        # Whatever a file may hold that is none of ours: RecursionError is a RuntimeError.
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError):
            if folder is not None and (folder / name).is_file():  # a pipe would keep us waiting
                found = read(folder / name)
                os.utime(folder / name)
                return found
        return None

    found = attempt()
    if distributed.broadcast(found is not None):
        found = attempt() if found is None else found  # the first process may have written it a moment ago
        if found is None:
            hint = "Put $UNFORGET_CACHE where all see it, and give all one $UNFORGET_CACHE_KEY."
            raise CannotRun("a process does not see the first one's cache", hint)
        return found
    made = make()
    if folder is not None:
        with contextlib.suppress(OSError):
            own_folder(folder, ENTRY.fullmatch)
            with atomic_output(folder / name, private=True) as beside:
                write(made, beside)
            _prune()
    return made


def _prune() -> None:
    """Remove what was not used for longest, until the rest fits the limit."""
    known = [(path, path.lstat().st_size) for path in entries()]
    over = sum(size for _, size in known) - limit()
    for path, size in known:
        if over <= 0:
            return
        path.unlink(missing_ok=True)
        over -= size
