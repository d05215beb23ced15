"""How far a command is, on stderr: a bar where that is a terminal, else a plain line now and then."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from unforget.cli.console import duration, err
from unforget.cli.ending import PROCESS, line
from unforget.core.types import Progress
from unforget.errors import redacted

LONGEST, SHARE, SHORTEST = 30.0, 0.1, 1.0
"""Seconds after which there is a line, the share of a stage after which there is one, and seconds between two."""
FIGURES = ("forget", "retain", "cosine", "margin")
WIDE = 110  # columns from which on a bar has room for figures, too


class ConsoleProgress(Progress):
    """Shows on stderr how far a function of this package is: `with ConsoleProgress() as p: unlearn(config, p)`.

    On a terminal it is a bar, elsewhere a line every 30 s or 10 % of a stage, one a second at most. `quiet` leaves
    nothing but notes; `verbose` gives a line for whatever is done, with the figures of training.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        silent = quiet or PROCESS > 0
        self._shown = _Nothing() if silent else _Bar(verbose) if err.is_terminal else _Lines(verbose)
        super().__init__(self._shown.stage, self._shown.advance, _note)

    def __enter__(self) -> Self:
        self._shown.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.stop()


def _note(sentence: str) -> None:
    err.print(f"note: {escape(line(redacted(sentence)))}", style="yellow", soft_wrap=True)


def _figures(found: dict[str, Any]) -> str:
    return "  ".join(f"{name} {found[name]:.3g}" for name in FIGURES if name in found)


class _Nothing:
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def stage(self, title: str, total: int) -> None: ...
    def advance(self, n: int = 1, **figures: Any) -> None: ...


class _Bar(_Nothing):
    """A row a stage; where the terminal is narrow, figures give way first, and names are cut before counts are."""

    def __init__(self, verbose: bool) -> None:
        self._figures = verbose or err.width >= WIDE
        kept = Column(no_wrap=True)
        self._bar = Bar(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            MofNCompleteColumn(table_column=kept), TimeRemainingColumn(table_column=kept),
            TextColumn("{task.fields[figures]}", table_column=kept), console=err, expand=not self._figures,
        )  # fmt: skip

    def start(self) -> None:
        self._bar.start()
        self._task = self._bar.add_task("loading", total=None, figures="")

    def stop(self) -> None:
        self._bar.stop()

    def stage(self, title: str, total: int) -> None:
        if self._bar.tasks[-1].total is None:  # how long loading takes is known when it is over
            self._bar.update(self._task, total=1, completed=1)
        self._task = self._bar.add_task(title, total=total, figures="")

    def advance(self, n: int = 1, **figures: Any) -> None:
        shown = _figures(figures) if self._figures else ""
        self._bar.update(self._task, advance=n, total=figures.get("of"), figures=shown)


class _Lines(_Nothing):
    """Looks once a second whether there is something to say; work only counts, so that silence is told, too."""

    def __init__(self, verbose: bool) -> None:
        self._verbose, self._over = verbose, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._said = time.monotonic()
        self.stage("loading", 0)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def stage(self, title: str, total: int) -> None:
        self._now = _Stage(title, total)

    def advance(self, n: int = 1, **figures: Any) -> None:
        self._now.done += n
        self._now.total = figures.get("of") or self._now.total
        self._now.figures = figures

    def _watch(self) -> None:
        while not self._over.wait(SHORTEST):
            if text := self.look(time.monotonic()):
                with suppress(OSError):  # nobody can be told
                    err.print(escape(text), soft_wrap=True)

    def look(self, now: float) -> str:
        """The line that is due at a time in seconds, or none."""
        stage = self._now
        least = 1 if self._verbose else max(1, SHARE * stage.total)
        due = stage.said is None or stage.done - stage.said >= least or now - self._said >= LONGEST
        if not due:
            return ""
        self._said, stage.said = now, stage.done
        return stage.line(now) + (f"; {_figures(stage.figures)}" if self._verbose and stage.figures else "")


class _Stage:
    """What is done of a stage, and since when; a run that goes on begins with what was done."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.figures = title, total, 0, dict[str, Any]()
        self.said: int | None = None  # units at the last line
        self._first: tuple[float, int] | None = None

    def line(self, now: float) -> str:
        """Name, n of m, time left."""
        self._first = self._first or (now, self.done)
        begun, before = self._first
        if not self.total:
            return self.title + (f", for {duration(now - begun)}" if now > begun else "")
        if self.done > self.total:  # foretold was the least
            return f"{self.title}: {self.done:,} of {self.total:,} or more"
        text = f"{self.title}: {self.done:,} of {self.total:,}"
        if self.done == before:
            return text
        return f"{text}, {duration((now - begun) / (self.done - before) * (self.total - self.done))} left"
