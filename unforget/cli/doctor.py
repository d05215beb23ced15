"""`doctor`: what this machine has for the work. A library that cannot be imported is found, not stumbled over."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PACKAGE = "unforget-diffusion"
GIB = 2**30


def look() -> dict[str, Any]:
    """Versions, devices, extras, hub, cache and disk, as JSON; nothing in it is secret."""
    required, extras = _packages()
    return {
        "unforget": version(PACKAGE), "python": platform.python_version(), "platform": platform.platform(),
        "libraries": required, "extras": extras, "devices": _tried(_devices), "hub": _tried(_hub),
        "cache": _tried(_cache), "disk": {"folder": str(Path.cwd()), "free_gib": _gib(shutil.disk_usage(".").free)},
    }  # fmt: skip


def wrong(found: dict[str, Any]) -> list[str]:
    """A sentence for each thing without which nothing runs."""
    packages = found["libraries"].items()
    sentences = [
        f"{name} is {p['version'] or 'missing'}, wanted is {p['wanted']}" for name, p in packages if not p["ok"]
    ]
    return sentences + [f"{part}: {found[part]['failed']}" for part in ("devices", "cache") if "failed" in found[part]]


def _packages() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the package's own metadata ask for, and what is there: required, and by extra."""
    required, extras = dict[str, Any](), dict[str, dict[str, Any]]()
    for asked in map(Requirement, requires(PACKAGE) or ()):
        marker = str(asked.marker or "")
        if "extra" not in marker:
            required[asked.name] = _present(asked)
        elif asked.marker:
            extra = marker.rpartition("extra == ")[2].strip("\"')")
            if extra != "dev" and asked.marker.evaluate({"extra": extra}):
                extras.setdefault(extra, {})[asked.name] = _present(asked)
    return required, extras


def _present(asked: Requirement) -> dict[str, Any]:
    try:
        found = version(asked.name)
    except PackageNotFoundError:
        found = None
    fits = found is not None and asked.specifier.contains(found, prereleases=True)
    return {"version": found, "wanted": str(asked.specifier) or "any", "ok": fits}


def _tried(part: Any) -> Any:
    try:
        return part()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _devices() -> dict[str, Any]:
    devices = importlib.import_module("unforget.core.devices")
    gib = {name: [size and _gib(size) for size in devices.room(name)] for name in devices.there()}
    return {name: {"name": devices.spoken(name), "free_gib": g[0], "memory_gib": g[1]} for name, g in gib.items()}


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    folder = Path(constants.HF_HUB_CACHE)
    return {
        "endpoint": constants.ENDPOINT, "token": get_token() is not None, "offline": constants.HF_HUB_OFFLINE,
        "cache": str(folder), "free_gib": _gib(_free(folder)),
    }  # fmt: skip


def _cache() -> dict[str, Any]:
    found = importlib.import_module("unforget.files.cache").state()
    sizes = {"gib": found.pop("bytes"), "limit_gib": found.pop("limit")}
    return {**found, **{name: round(size / GIB, 2) for name, size in sizes.items()}}


def _free(folder: Path) -> int:
    """Bytes free where a folder is or would be made."""
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists() and os.access(p, os.X_OK))).free


def _gib(size: int) -> float:
    return round(size / GIB, 1)
