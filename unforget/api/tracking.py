"""`--report-to`: a tracker hears of each update, too, by accelerate's classes, as from diffusers' scripts."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from unforget.config import UnlearnConfig
from unforget.core.types import Progress
from unforget.errors import CannotRun
from unforget.families.safety import reason

PROJECT = "unforget"


@contextmanager
def tracked(config: UnlearnConfig, progress: Progress) -> Iterator[Progress]:
    """Progress of which figures go to the tracker that a run names; nothing else of the run does.

    CannotRun if its package is missing, or does not open. Nothing is written before the first update. A tracker that
    fails later ends no run: a note says so, and the log of the run has all figures.
    """
    if config.report_to is None:
        yield progress
        return
    kind = _kind(config.report_to)
    failed = list[str]()
    with ExitStack() as opened:

        @functools.cache
        def tracker() -> Any:
            PartialState(cpu=config.device == "cpu")  # which its methods ask whether this process speaks
            at = {"logging_dir": config.folder / "logs"} if kind.requires_logging_directory else {}
            made = kind(PROJECT, **at)
            getattr(made, "start", int)()  # what older accelerate does as it is made
            opened.callback(_alone(failed)(made.finish))
            return made

        def advance(n: int = 1, **figures: Any) -> None:
            progress.advance(n, **figures)
            if "step" in figures and not failed:
                with _alone(failed):
                    tracker().log({k: v for k, v in figures.items() if k not in ("step", "of")}, step=figures["step"])
                for why in failed:
                    progress.note(f"{config.report_to} hears no more of this run: {why}")

        yield Progress(progress.stage, advance, progress.note)


@contextmanager
def _alone(failed: list[str]) -> Iterator[None]:
    """Keep to itself what a tracker raises."""
    try:
        yield
    except Exception as error:  # whatever its service or its disk does
        failed.append(reason(error))


def _kind(name: str) -> Any:
    found = LOGGER_TYPE_TO_CLASS.get(name)
    if found is None or find_spec(name) is None:
        raise CannotRun(f"--report-to {name} needs the package {name}", f"Run `pip install {name}`.")
    try:
        import_module(name)
    except Exception as error:  # of its own dependencies
        raise CannotRun(f"the package {name} does not open: {reason(error)}", f"Install {name} again.") from error
    return found
