"""`show`: what a file or folder says of itself."""

from pathlib import Path

from unforget.config import run_folder
from unforget.exports.show import Shown, look


def show(path: Path) -> Shown:
    """Where a patch or an export came from; UsageError if it cannot be read, or says nothing."""
    return look(path, run_folder(path) / "verify.json")
