"""Which device computes: by name, or the first accelerator that is there."""

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from unforget.errors import UsageError

ACCELERATORS = ("cuda", "mps", "xpu")
"""In the order in which `auto` takes them."""


def chosen(name: str) -> str:
    """The device that a name means; `auto` is the first accelerator that torch has here, else the CPU.

    UsageError if torch has no such device here: the sentence names those that it has.
    """
    if name == "auto":
        return next((kind for kind in ACCELERATORS if _count(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= _count(device.type):
        raise UsageError(f"torch has no device '{name}' here", f"Give --device auto, {', '.join(there())}.")
    return name


def spoken(name: str) -> str:
    """A device as people know it: the card's own name where torch can tell it."""
    tell = getattr(getattr(torch, torch.device(name).type), "get_device_name", None)
    return f"{name} ({tell(name)})" if tell else name


def machine(name: str) -> list[object]:
    """What the last bits of a sum depend on, beside the numbers: processor, threads, card, and how it multiplies."""
    tell = getattr(getattr(torch, torch.device(name).type), "get_device_name", None)
    return [
        platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), torch.device(name).type,
        tell(name) if tell else "", torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
    ]  # fmt: skip


def room(name: str) -> tuple[int, int]:
    """Bytes that are free on a device, and all that it has; 0 where nobody can tell."""
    if (kind := torch.device(name).type) == "cuda":
        free, every = torch.cuda.mem_get_info(name)
        return int(free), int(every)
    if kind != "cpu" or not hasattr(os, "sysconf"):
        return 0, 0
    free, every = (os.sysconf(n) * os.sysconf("SC_PAGE_SIZE") for n in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    with suppress(OSError):  # Linux tells how much the disk's cache would give back, too
        said = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(said[1]) * 1024 if said else free
    return free, every


def memory(name: str) -> int:
    """Bytes that this process may have of a card's memory, with what it has; 0 where torch cannot tell."""
    device = torch.device(name)
    if device.type != "cuda":
        return 0
    return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))


def _count(kind: str) -> int:
    """How many devices of a kind torch can use here."""
    if kind == "mps":  # torch 2.6 has no torch.mps.is_available
        return int(torch.backends.mps.is_available())
    module: Any = getattr(torch, kind, None)
    return int(module.device_count()) if hasattr(module, "device_count") and module.is_available() else 0


def there() -> list[str]:
    """Names of all devices."""
    counts = {kind: _count(kind) for kind in ("cpu", *ACCELERATORS)}
    several = (f"{kind}:{i}" for kind, n in counts.items() if n > 1 for i in range(n))
    return [*(kind for kind, n in counts.items() if n), *several]
