"""Our files against the safetensors library, and against files that lie."""

import hashlib
import json
import os
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from unforget.config.files import read as read_toml
from unforget.errors import UsageError
from unforget.exports.manifest import Verified
from unforget.files.storage import (
    BadFile,
    Digested,
    Lazy,
    atomic_output,
    digest,
    open_tensors,
    read_json,
    read_lines,
    write_bytes,
    write_tensors,
)

TENSORS = {
    "half": torch.arange(3, dtype=torch.float16),
    "brain": torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a.single": torch.randn(4, 3, generator=torch.Generator().manual_seed(1)),
    "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "flag": torch.tensor([True, False]),
    "eight": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
}


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape
        and torch.equal(a[n].contiguous().flatten().view(torch.uint8), b[n].contiguous().flatten().view(torch.uint8))
        for n in a
    )  # fmt: skip


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path):
    write_tensors(TENSORS, {"who": "we"}, tmp_path / "ours")
    assert equal(safetensors.torch.load_file(tmp_path / "ours"), TENSORS)
    with safetensors.safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"who": "we"}
    safetensors.torch.save_file(TENSORS, tmp_path / "theirs", {"who": "they"})
    opened = open_tensors(tmp_path / "theirs")
    assert opened.metadata == {"who": "they"}
    assert equal(opened.load(), TENSORS)


def test_equal_content_is_equal_bytes_in_a_sorted_header(tmp_path):
    write_tensors(TENSORS, {"b": "2", "a": "1"}, tmp_path / "a")
    lazily = {n: Lazy(t.dtype, tuple(t.shape), lambda t=t: t) for n, t in reversed(TENSORS.items())}
    write_tensors(lazily, {"a": "1", "b": "2"}, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    raw = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert list(header) == sorted(header)
    for value in header.values():
        if "dtype" in value:  # every tensor is aligned in its file, as readers that map it need
            width = {"F32": 4, "I64": 8, "F16": 2, "BF16": 2}.get(value["dtype"], 1)
            assert (8 + length + value["data_offsets"][0]) % width == 0


def test_the_hash_and_the_digest_are_of_the_content(tmp_path):
    told = Digested()
    write_tensors(TENSORS, {}, tmp_path / "a", digested=told, hash_key="hash")
    raw = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert open_tensors(tmp_path / "a").metadata["hash"] == "0x" + hashlib.sha256(raw[8 + length :]).hexdigest()
    assert told.hexdigest() == digest(TENSORS) == digest(dict(reversed(TENSORS.items())))
    for name, other in (("flag", ~TENSORS["flag"]), ("half", TENSORS["half"].float()), ("empty", torch.empty(4, 0))):
        assert digest({**TENSORS, name: other}) != digest(TENSORS)
    assert digest({("b" if n == "half" else n): t for n, t in TENSORS.items()}) != digest(TENSORS)


def test_tensors_are_made_one_at_a_time(tmp_path):
    size = 2**20
    lazy = {f"{i}": Lazy(torch.uint8, (size,), lambda: torch.zeros(size, dtype=torch.uint8)) for i in range(40)}
    tracemalloc.start()
    write_tensors(lazy, {}, tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 3 * size
    tracemalloc.stop()
    wrong = Lazy(torch.uint8, (2,), lambda: torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="became"):
        write_tensors({"a": wrong}, {}, tmp_path / "b")


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    write_bytes(b"before", path)

    def interrupted():
        with atomic_output(path) as beside:
            beside.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def file(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LIES = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header longer than the file": file({}, length=2**20),
    "a header of exabytes": file({}, length=2**63),
    "no json": file(b"{{{{"),
    "nested": file(b"[" * 100_000),
    "not utf-8": file(b'{"\xff": 1}'),
    "a list": file(b"[1, 2]"),
    "metadata that are numbers": file({"__metadata__": {"a": 1}}),
    "an entry that is text": file({"a": "F32"}),
    "an unknown type": file({"a": {**ONE, "dtype": "F31"}}, b"1234"),
    "a negative size": file({"a": {**ONE, "shape": [-1]}}, b"1234"),
    "a huge size": file({"a": {**ONE, "shape": [2**40], "data_offsets": [0, 2**42]}}, b"1234"),
    "a size that overflows": file({"a": {**ONE, "shape": [2**40, 2**40]}}, b"1234"),
    "a size of true": file({"a": {**ONE, "shape": [True]}}, b"1234"),
    "offsets of another size": file({"a": {**ONE, "data_offsets": [0, 3]}}, b"1234"),
    "offsets beyond the end": file({"a": {**ONE, "data_offsets": [4, 8]}}, b"1234"),
    "overlapping tensors": file({"a": ONE, "b": ONE}, b"1234"),
    "bytes that nobody owns": file({"a": ONE}, b"12345"),
    "missing bytes": file({"a": ONE}, b"123"),
    "no offsets": file({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    "a sound type that is none of ours": file({"a": {**ONE, "dtype": "U32"}}, b"1234"),
    "too many axes": file({"a": {**ONE, "shape": [1] * 100}}, b"1234"),
    "a huge side of nothing": file({"a": {**ONE, "shape": [0, 2**62], "data_offsets": [0, 0]}}),
    "a header over the cap": file(b"{}" + b" " * 2**22),
    "one name twice": file(b'{"a": %b, "a": %b}' % ((json.dumps(ONE).encode(),) * 2), b"1234" * 2),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_lies_about_itself_is_refused_before_anything_is_allocated(tmp_path, lie):
    (tmp_path / "a").write_bytes(LIES[lie])
    tracemalloc.start()
    with pytest.raises(BadFile, match=r"^'a' .*") as caught:
        open_tensors(tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    write_tensors(TENSORS, {}, tmp_path / "a")
    opened = open_tensors(tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-40])
    with pytest.raises(BadFile, match="shorter"):
        opened.load()


def test_what_was_read_is_memory_of_its_own(tmp_path):
    write_tensors(TENSORS, {}, tmp_path / "a")
    opened = open_tensors(tmp_path / "a")
    read = opened.load()
    with (tmp_path / "a").open("r+b") as file:  # the same file, as one that is mapped would show
        file.write(b"\xff" * (tmp_path / "a").stat().st_size)
    assert equal(read, TENSORS)
    assert all(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in read.values() if t.numel())
    assert list(opened.tensors) == sorted(TENSORS, key=lambda n: (-TENSORS[n].dtype.itemsize, n))


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b" " * (2**20 + 1)])
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadFile):
        read_json(tmp_path / "a.json")


def test_a_pipe_is_no_json_file(tmp_path):
    """Nobody may ever write into it."""
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(BadFile, match=r"'a\.json' is no file"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", ["a device without an end", "a large file"])
def test_whatever_is_read_as_text_has_a_bound(tmp_path, kind):
    """Each of the readers, of what a user names: lists of prompts, JSON, TOML."""
    path = Path("/dev/zero")
    if kind == "a large file":
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(2**31)
    for read, error, said in (
        (read_lines, UsageError, "more than 4194304 bytes"), (read_json, BadFile, "more than 1048576 bytes"),
        (Verified.of, UsageError, "more than 16777216 bytes"), (read_toml, UsageError, "too large|no file"),
    ):  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(error, match=said):
            read(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB"


@pytest.mark.parametrize("part", ["a", "'a'", '"\\""'])
@pytest.mark.parametrize("line", ["{} = 1", "[{}]", "a = [{{x.{} = 1}}]"])
def test_what_a_toml_file_says_takes_no_more_than_it_is_long(tmp_path, part, line):
    """A key of 60,000 parts took 10 GB."""
    for parts, blank in ((32, ""), (32, " "), (60_000, "")):
        (tmp_path / "a.toml").write_text(line.format(f"{blank}.{blank}".join([part] * (parts + 1))))
        with pytest.raises(UsageError, match="more than 32 parts"):
            read_toml(tmp_path / "a.toml")
    prose = "and so on. " * 9000 + "." * 9000
    (tmp_path / "a.toml").write_text(f"a = '''{prose}'''\nb = [{'1.5, ' * 9000}]")
    assert set(read_toml(tmp_path / "a.toml")) == {"a", "b"}


@pytest.mark.parametrize(("content", "size"), [(b"a\n", 2**40), (b"\xff\xfe", None), (b"\n\n", None)])
def test_prompts_that_are_no_text_are_refused(tmp_path, content, size):
    (tmp_path / "a.txt").write_bytes(content)
    if size:
        os.truncate(tmp_path / "a.txt", size)
    with pytest.raises(UsageError, match=r"cannot read|holds no prompt"):
        read_lines(tmp_path / "a.txt")


def test_a_file_that_is_longer_than_it_says_is_not_mapped(tmp_path):
    write_tensors({"a": torch.ones(3)}, {}, tmp_path / "a")
    os.truncate(tmp_path / "a", 2**40)
    with pytest.raises(BadFile, match="longer than its header says"):
        open_tensors(tmp_path / "a")
