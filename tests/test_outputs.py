"""What can be known before the work is said before it; and a verdict is told, whatever happens to the files."""

import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from test_reports import rich

from unforget import api
from unforget.api.verifying import _append_summary
from unforget.config import UnlearnConfig, VerifyConfig, check_paths, run_folder
from unforget.core.types import Progress
from unforget.errors import UsageError
from unforget.files import images
from unforget.files.locks import claimed
from unforget.files.patch import Patch, Provenance
from unforget.files.storage import digest

JUDGE = {
    "level": "quick", "max_rate": 0.3, "paired": 16, "controls": 8, "draws": 2, "timestep": (400,), "sampler_steps": 2,
    "similarity": ("pixels",), "cache": False,
}  # fmt: skip


@pytest.fixture
def here(tiny_folder, pictures, monkeypatch):
    """A folder with a model, pictures, a patch of that model, and something that must survive all."""
    monkeypatch.chdir(pictures)
    shutil.copytree(tiny_folder, "model")
    for folder in ("retain", "folder", "out"):
        Path(folder).mkdir()
    shutil.copy("target.png", "retain/0.png")
    Path("prompts.txt").write_text("x\n")
    Path("unforget.toml").write_text('[verify]\nlevel = "quick"\n')
    Path("c.toml").write_text("seed = 1\n")
    Path("file").write_text("mine")
    state = tiny_pipeline().unet.state_dict()
    target = images.read_image(Path("target.png"), (3, 16, 16))
    ids = [images.image_id(target, api.common.salted(digest(state)))]
    said = Provenance(
        base="model", base_digest=digest(state), targets=ids, surrogates=[], recipe={}, seed=0, steps=0, versions={}
    )
    Patch({"conv_in.bias": state["conv_in.bias"] + 1}, said).save(Path("a.patch"))
    run_folder(Path("a.patch")).mkdir()
    shutil.copy("target.png", "a.run/target-0.png")
    return pictures


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


UNLEARN = ["unlearn", "--model", "model", "-t", "target.png", "-s", "surrogate.png"]
VERIFY = ["verify", "--model", "model", "--patch", "a.patch", "-t", "target.png"]
EDIT = ["edit-surrogate", "--model", "model", "-t", "target.png"]
EXPORT = ["export", "--model", "model", "--patch", "a.patch"]
FILES = [  # an option that names a file to write, with a command that has it
    (UNLEARN, "-o"), (EDIT, "-o"), (VERIFY, "--report"), (VERIFY, "--junit"), (VERIFY, "--attestation"),
    (VERIFY, "--html"), (VERIFY, "--summary"), ([*EXPORT, "--format", "single-file"], "-o"),
]  # fmt: skip
ANY = [*FILES, (VERIFY, "--save-images"), (EXPORT, "-o")]


def refused(cli, folder, args, *words):
    before = contents(folder)
    result = cli(*args)
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert all(word in said for word in words), said
    assert contents(folder) == before
    assert not [p for p in folder.rglob(".*") if p.suffix in (".lock", ".partial")]


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
@pytest.mark.parametrize(("command", "option"), FILES, ids=lambda x: x if isinstance(x, str) else x[0])
def test_a_folder_where_a_file_is_to_be(cli, here, command, option, force):
    name = "out.safetensors" if "single-file" in command else "folder"
    Path(name).mkdir(exist_ok=True)
    refused(cli, here, [*command, option, name, *force], f"'{name}' is a folder")


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_a_device_is_not_replaced(cli, here, force):
    """Else `--report /dev/null --force` of root leaves every program of the machine a file there."""
    os.mkfifo("pipe")
    Path("link.safetensors").symlink_to("pipe")
    for command, option in ANY:
        if option != "--summary":  # which is appended
            refused(cli, here, [*command, option, "link.safetensors" if "single-file" in command else "pipe", *force])
            assert Path("pipe").is_fifo() and Path("link.safetensors").is_symlink()


@pytest.mark.parametrize("target", ["", ".", "/"])
def test_a_target_without_a_name(cli, here, target):
    refused(cli, here, ["edit-surrogate", "--model", "model", "-t", target], "is a folder")


@pytest.mark.parametrize("path", ["", ".", "/"])
def test_a_path_without_a_name_is_no_place(cli, here, path):
    for command, option in ANY:
        refused(cli, here, [*command, option, path, "--force"], "error: ")


@pytest.mark.parametrize(("command", "option"), ANY, ids=lambda x: x if isinstance(x, str) else x[0])
@pytest.mark.parametrize("path", ["no/x", "file/x", "x" * 250, "x" * 4000, "/proc/x"], ids=lambda p: p[:7])
def test_a_place_that_cannot_be_written(cli, here, command, option, path):
    suffix = ".safetensors" if "single-file" in command else ""
    refused(cli, here, [*command, option, path + suffix, "--force"], "error: ")


@pytest.mark.parametrize("args", [
    *([*VERIFY, option, "loop"] for option in ("--report", "--html", "--junit", "--summary", "--attestation")),
    [*VERIFY, "--save-images", "loop"], [*UNLEARN, "-o", "loop"], [*EDIT, "-o", "loop"], [*EXPORT, "-o", "loop"],
], ids=lambda a: " ".join(a[-2:]))  # fmt: skip
def test_links_in_a_circle_are_no_place(cli, here, args):
    Path("loop").symlink_to("pool")
    Path("pool").symlink_to("loop")
    refused(cli, here, [*args, "--force"], "'loop' is no path")


@pytest.mark.parametrize("names", [("r", "r"), ("r", "out/../r"), ("r", "./r"), ("link", "r")])
@pytest.mark.parametrize("options", [("--report", "--html"), ("--junit", "--summary"), ("--summary", "--report")])
def test_two_outputs_of_one_name(cli, here, names, options):
    Path("link").symlink_to("r")
    refused(cli, here, [*VERIFY, "--force", options[0], names[0], options[1], names[1]], "would be written twice")


def test_a_part_of_a_folder_that_is_written_counts(cli, here):
    refused(
        cli,
        here,
        [*VERIFY, "--save-images", "folder", "--report", "folder/sheet.png", "--force"],
        "would be written twice",
    )


@pytest.mark.parametrize("args", [
    [*UNLEARN, "-o", "target.png"], [*UNLEARN, "-o", "surrogate.png"], [*UNLEARN, "-o", "./out/../target.png"],
    [*UNLEARN, "--patch", "a.patch", "-o", "a.patch"],
    [*UNLEARN, "--retain-prompts", "prompts.txt", "-o", "prompts.txt"],
    [*UNLEARN, "--retain", "retain", "-o", "retain/0.png"], [*UNLEARN, "-o", "model/unet/config.json"],
    [*UNLEARN, "-o", "model/unet/diffusion_pytorch_model.safetensors"],
    [*UNLEARN, "--config", "c.toml", "-o", "c.toml"],
    [*UNLEARN, "-o", "link"], [*UNLEARN, "-o", "hard"],
    ["unlearn", "--model", "model", "-t", "a.run/target-0.png", "-s", "surrogate.png", "-o", "a.patch"],
    [*EDIT, "-o", "target.png"], [*EDIT, "--mask", "surrogate.png", "-o", "surrogate.png"],
    [*EDIT, "-o", "x.png", "--donor", "x.sheet.png", "--method", "donor"],
    [*VERIFY, "--report", "a.patch"], [*VERIFY, "--html", "target.png"], [*VERIFY, "--summary", "target.png"],
    [*VERIFY, "--must-retain", "surrogate.png", "--junit", "surrogate.png"], [*VERIFY, "--report", "unforget.toml"],
    [*EXPORT, "-o", "model"], [*EXPORT, "-o", "a.patch"], [*EXPORT, "-o", "."],
], ids=lambda a: " ".join(a[-4:]))  # fmt: skip
def test_an_input_is_never_replaced(cli, here, args):
    Path("link").symlink_to("target.png")
    os.link("target.png", "hard")
    shutil.copy("target.png", "x.sheet.png")
    refused(cli, here, [*args, "--force"], "which is read" if args[-1] != "." else "error: ")


def test_the_sheet_beside_a_surrogate_is_an_output_like_any(cli, here):
    Path("x.sheet.png").write_text("mine")
    refused(cli, here, [*EDIT, "-o", "x.png"], "'x.sheet.png' exists")


def test_a_file_where_the_folder_of_the_run_is_to_be(cli, here):
    Path("x.run").write_text("mine")
    refused(cli, here, [*UNLEARN, "-o", "x.patch", "--force"], "'x.run' is a file")


@pytest.mark.parametrize(("name", "folder"), [
    ("face.patch", "face.run"), ("face-1.0", "face-1.0.run"), ("face-1.1", "face-1.1.run"), ("face", "face.run"),
    ("a.b.patch", "a.b.run"), ("x.safetensors", "x.safetensors.run"), ("d.1/face.patch", "d.1/face.run"),
])  # fmt: skip
def test_each_patch_has_a_run_of_its_own(name, folder):
    assert run_folder(Path(name)) == Path(folder)


HOLD = """
import sys, time
from pathlib import Path
from unforget.files.locks import claimed
with claimed([Path(p) for p in sys.argv[1:]]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize(("args", "output"), [
    ([*UNLEARN, "-o", "x.patch"], "x.patch"), ([*UNLEARN, "-o", "x.patch"], "x.run"), ([*EXPORT, "-o", "x"], "x"),
    ([*VERIFY, "--html", "x"], "x"), ([*EDIT, "-o", "x.png"], "x.png"),
], ids=lambda a: a if isinstance(a, str) else a[0])  # fmt: skip
def test_an_output_that_another_process_is_writing(cli, here, args, output, how):
    other = subprocess.Popen([sys.executable, "-c", HOLD, output], stdout=subprocess.PIPE)
    assert other.stdout.readline()
    result = cli(*args, "--force")
    assert result.exit_code == 2
    assert f"another process is writing '{output}'" in " ".join(result.output.split())
    other.send_signal(how)
    other.wait()
    with claimed([Path(output)]):  # it does not outlive its process
        pass
    assert not list(here.glob(".*.lock"))


def test_what_is_claimed_is_let_go_after_a_failure(here):
    with pytest.raises(ZeroDivisionError), claimed([Path("x"), Path("y")]):
        assert len(list(here.glob(".*.lock"))) == 2
        raise ZeroDivisionError
    assert not list(here.glob(".*.lock"))


def test_summaries_are_shared(here):
    Path("s.md").write_text("before\n")
    check_paths(VerifyConfig(model="model", patch=("a.patch",), summary="s.md"))
    with pytest.raises(UsageError, match="'file' exists"):
        check_paths(VerifyConfig(model="model", patch=("a.patch",), report="file"))


def judged(monkeypatch, **more):
    notes, said = [], []
    config = VerifyConfig(model="model", patch=("a.patch",), **{**JUDGE, **more})
    report = api.verify(config, Progress(note=notes.append), said.append)
    assert said == [report]
    return report, [n for n in notes if "could not be written" in n]


def test_a_verdict_is_told_whatever_cannot_be_written(here, monkeypatch):
    first, notes = judged(monkeypatch, report=Path("a.json"))
    assert not notes
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/github/file_commands/step_summary_1")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unforget.api.verifying.junit", full)
    monkeypatch.setattr("unforget.api.verifying.page", lambda *args: 1 / 0)
    report, notes = judged(monkeypatch, report=Path("b.json"), junit=Path("b.xml"), html=Path("b.html"))
    assert report.exit_code == first.exit_code
    assert json.loads(Path("b.json").read_text())["verdict"] == first.verdict
    assert [n.split(" ")[0] for n in notes] == ["'b.xml'", "'b.html'", "'/github/file_commands/step_summary_1'"]
    assert "No space left on device" in notes[0]


def test_the_command_ends_with_the_verdict_all_the_same(cli, here, monkeypatch):
    options = [
        f"--{k.replace('_', '-')}={v[0] if isinstance(v, tuple) else v}" for k, v in JUDGE.items() if k != "cache"
    ]
    plain = cli("verify", "--model", "model", "--patch", "a.patch", *options, "--no-cache")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "/github/file_commands/step_summary_1")
    result = cli("verify", "--model", "model", "--patch", "a.patch", *options, "--no-cache", "--json")
    assert result.exit_code == plain.exit_code in (0, 1, 4)
    assert json.loads(result.stdout)["exit_code"] == result.exit_code
    assert "note: '/github/file_commands/step_summary_1' could not be written" in " ".join(result.stderr.split())


def test_a_summary_that_nobody_reads_keeps_nobody_waiting(here):
    """Into a pipe: of a reader that is there it is read."""
    os.mkfifo("pipe")
    with pytest.raises(OSError, match="No such device"):
        _append_summary(rich(), Path("pipe"))
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    _append_summary(rich(), Path("pipe"))
    assert b"unforget" in os.read(reader, 2**16).lower()
    os.close(reader)


def test_the_pictures_of_a_run_may_fail_its_verdict_not(here, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unforget.api.unlearning.images.write_image", full)
    notes, config = [], UnlearnConfig(
        model="model", target=("target.png",), surrogate=("surrogate.png",), output="x-1.0", retain_count=8,
        sampler_steps=2, num_validation_images=1, max_train_steps=2, stop_margin=1.0,
    )  # fmt: skip
    result = api.unlearn(config, Progress(note=notes.append))
    assert result.folder == Path("x-1.0.run")
    assert result.code in (0, 1)
    assert any("the pictures in 'x-1.0.run' could not be written: No space left" in n for n in notes)
    assert os.stat("x-1.0.run").st_mode & 0o777 == 0o700  # noqa: PTH116
    assert torch.get_num_threads() == json.loads(Path("x-1.0.run/run.json").read_text())["environment"]["threads"]


def test_a_near_copy_is_not_picked_unless_it_is_allowed_and_the_page_has_the_command_of_each(tiny_folder, picture, cli):
    before = sorted(picture.parent.iterdir())
    args = ["edit-surrogate", "-m", tiny_folder, "-t", picture, "--method", "blur", "--html", "all.html"]
    args += ["--near-copy", 0.9, "--retain-count", 8, "--sampler-steps", 2]
    refused = cli(*args)
    assert refused.exit_code == 2 and "is a near-copy of the target" in refused.stderr
    assert sorted(picture.parent.iterdir()) == before
    assert cli(*args, "--allow-near-copy").exit_code == 0
    first, page = (picture.parent / "picture.surrogate.png").read_bytes(), Path("all.html").read_text()
    commands = [shlex.split(html.unescape(text)) for text in re.findall("<code>(.*?)</code>", page)]
    assert [words[words.index("--pick") + 1] for words in commands] == ["1", "2", "3"]
    assert page.count("refused</span>") == 3 and "<script" not in page
    done = cli(*commands[1][1:])
    assert done.exit_code == 0, done.output
    assert (picture.parent / "picture.surrogate.png").read_bytes() != first


def test_a_surrogate_that_is_a_near_copy_is_refused_unless_it_is_allowed(tiny_folder, picture, cli, tmp_path):
    near = Image.open(picture).point(lambda value: min(value + 9, 255))
    near.save(tmp_path / "near.png")
    args = ["unlearn", "-m", tiny_folder, "-t", picture, "-s", "near.png", "--dry-run"]
    refused = cli(*args)
    assert refused.exit_code == 2 and "surrogate 1 is a near-copy of its target" in refused.stderr
    assert cli(*args, "--allow-near-copy").exit_code == 0
