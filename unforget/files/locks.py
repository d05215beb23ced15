"""Whose turn it is to write: two processes that write one output would lose the work of one, or of both."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from unforget.errors import UsageError, launched

try:
    import fcntl
except ImportError:  # Windows: there nobody is kept out
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def claimed(outputs: Sequence[Path]) -> Iterator[None]:
    """Hold outputs for as long as the work takes; UsageError if another process does. It is let go however this one
    ends; of several processes of one launch the first holds them for all.
    """
    rank, processes = launched()
    if processes > 1 and rank:
        yield
        return
    with contextlib.ExitStack() as held:
        for path in outputs:
            held.enter_context(_held(path))
        yield


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    lock = path.with_name(f".{path.name}.lock")
    number = _locked(lock, path) if fcntl else None
    try:
        yield
    finally:
        if number is not None:
            lock.unlink(missing_ok=True)
            os.close(number)


def _locked(lock: Path, path: Path) -> int | None:
    """An open file that is locked; None where the file system has no locks."""
    while True:
        number = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
            raise UsageError(f"another process is writing '{path}'", "Wait for it, or give another output.") from None
        except OSError:
            os.close(number)
            return None
        with contextlib.suppress(FileNotFoundError):  # who held it may have removed it since it was opened
            if lock.stat().st_ino == os.fstat(number).st_ino:
                return number
        os.close(number)
