"""An export is written beside its place and moved there when it is whole and checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unforget.errors import CannotRun, UsageError

OURS = ("model_index.json", "adapter_config.json", "pytorch_lora_weights.safetensors")
"""A folder that holds one of them is a model, which --force may replace."""
SPARE = 2**20
"""Bytes for what is written beside the tensors."""


def replaceable(output: Path, inputs: Sequence[Path]) -> None:
    """Refuse a place whose content is not to be lost, whatever the user forces.

    Raises:
        UsageError: If it holds what is read here, or is a folder that is no model.
    """
    place = output.resolve()
    for path in inputs:
        if path.exists() and (path.resolve() == place or place in path.resolve().parents):
            raise UsageError(f"'{output}' would replace '{path}', which is read", "Give another --output.")
    if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in OURS):
        raise UsageError(f"the folder '{output}' holds something that is no model", "Give another --output.")


def room(output: Path, needed: int) -> None:
    """Refuse what does not fit on the disk, before any of it is written.

    Raises:
        CannotRun: With both figures.
    """
    free = shutil.disk_usage(output.parent).free
    if needed + SPARE > free:
        raise CannotRun(
            f"the export takes {_size(needed)}, the disk of '{output}' has {_size(free)} left",
            "Make room, or give an --output on another disk.",
        )


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """An empty folder beside the output, on the same disk, that is gone afterwards whatever happens."""
    work = output.with_name(f".{output.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def place(made: Path, output: Path) -> None:
    """Move a whole export to its place. What was there goes only when the new one stands."""
    for file in [made] if made.is_file() else [f for f in made.rglob("*") if f.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if not output.exists() or (output.is_file() and made.is_file()):
        os.replace(made, output)
        return
    before = made.with_name("before")
    os.replace(output, before)
    try:
        os.replace(made, output)
    except BaseException:
        os.replace(before, output)
        raise
