"""Files: written whole or not at all, and read only after what they claim of their sizes was checked.

Tensors are stored as safetensors and nothing else. The headers written here are sorted, so that equal content is equal
bytes; tensors go to and from the disk one at a time, so that a model need not fit into memory to be copied or changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unforget.core import distributed
from unforget.errors import UsageError

MAX_HEADER = 4 * 2**20
"""Largest header that is parsed, bytes; the largest models have a tenth of it."""
MAX_JSON = 2**20
"""Largest JSON file of a model folder that is parsed, bytes."""
MAX_DEPTH = 64
"""Most tables and lists in one another in what we wrote."""
MAX_PROMPTS = 2**22
"""Largest list of prompts that is read, bytes."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SEAL = "unforget.sha256"
"""Key in a header: SHA-256 of the tensors' bytes and, after them, of the header with zeros in this place."""
SEALED = re.compile(rb'"unforget\.sha256":"(.{64})"', re.DOTALL)


class BadFile(ValueError):
    """A file is not what its name or header claims."""


@contextlib.contextmanager
def atomic_output(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A path to write to, beside the wanted one, that takes its place only when all was written and flushed.

    Whatever stops the writer, no reader ever sees half a file, and what was there before stays until then. Of several
    processes the first one's file is taken. `private`: nobody else may read it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    if private:  # before anything is in it, and not through somebody's link
        beside.unlink(missing_ok=True)
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield beside
        if distributed.is_main():
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file, whole or not at all."""
    with atomic_output(path) as beside:
        beside.write_bytes(content)


def write_json(value: Any, path: Path) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    write_bytes((json.dumps(value, indent=2, sort_keys=True) + "\n").encode(), path)


def read_bytes(path: Path, most: int) -> bytes:
    """A file, or what a pipe or a device gives; BadFile once that is more than `most` bytes."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise BadFile(f"'{path.name}' has more than {most} bytes")
    return content


def read_json(path: Path, *, most: int = MAX_JSON) -> Any:
    """A JSON file; BadFile if it is too large, too deep, or no JSON, or a pipe, which may never give anything."""
    if path.is_fifo():
        raise BadFile(f"'{path.name}' is no file")
    content = read_bytes(path, most)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise BadFile(f"'{path.name}' is not JSON") from None


def checksummed(value: Mapping[str, Any]) -> dict[str, Any]:
    """JSON with a checksum of the rest in it, which tells damage, not malice."""
    rest = {name: content for name, content in value.items() if name != "checksum"}
    return {**rest, "checksum": _checksum(rest)}


def undamaged(value: Any, *, always: bool = True) -> dict[str, Any]:
    """JSON of `checksummed` without its checksum; BadFile if that does not fit or, where it is needed, is not there."""
    if not isinstance(value, dict):
        raise BadFile("it is no table")
    if _deep(value, MAX_DEPTH):
        raise BadFile("it is nested too deeply")
    rest = {name: content for name, content in value.items() if name != "checksum"}
    if ("checksum" in value or always) and value.get("checksum") != _checksum(rest):
        raise BadFile("it is damaged: its checksum does not fit")
    return rest


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _deep(value: Any, most: int) -> bool:
    """Whether more than so many tables and lists lie in one another: libraries give up in many ways."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return inner is not None and (most == 0 or any(_deep(one, most - 1) for one in inner))


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is wanted."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """One that is there already."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Opened:
    """A safetensors file whose header was checked: every tensor lies within the file."""

    metadata: dict[str, str]
    tensors: dict[str, Lazy]

    def load(self) -> dict[str, Tensor]:
        """All tensors."""
        return {name: lazy.make() for name, lazy in self.tensors.items()}


def open_tensors(path: Path) -> Opened:
    """Read the header of a safetensors file; BadFile if it is none, or claims what the file does not hold."""
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if length > MAX_HEADER:
            raise BadFile(f"'{path.name}' is no safetensors file: its header would have {length} bytes")
        if 8 + length + _described(file.read(length)) < size:  # before all of it is mapped
            raise BadFile(f"'{path.name}' is no sound safetensors file: it is longer than its header says")
    try:
        with safe_open(path, "np") as opened:
            begin, tensors = 8 + length, {}
            for name in opened.offset_keys():  # the library made sure that they follow each other without a gap
                found = opened.get_slice(name)
                tensors[name] = _stored(path, begin, name, found.get_dtype(), tuple(found.get_shape()))
                begin += tensors[name].size
            return Opened(dict(sorted((opened.metadata() or {}).items())), tensors)
    except SafetensorError as error:
        reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())
        raise BadFile(f"'{path.name}' is no sound safetensors file: {reason[:200]}") from None


def _described(header: bytes) -> float:
    """Bytes of data that a header describes; no end where it is none, which the library says better."""
    try:
        ends = [v["data_offsets"][1] for n, v in json.loads(header).items() if n != "__metadata__"]
        return int(max(ends, default=0))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return math.inf


def _stored(path: Path, begin: int, name: str, kind: str, shape: tuple[int, ...]) -> Lazy:
    """A tensor in a file."""
    if kind not in DTYPES or len(shape) > 16 or max(shape, default=0) >= 2**48:
        raise BadFile(f"'{path.name}' holds the tensor '{name[:80]}' of type {kind}, which is not read here")

    def read() -> Tensor:
        # Not mapped but read: aligned memory of its own, and nothing changes, nor fails, if the file does.
        raw = torch.empty(lazy.size, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(begin)
            if file.readinto(raw.numpy().data) != lazy.size:
                raise BadFile(f"'{path.name}' became shorter while it was read")
        return raw.view(lazy.dtype).reshape(shape)

    lazy = Lazy(DTYPES[kind], shape, read)
    return lazy


def write_tensors(
    tensors: Mapping[str, Lazy | Tensor], metadata: Mapping[str, str], path: Path, *, digested: Digested | None = None,
    hash_key: str | None = None, sealed: bool = False,
) -> None:  # fmt: skip
    """Write a safetensors file with a sorted header, in place and a tensor at a time; equal content is equal bytes.

    `digested` is told every tensor on its way; the header's `hash_key` gets the SHA-256 of the data (ModelSpec), and
    that of all of the file is in it if it is `sealed`.
    """
    lazy = {n: t if isinstance(t, Lazy) else Lazy.of(t) for n, t in tensors.items()}
    # Wide types first, so that every tensor is aligned in its file.
    order = sorted(lazy, key=lambda n: (-lazy[n].dtype.itemsize, n))
    entries, end = {}, 0
    for name in order:
        begin, end = end, end + lazy[name].size
        shape = list(lazy[name].shape)
        entries[name] = {"dtype": NAMES[lazy[name].dtype], "shape": shape, "data_offsets": [begin, end]}

    def header(found: str, whole: str) -> bytes:
        known = {**metadata, **({hash_key: f"0x{found}"} if hash_key else {}), **({SEAL: whole} if sealed else {})}
        text = json.dumps({"__metadata__": known, **entries}, sort_keys=True, separators=(",", ":")).encode()
        return struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8)

    sha = hashlib.sha256()
    with path.open("wb") as file:
        file.write(header("0" * 64, "0" * 64))
        for name in order:
            tensor = lazy[name].make().detach().cpu().contiguous()
            if (tensor.dtype, tuple(tensor.shape)) != (lazy[name].dtype, lazy[name].shape):
                raise ValueError(f"'{name}' became {tensor.dtype} {tuple(tensor.shape)}")
            content = raw(tensor)
            file.write(content)
            if hash_key or sealed:
                sha.update(content)
            if digested is not None:
                digested.add(name, tensor)
        file.seek(0)
        found = sha.hexdigest()
        sha.update(header(found, "0" * 64))
        file.write(header(found, sha.hexdigest()))


def check_seal(path: Path) -> None:
    """BadFile unless every bit of a safetensors file that was written `sealed` is as it was written."""
    with path.open("rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER))
        sha, seal = hashlib.file_digest(file, "sha256"), SEALED.search(head)
    if seal is not None:
        sha.update(head[: seal.start(1)] + b"0" * 64 + head[seal.end(1) :])
    if seal is None or sha.hexdigest().encode() != seal[1]:
        raise BadFile(f"'{path.name}' is damaged: it is not what was written")


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data


class Digested:
    """The digest of a set of tensors, one at a time and in any order: of the content, not of a file that holds it.

    A name that comes again takes the place of what it was.
    """

    def __init__(self, like: Digested | None = None) -> None:
        self._lines: dict[str, str] = dict(like._lines) if like else {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor into account: its name, type, shape and bytes."""
        found = hashlib.sha256(raw(tensor.detach().cpu().contiguous())).hexdigest()
        self._lines[name] = f"{name} {tensor.dtype} {list(tensor.shape)} {found}\n"

    def hexdigest(self) -> str:
        """SHA-256 over the tensors' own, in order of name."""
        return hashlib.sha256("".join(self._lines[n] for n in sorted(self._lines)).encode()).hexdigest()


def digest(state: Mapping[str, Tensor]) -> str:
    """The digest of tensors by name; see `Digested`."""
    found = Digested()
    for name, tensor in state.items():
        found.add(name, tensor)
    return found.hexdigest()


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty: prompts."""
    try:
        text = read_bytes(path, MAX_PROMPTS).decode("utf-8-sig")
        lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read '{path}': {error}", "Give a text file with one prompt a line.") from None
    if not lines:
        raise UsageError(f"'{path}' holds no prompt", "Write one prompt a line.")
    return lines
