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
from unforget.files.storage import BadFile, Digested, Lazy, open_tensors, undamaged

WRONG = "Give a patch, an export, or a .safetensors file."


@dataclass(frozen=True)
class Shown:
    """What was found: of which kind (`file` is somebody else's), and all that it says, for JSON."""

    kind: Literal["patch", "export", "file"]
    said: dict[str, Any]


def look(path: Path, report: Path) -> Shown:
    """What a file or folder says of itself; UsageError if it cannot be read, or says nothing.

    `report` is where that of `unforget verify` lies for a patch, if there is one.
    """
    if path.is_dir():
        if (made := families.hints(path).made) is not None:
            return Shown("export", _manifest(made, path))
        path = next((path / name for name in (LORA, PEFT) if (path / name).is_file()), path)
    if not path.is_file():
        raise UsageError(f"'{path}' is no file, and no folder that `unforget export` wrote", WRONG)
    try:
        opened = open_tensors(path)
        if PATCH in opened.metadata:
            return Shown("patch", _patch(path, report))
        content = _content(opened.tensors)
        if HEADER in opened.metadata:
            return Shown("export", {**_manifest(opened.metadata[HEADER], path), **content})
        digested = Digested()
        for name, lazy in opened.tensors.items():
            digested.add(name, lazy.make())
        return Shown("file", {"metadata": opened.metadata, **content, "digest": digested.hexdigest()})
    except BadFile as error:
        raise UsageError(str(error), WRONG) from None
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error.strerror}", WRONG) from None


def _manifest(value: Any, path: Path) -> dict[str, Any]:
    try:
        said = undamaged(json.loads(value) if isinstance(value, str) else value, always=False)
        return ExportManifest.model_validate(said).model_dump(mode="json")
    except ValidationError as error:
        where = ".".join(str(p) for p in error.errors()[0]["loc"]) or "its header"
        raise UsageError(f"'{path}' is not an export of this version: {where}", WRONG) from None
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, BadFile) else "its header is no JSON"
        raise UsageError(f"what '{path}' says of itself cannot be read: {reason}", WRONG) from None


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
