"""`show`: what a file or folder says of itself."""

from pathlib import Path

from unforget.config import run_folder
from unforget.exports.show import Shown, look


def show(path: str | Path) -> Shown:
    """Where a patch or an export came from: `said` holds base, targets, recipe, verdict and versions, as JSON would.

    UsageError if it cannot be read, is damaged, or says nothing.
    """
    path = Path(path)
    return look(path, run_folder(path) / "verify.json")
