"""What a file or folder says of itself: a patch, a delta, an export, or anybody's safetensors file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from unforget import families
from unforget.errors import UsageError
from unforget.exports.manifest import HEADER, Made, Verified
from unforget.files.patch import HEADER as PATCH
from unforget.files.patch import Patch
from unforget.files.storage import BadFile, Digested, Lazy, Opened, open_tensors

FACTORS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
WRONG = "Give a patch, an export, or a .safetensors file."


@dataclass(frozen=True)
class Shown:
    """What was found.

    Attributes:
        kind: A patch or delta; an export; a file of somebody else.
        said: All of it, for JSON.
    """

    kind: Literal["patch", "export", "file"]
    said: dict[str, Any]


def look(path: Path) -> Shown:
    """What a file or folder says of itself.

    Raises:
        UsageError: If it cannot be read, or says nothing.
    """
    if path.is_dir():
        return Shown("export", _folder(path))
    if not path.is_file():
        raise UsageError(f"there is no file '{path}'", WRONG)
    try:
        opened = open_tensors(path)
        if PATCH in opened.metadata:
            return Shown("patch", _patch(path))
        if HEADER in opened.metadata:
            return Shown("export", {**_made(opened.metadata[HEADER], path), **_content(opened.tensors)})
        return Shown("file", _foreign(opened))
    except BadFile as error:
        raise UsageError(str(error), WRONG) from None
    except OSError as error:
        raise UsageError(f"cannot read '{path}': {error.strerror}", WRONG) from None


def _folder(path: Path) -> dict[str, Any]:
    made = families.hints(path).made
    if made is not None:
        return _made(made, path)
    for name in FACTORS:
        if (path / name).is_file():
            return look(path / name).said
    raise UsageError(f"'{path}' does not say where it came from", "Give a folder that `unforget export` wrote.")


def _made(value: Any, path: Path) -> dict[str, Any]:
    try:
        made = Made.model_validate_json(value) if isinstance(value, str) else Made.model_validate(value)
    except ValidationError as error:
        where = ".".join(str(p) for p in error.errors()[0]["loc"]) or "its header"
        raise UsageError(f"'{path}' is not an export of this version: {where}", WRONG) from None
    return made.model_dump(mode="json")


def _patch(path: Path) -> dict[str, Any]:
    """What a patch says, and what `unforget verify` said of it, where its report lies beside."""
    patch = Patch.load(path)
    tensors = {name: Lazy.of(t) for name, t in patch.tensors.items()}
    report, verified = path.with_suffix(".run") / "verify.json", None
    if report.is_file():
        try:
            verified = Verified.of(report).model_dump(mode="json")
        except UsageError:
            verified = None
    return {**patch.provenance.model_dump(mode="json"), **_content(tensors), "verified": verified}


def _content(tensors: dict[str, Lazy]) -> dict[str, Any]:
    """How much there is: tensors, and numbers by their type."""
    numbers: dict[str, int] = {}
    for lazy in tensors.values():
        name = str(lazy.dtype).removeprefix("torch.")
        numbers[name] = numbers.get(name, 0) + math.prod(lazy.shape)
    return {"tensors": len(tensors), "numbers": numbers}


def _foreign(opened: Opened) -> dict[str, Any]:
    digested = Digested()
    for name, lazy in opened.tensors.items():
        digested.add(name, lazy.make())
    return {"metadata": opened.metadata, **_content(opened.tensors), "digest": digested.hexdigest()}
