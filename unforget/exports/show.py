"""What a file or folder says of itself: a patch, an export, or anybody's safetensors file."""

import contextlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from unforget import families
from unforget.errors import UsageError
from unforget.exports.manifest import HEADER, ExportManifest, Verified
from unforget.families.parts import LORA, PEFT
from unforget.files.patch import HEADER as PATCH
from unforget.files.patch import Patch
from unforget.files.storage import SEAL, BadFile, Digested, Lazy, Opened, check_seal, open_tensors, undamaged

WRONG = "Give a patch, an export, or a .safetensors file."
COPY = "Copy it again, or export again."


@dataclass(frozen=True)
class Shown:
    """What was found: of which kind (`file` is somebody else's), and all that it says, for JSON."""

    kind: Literal["patch", "export", "file"]
    said: dict[str, Any]


def look(path: Path, report: Path) -> Shown:
    """What a file or folder says of itself; UsageError if it cannot be read, or says nothing.

    `report` is where that of `unforget verify` lies for a patch, if there is one.
    """
    folder, path = _places(path)
    try:
        if folder and (made := families.hints(folder).made) is not None:
            return Shown("export", _manifest(made, folder, folder, True))
        if not path.is_file():
            raise UsageError(f"'{path}' is no file, and no folder that `unforget export` wrote", WRONG)
        opened = _sealed(path)
        if PATCH in opened.metadata:
            return Shown("patch", _patch(path, report))
        content = _content(opened.tensors)
        if HEADER in opened.metadata:
            said = _manifest(opened.metadata[HEADER], path, folder, SEAL in opened.metadata)
            return Shown("export", {**said, **content})
        digested = Digested()
        for name, lazy in opened.tensors.items():
            digested.add(name, lazy.make())
        return Shown("file", {"metadata": opened.metadata, **content, "digest": digested.hexdigest()})
    except BadFile as error:
        raise UsageError(str(error), WRONG) from None
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error.strerror}", WRONG) from None


def damage(path: Path) -> str:
    """What of an export is no longer as it was written, in a sentence; empty if nothing is, or of somebody else's."""
    folder, path = _places(path)
    try:
        if folder and (made := families.hints(folder).made) is not None:
            _manifest(made, folder, folder, True)
        elif path.is_file() and HEADER in (metadata := _sealed(path).metadata):
            _manifest(metadata[HEADER], path, folder, SEAL in metadata)
    except (BadFile, UsageError) as error:
        return str(error)
    return ""


def _places(path: Path) -> tuple[Path | None, Path]:
    """A folder, if it is one, and the file that speaks for it."""
    if not path.is_dir():
        return None, path
    return path, next((path / name for name in (LORA, PEFT) if (path / name).is_file()), path)


def _sealed(path: Path) -> Opened:
    """What a file holds; BadFile if it has a seal that is broken."""
    opened = open_tensors(path)
    if SEAL in opened.metadata:  # whatever else is in it
        check_seal(path)
    return opened


def _manifest(value: Any, path: Path, folder: Path | None, sealed: bool) -> dict[str, Any]:
    """What an export says of itself, and is; UsageError for a damaged one.

    Only of a whole folder is it known what lies beside it.
    """
    try:
        said = undamaged(json.loads(value) if isinstance(value, str) else value, always=False)
        found = ExportManifest.model_validate(said)
        if found.sealed and not sealed:
            raise BadFile("it has lost its seal")
        if folder:
            found.check_files(folder)
        return found.model_dump(mode="json", exclude={"sealed", "files"})
    except ValidationError as error:
        where = ".".join(str(p) for p in error.errors()[0]["loc"]) or "its header"
        raise UsageError(f"'{path}' is not an export of this version: {where}", WRONG) from None
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, BadFile) else "its header is no JSON"
        raise UsageError(f"'{path}' is not what it says of itself: {reason}", COPY) from None


def _patch(path: Path, report: Path) -> dict[str, Any]:
    """What a patch says, and what `unforget verify` said of it."""
    patch, verified = Patch.load(path), None
    with contextlib.suppress(UsageError):  # there is none, or it is not one
        verified = Verified.of(report).model_dump(mode="json")
    content = _content({name: Lazy.of(t) for name, t in patch.tensors.items()})
    return {**patch.provenance.model_dump(mode="json"), **content, "verified": verified}


def _content(tensors: dict[str, Lazy]) -> dict[str, Any]:
    """How much there is: tensors, and numbers by their type."""
    numbers: Counter[str] = Counter()
    for lazy in tensors.values():
        numbers[str(lazy.dtype).removeprefix("torch.")] += math.prod(lazy.shape)
    return {"tensors": len(tensors), "numbers": dict(numbers)}
