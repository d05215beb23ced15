"""The secret by which this user knows what this user wrote, and folders that are the user's alone."""

import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

LENGTH = 32


def user_folder(variable: str, below_home: str) -> Path | None:
    """A folder of the user's own by the XDG names; None for a user who has no home (`docker run --user 1234`)."""
    if given := os.environ.get(variable):
        return Path(given)
    try:
        home = Path.home()
    except (RuntimeError, KeyError):
        return None
    return home / below_home if home != Path("/") or os.access(home, os.W_OK) else None


def own_folder(folder: Path, ours: Callable[[str], object] = lambda name: True) -> None:
    """Make a folder that is the user's alone; OSError if somebody else may put files there.

    The rights of one that is there are changed only if all that it holds is ours: it may be /tmp.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if stat.S_IMODE(found.st_mode) & 0o077 and _ours(found) and all(ours(path.name) for path in folder.iterdir()):
        folder.chmod(0o700)
    elif not _ours(found) or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
        raise PermissionError(f"others may write into '{folder}'")


def secret() -> bytes | None:
    """That of `$UNFORGET_CACHE_KEY`, for machines that share a cache, else of a file in the user's state folder.

    The file is made where there is none; a file that others may read or write is no secret, and is replaced. None, if
    there is no place for one.
    """
    if given := os.environ.get("UNFORGET_CACHE_KEY"):
        return hashlib.sha256(os.fsencode(given)).digest()
    state = user_folder("XDG_STATE_HOME", ".local/state")
    if state is None:
        return None
    path = state / "unforget" / "cache.key"
    try:
        own_folder(path.parent)
        return _read(path) or _made(path)
    except OSError:
        return None


def _read(path: Path) -> bytes | None:
    """What the file holds, if it is one that nobody else had a hand in."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    except OSError:  # a link
        path.unlink()
        return None
    with os.fdopen(number, "rb") as file:
        found = os.fstat(number)
        content = file.read(LENGTH + 1) if stat.S_ISREG(found.st_mode) else b""
        private = _ours(found) and not (os.name == "posix" and stat.S_IMODE(found.st_mode) & 0o077)
    if private and len(content) == LENGTH:
        return content
    path.unlink()
    return None


def _made(path: Path) -> bytes | None:
    """A new one; of several processes that make one at a time, all get that of the first."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    number = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(number, "wb") as file:
        file.write(secrets.token_bytes(LENGTH))
    try:
        os.link(beside, path)  # the first one counts
    except FileExistsError:
        pass
    finally:
        beside.unlink()
    return _read(path)


def _ours(found: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
