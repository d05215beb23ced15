"""What can go wrong, as one sentence and a way out, and the exit code that says so."""

import enum
import os
import re


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


HIDDEN = "***"
"""What stands in a message where a secret stood."""
_SECRETS = (
    (re.compile(r"(?i)\b(bearer|authorization\W+basic)\s+[^\s'\",]+"), rf"\1 {HIDDEN}"),
    (re.compile(r"(://)[^/\s@]*@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(https?://[^\s?'\"]+\?)[^\s'\"]+"), rf"\1{HIDDEN}"),  # signed addresses of storage
    (re.compile(r"\b(?:hf_(?:jwt_|oauth_)?|api_org_)[A-Za-z0-9]{6,}[\w.-]*|\beyJ[\w-]+\.[\w-]+\.[\w-]+"), HIDDEN),
)


def redacted(text: str, *secrets: str | None) -> str:
    """The text without secrets, those of the environment included, and without what looks like a token or password."""
    known = [*secrets, *(os.environ.get(n) for n in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "UNFORGET_SALT"))]
    for secret in sorted(filter(None, known), key=len, reverse=True):
        for form in (secret, repr(secret)[1:-1]):
            text = text.replace(form, HIDDEN)
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text
