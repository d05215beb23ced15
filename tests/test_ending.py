"""However a command ends: a sentence, a code that is no verdict, and nothing that commands a terminal or a log."""

import errno
import json
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_reports import rich

from unforget.cli.console import tame_libraries
from unforget.cli.ending import LONGEST, line
from unforget.errors import CannotRun, Interrupted, Terminated, UsageError, is_full, launched, printable
from unforget.files.patch import HEADER, Patch
from unforget.files.storage import checksummed, digest, write_tensors
from unforget.reports.html import page
from unforget.reports.junit import junit
from unforget.reports.markdown import markdown

EVIL = [
    "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "a\rb", "a\n::error::x", "::set-output name=a::b", "  ::stop-commands::t",
    "x ##[error]no", "##vso[task.setvariable variable=a]b", "##teamcity[buildStatus text='x']", "\u202eeslaf",
    "\u2066a\u2069", "section_start:123:name[collapsed=true]\r\x1b[0K", "section_end:1:n", "\x00\x08\x0b\x7f",
    "\u200b\ufeff", "[red]markup[/red]",
    "[link=file:///etc/passwd]x[/link]", "\ud800",
]  # fmt: skip
COMMANDS = re.compile(r"^\s*::[a-z]|##\w*\[|section_(start|end):\d", re.MULTILINE | re.IGNORECASE)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def harmless(text):
    """Whether a text, as it was printed without colours, commands nothing."""
    return not COMMANDS.search(text) and not CONTROLS.search(text)


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_printable(text):
    assert harmless(printable(text))
    assert printable(printable(text)) == printable(text)
    assert json.loads(printable(json.dumps({text: text}))) == {text: text}


def test_what_is_harmless_stays():
    for text in (
        "a b\tc\nd",
        "\u00fcml\u00e4ut \u4e2d\u6587 \U0001f600 \u05e9\u05dc\u05d5\u05dd",
        "12::34",
        "http://[::1]/",
        "# [x] ## y",
    ):
        assert printable(text) == text


def evil_file(path, text):
    text = text.replace("\ud800", "?")
    write_tensors({f"{text}.weight": torch.ones(1)}, {"who": text, text: "x"}, path)


def evil_patch(path, text):
    said = {
        "format": 3, "holds": "weights", "base": text, "base_digest": text, "patched_digest": text, "digest": "",
        "targets": [text], "surrogates": [text], "prompts": [text, f"x{text}"], "adapter": None, "seed": 0, "steps": 1,
        "earlier": [], "recipe": {text: text, "a": {"b": [text]}}, "versions": {text: text},
    }  # fmt: skip
    tensors = {"a": torch.ones(1)}
    said["digest"] = digest(tensors)
    write_tensors(tensors, {HEADER: json.dumps(checksummed(said))}, path)
    assert Patch.load(path)


@pytest.mark.parametrize("text", EVIL, ids=ascii)
@pytest.mark.parametrize("make", [evil_file, evil_patch])
@pytest.mark.parametrize("width", ["200", "30"])
def test_show_commands_nothing(cli, tmp_path, monkeypatch, text, make, width):
    monkeypatch.setenv("COLUMNS", width)
    make(tmp_path / "a.safetensors", text)
    for more in ([], ["--json"]):
        result = cli("show", "a.safetensors", *more)
        assert result.exit_code == 0, result.output
        assert harmless(result.output)
    assert json.loads(result.stdout)


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_messages_command_nothing(cli, tmp_path, text, tiny_folder, picture):
    name = (
        text.replace("\x00", "").replace("/", "_").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    )
    for args in (
        ["show", name], [name], ["verify", f"--{name}"], ["export", "--model", name, "--patch", name, "-o", "x"],
        ["unlearn", "--model", tiny_folder, "-t", picture, "--recipe", name],
        ["unlearn", "--model", tiny_folder, "-t", name],
        ["verify", "--model", tiny_folder, "--candidate", name, "-t", picture], ["verify", "-m", "x", "--policy", name],
    ):  # fmt: skip
        result = cli(*args)
        assert result.exit_code == 2, result.output
        assert harmless(result.output), ascii(result.output)


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_what_libraries_say_commands_nothing(text, monkeypatch, capsys):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    tame_libraries()
    try:
        sys.stderr.write(warnings.formatwarning(text, UserWarning, "x.py", 1, "line"))
        logger = logging.Logger("a library's")
        logger.addHandler(logging.StreamHandler(sys.stderr))
        for words in ((text,), ("%s", text), ("%s\n%r", text, {text: text})):
            logger.warning(*words)
    finally:
        logging.setLogRecordFactory(before)
    assert harmless(capsys.readouterr().err)


@pytest.mark.parametrize("text", EVIL, ids=ascii)
def test_reports_command_nothing(text, tmp_path):
    text = text.replace("\ud800", "?")
    made = rich()  # made by hand
    checks = [c.model_copy(update={"prompt": text, "note": text, "variant": text}) for c in made.checks]
    targets = [t.model_copy(update={"reason": text}) for t in made.targets]
    made = made.model_copy(update={
        "summary": text, "checks": checks, "targets": targets, "versions": {text: text}, "backends": [text],
        "settings": {text: [text]}, "robustness": [r.model_copy(update={"sentence": text}) for r in made.robustness],
    })  # fmt: skip
    for said in (markdown(made), page(made), junit(made), made.text()):
        assert harmless(said), ascii(said[:2000])
    assert json.loads(made.text())["summary"] == text


BUGS = [
    KeyError("x"),
    ZeroDivisionError(),
    RecursionError(),
    SystemExit(1),
    SystemExit(0),
    ImportError("no torch"),
    EOFError(),
    AssertionError(),
]


@pytest.mark.parametrize("error", BUGS, ids=repr)
@pytest.mark.parametrize("where", ["unforget.exports.show.open_tensors", "unforget.api.show"])
def test_a_bug_is_exit_code_three_with_its_traceback_in_a_file(cli, tmp_path, monkeypatch, error, where):
    import tempfile

    import unforget.api  # noqa: F401

    (tmp_path / "crashes").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "crashes"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "S3cretS3cret")
    monkeypatch.setenv("HOME", str(tmp_path))

    def fail(*args):
        raise error from ValueError(f"hf_S3cretS3cret in {tmp_path}/x")

    monkeypatch.setattr(where, fail)
    (tmp_path / "a.safetensors").touch()
    for more in ([], ["--json"]):
        result = cli("show", "a.safetensors", *more)
        assert result.exit_code == 3
        assert bool(result.stdout) is bool(more) and "S3cret" not in result.stdout
        assert "this is a bug in unforget; please report it" in result.stderr
        assert "Traceback" not in result.stderr
    first = sorted((tmp_path / "crashes").iterdir())[0]
    assert any(str(p) in result.stderr for p in (tmp_path / "crashes").iterdir())
    kept = first.read_text()
    assert "Traceback" in kept and "in fail" in kept
    assert "S3cret" not in kept and str(tmp_path) not in kept
    assert stat.S_IMODE(first.stat().st_mode) == 0o600


def test_what_a_processor_cannot_compute_is_no_lack_of_memory():
    assert not is_full(RuntimeError("could not create a primitive descriptor for a matmul primitive"))


@pytest.mark.parametrize(("error", "code", "sentence"), [
    (MemoryError(), 3, "out of memory"), (RuntimeError("CUDA out of memory. Tried"), 3, "out of memory"),
    (RuntimeError("std::bad_alloc"), 3, "out of memory"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
    (RuntimeError("could not create a primitive"), 3, "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/home/me/x.patch"), 3, "No space left on device: 'x.patch'"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 3, "Broken pipe"), (Terminated("told to stop"), 143, "told to stop"),
    (Interrupted("stopped", ""), 130, "stopped"), (CannotRun("a\nb", "c"), 3, "a b"),
    (UsageError("no", "yes"), 2, "yes"),
], ids=repr)  # fmt: skip
def test_what_is_no_bug_is_a_sentence(cli, tmp_path, monkeypatch, error, code, sentence):
    import unforget.api  # noqa: F401

    def fail(*args):
        raise error

    monkeypatch.setattr("unforget.api.show", fail)
    result = cli("show", "x")
    assert result.exit_code == code
    assert sentence in result.stderr
    assert "bug" not in result.stderr and "Traceback" not in result.stderr


def start(*args, before="", **more):
    """The real command, after some Python of ours."""
    program = f"import sys\n{before}\nfrom unforget.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


BROKEN = """
import importlib.abc, signal
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            {what}
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("name", ["torch", "typer"])
@pytest.mark.parametrize(("what", "code", "sentence"), [
    ("raise ImportError('libcudart.so is missing')", 3, "this is a bug"), ("raise KeyError('x')", 3, "this is a bug"),
    ("signal.raise_signal(signal.SIGINT); raise ImportError('of the interrupt')", 130, "interrupted"),
    ("signal.raise_signal(signal.SIGTERM)", 143, "told to stop"),
    ("signal.raise_signal(signal.SIGHUP)", 143, "told to stop"),
    # as C++ that calls Python: an exception that reaches it aborts the process
    ("import os\n            try: signal.raise_signal(15)\n            finally: os.abort()", 143, "told to stop"),
], ids=["ImportError", "KeyError", "SIGINT", "SIGTERM", "SIGHUP", "C++"])  # fmt: skip
def test_what_fails_while_libraries_are_imported(tiny_folder, picture, name, what, code, sentence):
    args = ["verify", "--model", str(tiny_folder), "--candidate", str(tiny_folder), "-t", str(picture), "--json"]
    process = start(*args, before=BROKEN.format(name=name, what=what))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert sentence in errors and "Traceback" not in errors
    assert not said or json.loads(said)["exit_code"] == code


SPEAKING = """
import unforget.cli
run = unforget.cli._run
def first():
    print("here", flush=True)
    run()
unforget.cli._run = first
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_at_any_moment(tiny_folder, picture, tmp_path, number):
    """From the first moment on that is ours: while Python itself starts, a signal ends it as it ends any program."""
    code = 130 if number == signal.SIGINT else 143
    args = ["unlearn", "--model", str(tiny_folder), "-t", str(picture), "-s", str(picture), "-o", "x.patch"]
    for delay in [0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1, 1.5, 2]:
        process = start(*args, before=SPEAKING, cwd=tmp_path)
        assert process.stdout.readline()
        time.sleep(delay)
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode in (code, 2), (delay, errors)  # 2: the surrogate is the target
        assert "Traceback" not in errors


@pytest.mark.parametrize("said", [("x", "2"), ("0", "x"), ("", "2"), ("0", ""), ("-1", "2"), ("1" * 5000, "2")])
def test_what_no_launcher_says_is_no_number_of_processes(monkeypatch, said):
    for name, value in zip(("RANK", "WORLD_SIZE"), said, strict=True):
        monkeypatch.setenv(name, value)
    assert launched() == (0, 1)


def test_an_odd_environment_is_no_verdict():
    done = subprocess.run(
        [sys.executable, "-m", "unforget", "-V"], env={**os.environ, "WORLD_SIZE": "banana"}, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path, closed):
    """Else what a library says on stderr stands in the weights."""
    program = """import os
from unforget.cli.ending import guarded
guarded(lambda: print(os.open("b", os.O_CREAT), file=open("a", "w")))"""

    def close():
        for number in closed:
            os.close(number)

    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, preexec_fn=close)
    assert int((tmp_path / "a").read_text()) > 2


def test_a_signal_that_is_ignored_stays_so(tiny_folder):
    process = start("--version", before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + BROKEN.format(
        name="rich", what="signal.raise_signal(signal.SIGHUP); return None"))  # fmt: skip
    assert process.communicate(timeout=60)[0].strip()
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--help"], ["verify", "--help"], ["show", "a.safetensors"]])
def test_a_reader_that_left_is_no_failure(tmp_path, args):
    write_tensors(
        {f"{k}": torch.ones(1) for k in range(2000)},
        {f"{k}": "x" * 100 for k in range(2000)},
        tmp_path / "a.safetensors",
    )
    process = start(*args, cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_a_full_disk_under_stdout_is_exit_code_three(tmp_path):
    write_tensors({"a": torch.ones(1)}, {}, tmp_path / "a.safetensors")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "unforget", "show", "a.safetensors"], stdout=full, stderr=subprocess.PIPE, text=True,
            cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.count("error: ") == 1 and "No space left" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_encoding_will_do(tmp_path, encoding):
    evil_patch(tmp_path / "a.patch", "\u4e2d \u00e9 \U0001f600")
    for args in (["show", "a.patch"], ["verify", "--help"], ["show", "\u4e2d"]):
        process = start(*args, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": encoding}, encoding=encoding)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == (2 if args[1] == "\u4e2d" else 0), errors
        assert "Traceback" not in errors and "bug" not in errors


def test_what_a_library_says_as_the_process_ends_is_no_result():
    program = (
        "import atexit; from unforget.cli.ending import guarded; atexit.register(print, 'late'); "
        "guarded(lambda: print('result'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "late\n")


@pytest.mark.parametrize("text", ["x" * 10**6, "\x1b" * 10**4, "a\n" * 10**4])
def test_a_sentence_is_no_page(text):
    assert len(line(text)) == LONGEST and line(text).endswith("...")
    assert line(text[:100]) == line(line(text[:100]))
