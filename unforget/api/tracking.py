"""`--report-to`: a tracker hears of each update, too, by accelerate's classes, as from diffusers' scripts."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from unforget.config import UnlearnConfig
from unforget.core.types import Progress
from unforget.errors import CannotRun

PROJECT = "unforget"


@contextmanager
def tracked(config: UnlearnConfig, progress: Progress) -> Iterator[Progress]:
    """Progress of which figures go to the tracker that a run names; nothing else of the run does.

    CannotRun if its package is missing. Nothing is written before the first update.
    """
    if config.report_to is None:
        yield progress
        return
    kind = _kind(config.report_to)
    with ExitStack() as opened:

        @functools.cache
        def tracker() -> Any:
            PartialState(cpu=config.device == "cpu")  # which its methods ask whether this process speaks
            at = {"logging_dir": config.folder / "logs"} if kind.requires_logging_directory else {}
            made = kind(PROJECT, **at)
            getattr(made, "start", int)()  # what older accelerate does as it is made
            opened.callback(made.finish)
            return made

        def advance(n: int = 1, **figures: Any) -> None:
            progress.advance(n, **figures)
            if "step" in figures:
                tracker().log({k: v for k, v in figures.items() if k not in ("step", "of")}, step=figures["step"])

        yield Progress(progress.stage, advance, progress.note)


def _kind(name: str) -> Any:
    found = LOGGER_TYPE_TO_CLASS.get(name)
    if found is None or find_spec(name) is None:
        raise CannotRun(f"--report-to {name} needs the package {name}", f"Run `pip install {name}`.")
    return found
