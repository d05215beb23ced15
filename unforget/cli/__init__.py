"""The command line: parse, call, print, exit code. Heavy imports stay inside bodies, so that --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from unforget.cli import edit, export, unlearn, verify  # noqa: F401  (each adds its command, in this order)
from unforget.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (of several processes one speaks)
    quiet: Callable[[str, str], str] = os.environ.setdefault
    quiet("TRANSFORMERS_VERBOSITY", "error")
    quiet("DIFFUSERS_VERBOSITY", "error")
    sys.exit(app())
