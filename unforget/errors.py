"""What can go wrong, as one sentence and a way out, and the exit code that says so."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """What a shell script learns from `unforget`."""

    OK = 0
    """Done, or every target is forgotten and the rest is kept."""
    FAILED = 1
    """A target is still reproduced, or something else was lost."""
    USAGE = 2
    """A wrong option, file or configuration."""
    CANNOT_RUN = 3
    """Loading failed, a digest does not match, the loss is NaN, memory ran out."""
    INCONCLUSIVE = 4
    """The base does not reproduce the target, or there is too little evidence."""
    INTERRUPTED = 130
    """Stopped by the user (SIGINT)."""
    TERMINATED = 143
    """Told to stop (SIGTERM)."""


class UnforgetError(Exception):
    """A failure that is the user's to act on.

    Args:
        message: The thing, what was found, what was expected.
        hint: What to do next.
    """

    code = ExitCode.CANNOT_RUN

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class UsageError(UnforgetError):
    """A wrong option, file or configuration: nothing was started."""

    code = ExitCode.USAGE


class CannotRun(UnforgetError):
    """The request is sound but cannot be carried out."""


class Interrupted(UnforgetError):
    """Stopped by the user."""

    code = ExitCode.INTERRUPTED


class Terminated(UnforgetError):
    """Told to stop."""

    code = ExitCode.TERMINATED


class NothingChanged(UnforgetError):
    """The run ended and the model still says what it said."""

    code = ExitCode.FAILED
