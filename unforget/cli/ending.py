"""How the program ends, whatever happens: a sentence, a way out, an exit code that is never somebody else's.

Next to nothing is imported here, so that signals are heard at once, and all this works while the rest is still being
imported, or cannot be.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from unforget import __version__
from unforget.errors import ExitCode, Interrupted, Terminated, UnforgetError, is_full, launched, printable, redacted

PROCESS = launched()[0] if launched()[1] > 1 else 0
"""Which of several processes this is; the first one alone speaks, but for errors."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LONGEST = 1000  # characters of a sentence
LESS_MEMORY = "Give a smaller --micro-batch; a run of `unlearn` goes on with --resume."
BUG = "this is a bug in unforget; please report it"
_asked: list[int] = []
"""The signals that came."""


def guarded(main: Callable[[], object]) -> NoReturn:
    """Run the program and end with its exit code, or with that of what stopped it."""
    for number in range(3):  # a stream that who started us closed: else a file that is written would be it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout, sys.stderr = (_lasting(stream) for stream in (sys.stdout, sys.stderr))
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _ask)
    sys.unraisablehook = _again
    code: Any = 0
    try:
        main()
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        code = told(error)
    for number in SIGNALS:  # what was said counts: nothing stops the way out
        signal.signal(number, signal.SIG_IGN)
    if code == ExitCode.INTERRUPTED and _asked and _asked[-1] != signal.SIGINT:  # typer knows but one signal
        code = ExitCode.TERMINATED
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            code = code or told(error)
    sys.stdout = sys.stderr  # what libraries say as the process ends is no result
    sys.exit(code)


def told(error: BaseException, *, as_json: bool = False) -> int:
    """Say in a sentence what went wrong, and on stdout for machines; returns the exit code."""
    found = _explained(error)
    where = f"process {PROCESS}: " if PROCESS else ""
    bold = ("\x1b[1;31m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    sentence = line(redacted(found.message))
    text = f"{bold[0]}error:{bold[1]} {where}{sentence}\n"
    if found.hint:
        text += f"  {line(found.hint)}\n"
    if os.environ.get("UNFORGET_DEBUG") == "1":
        text = _traceback(error) + text
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
        if as_json:
            said = {"error": sentence, "hint": line(found.hint), "exit_code": int(found.code)}
            sys.stdout.write(json.dumps(said, indent=2) + "\n")
    except OSError:
        pass  # nobody can be told; the code remains
    return found.code


def line(text: str) -> str:
    """A sentence as it may be printed, on one line, and cut where a file puts a page into it."""
    found = printable(re.sub(r"\s*[\r\n]\s*", " ", text))
    return found if len(found) <= LONGEST else found[: LONGEST - 3] + "..."


def _explained(error: BaseException) -> UnforgetError:
    """What went wrong, as the user is told."""
    if isinstance(error, UnforgetError):
        return error
    if _asked or isinstance(error, KeyboardInterrupt):  # libraries make other errors of an interrupt
        told_to = _asked and _asked[-1] != signal.SIGINT
        return Terminated("told to stop") if told_to else Interrupted("interrupted")
    if is_full(error):
        return UnforgetError("out of memory", LESS_MEMORY)
    if isinstance(error, OSError):
        what = f"{error.strerror or error}" + (f": '{Path(str(error.filename)).name}'" if error.filename else "")
        return UnforgetError(f"cannot read or write: {what}", "Check the disk and the permissions.")
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UnforgetError(f"{BUG} ({said})", _kept(error))


def _kept(error: BaseException) -> str:
    """Keep the traceback in a file of the user's own; a sentence that names it."""
    import platform
    import tempfile

    try:
        number, name = tempfile.mkstemp(prefix="unforget-crash-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"unforget {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
            file.write(_traceback(error))
    except OSError as full:
        return f"Its traceback could not be kept ({full.strerror}): UNFORGET_DEBUG=1 prints it."
    return f"Its traceback is in '{name}'; look for what is private before you send it."


def _traceback(error: BaseException) -> str:
    """Without tokens, and without the user's name where that is in the path of the home folder."""
    import traceback

    home = str(Path("~").expanduser()) if "HOME" in os.environ else ""
    lines = "".join(traceback.format_exception(error)).splitlines()
    text = redacted("\n".join(printable(found) for found in lines)) + "\n"
    return text.replace(home, "~") if len(home) > 1 else text


def _ask(number: int, frame: FrameType | None) -> NoReturn:
    _asked.append(number)
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # C++ that calls Python while a library is imported aborts the process on any exception: end without one.
            code = int(ExitCode.TERMINATED)
            try:
                code = told(KeyboardInterrupt())
            finally:
                os._exit(code)
        frame = frame.f_back
    raise KeyboardInterrupt


def _again(lost: sys.UnraisableHookArgs) -> None:
    """An interrupt that came where Python can raise nothing (as in `__del__`) comes once more."""
    if isinstance(lost.exc_value, KeyboardInterrupt) and _asked:
        signal.raise_signal(_asked[-1])
    elif os.environ.get("UNFORGET_DEBUG") == "1":
        sys.__unraisablehook__(lost)


class _Lasting(io.TextIOWrapper):
    """A stream that goes on when its reader has left, or its disk is full: from then on into nothing.

    A full disk is still an error, once; a reader that has seen enough is none.
    """

    def write(self, text: str) -> int:
        return self._tried(super().write, text) or 0

    def flush(self) -> None:
        self._tried(super().flush)

    def _tried(self, do: Callable[..., Any], *given: str) -> Any:
        try:
            return do(*given)
        except OSError as error:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            if not isinstance(error, BrokenPipeError):
                raise


def _lasting(stream: Any) -> Any:
    """The stream so, and in whatever encoding it has: what that lacks becomes a code."""
    if not isinstance(stream, io.TextIOWrapper):  # closed by who started us
        return Path(os.devnull).open("w")
    encoding, at_once = stream.encoding, stream.line_buffering
    return _Lasting(stream.detach(), encoding, "backslashreplace", line_buffering=at_once)
