"""The command line: parse, call, print, exit code. Heavy imports stay inside bodies, so that --help is quick."""

import os
import sys
from pathlib import Path

from unforget.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0":
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (of several processes one speaks)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    sys.exit(app())
