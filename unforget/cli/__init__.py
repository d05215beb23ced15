"""The command line: parse, call, print, exit code. Heavy imports stay inside bodies, so that --help is quick."""

import os
import sys
from pathlib import Path
from typing import Any

from unforget.cli import ending

__all__ = ["app", "main"]


def main() -> None:
    """The console script."""
    ending.guarded(_run)


def _run() -> None:
    if ending.PROCESS:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (of several processes one speaks)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    from unforget.cli.commands import app
    from unforget.cli.console import tame_libraries

    tame_libraries()
    app()


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'unforget.cli' has no attribute '{name}'")
    from unforget.cli.commands import app

    return app
