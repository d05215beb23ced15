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
    """Told to stop (SIGTERM, or SIGHUP when its terminal is gone)."""


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


_FULL = re.compile(
    r"out of memory|allocate memory|ALLOC_FAILED|bad_alloc"
    r"|could not (create|execute) a primitive(?! desc)",  # oneDNN's, of a convolution that gets no room
    re.IGNORECASE,
)


def is_full(error: BaseException) -> bool:
    """Whether there was no memory left."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_FULL.search(str(error))))


def launched() -> tuple[int, int]:
    """Which of several processes this is, and how many there are, as a launcher says; 0 and 1 where none says it."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return (int(rank), int(size)) if re.fullmatch(r"\d{1,9} [1-9]\d{0,8}", f"{rank} {size}", re.ASCII) else (0, 1)


SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "UNFORGET_SALT", "UNFORGET_CACHE_KEY")
"""Variables of the environment that hold one."""
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
    known = [*secrets, *(os.environ.get(n) for n in SECRETS)]
    for secret in sorted(filter(None, known), key=len, reverse=True):
        for form in (secret, repr(secret)[1:-1]):
            text = text.replace(form, HIDDEN)
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


_ODD = re.compile(
    "[^\t\n\x20-\x7e\xa0-\u061b\u061d-\u200a\u200c\u200d\u2010-\u2027\u202f-\u205f\u2070-\ud7ff\ue000-\ufefe"
    "\uff00-\ufff8\ufffc\ufffd\U00010000-\U000dffff]"
)
_COMMAND = re.compile(r":(?=:[A-Za-z])|#(?=#\w*\\?\[)|_(?=(?:start|end):\d)")
"""Where a command begins that CI systems read from a log: `::error::`, `##[error]`, `##vso[`, `section_start:1:`; a
bracket may be escaped for rich already."""


def printable(text: str) -> str:
    """The text as it may go to a terminal, a log or a report: nothing in it commands any of them.

    A code stands for each character that XML forbids, that controls, that is not seen, or that turns the reading
    direction, and for one of a command of a CI system. Lines and tabs stay. JSON stays the same JSON.
    """
    text = _ODD.sub(lambda odd: _code(odd[0]), text.replace("\r\n", "\n"))
    return _COMMAND.sub(lambda found: _code(found[0]), text)


def _code(character: str) -> str:
    return f"\\u{ord(character):04x}" if character <= "\uffff" else f"\\U{ord(character):08x}"
