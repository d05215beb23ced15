"""An export is written beside its place and moved there when it is whole and checked."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from unforget.errors import CannotRun, UsageError
from unforget.families.parts import INDEX, LORA, PEFT_CONFIG

OURS = (INDEX, PEFT_CONFIG, LORA)
"""A folder that holds one of them is a model, which --force may replace."""
SPARE = 2**20
"""Bytes for what is written beside the tensors."""


def check_replaceable(output: Path, inputs: Sequence[Path]) -> None:
    """UsageError for a place whose content is not to be lost, whatever the user forces: inputs, or no model."""
    place = output.resolve()
    for path in inputs:
        if path.exists() and (path.resolve() == place or place in path.resolve().parents):
            raise UsageError(f"'{output}' would replace '{path}', which is read", "Give another --output.")
    if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in OURS):
        raise UsageError(f"the folder '{output}' holds something that is no model", "Give another --output.")


def check_room(output: Path, needed: int) -> None:
    """CannotRun, before any of it is written, for what does not fit on the disk."""
    free = shutil.disk_usage(output.parent).free
    if needed + SPARE > free:
        raise CannotRun(
            f"the export takes {needed / 1e6:,.1f} MB, the disk of '{output.name}' has {free / 1e6:,.1f} MB left",
            "Make room, or give an --output on another disk.",
        )


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A path for a file or folder, in a working folder on the output's disk, of which nothing stays."""
    work = output.with_name(f".{output.name}.partial")
    if work.is_symlink() or not work.is_dir():
        work.unlink(missing_ok=True)  # of a pipe rmtree would wait for a writer
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work / output.name
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def atomic_export(output: Path) -> Iterator[Path]:
    """A path as `scratch` gives, that takes the output's place at the end.

    Whatever stops the writer, what was there before stays; it goes only when the new one stands.
    """
    with scratch(output) as made:
        yield made
        _place(made, output, made.with_name(".before"))


def _place(made: Path, output: Path, before: Path) -> None:
    for file in [made] if made.is_file() else [f for f in made.rglob("*") if f.is_file()]:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if not output.exists() or (output.is_file() and made.is_file()):
        os.replace(made, output)
        return
    os.replace(output, before)
    try:
        os.replace(made, output)
    except BaseException:
        os.replace(before, output)
        raise
