"""What stops a run: signals, a full disk, a folder that cannot be written, too little memory. The real command."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from unforget.files import images
from unforget.files.storage import open_tensors

WITHIN = """
import os, resource, sys
from unforget.cli import main
import unforget.api, diffusers, transformers
from diffusers import DDPMPipeline
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.fixture(scope="module")
def here(tiny_folder, tmp_path_factory):
    """One folder for all, with the patch of an undisturbed run."""
    folder = tmp_path_factory.mktemp("crash")
    for k, name in enumerate(("target", "surrogate")):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(k)) * 2 - 1
        images.write_image(picture, folder / f"{name}.png")
    (folder / "model").symlink_to(tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNFORGET_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        assert told(start(folder, *command(output="whole.patch")))[0] in (0, 1)
        yield folder


@pytest.fixture
def whole(here):
    return (here / "whole.patch").read_bytes()


def command(*more, output="a.patch", steps="60"):
    return [
        "unlearn", "--model", "model", "-t", "target.png", "-s", "surrogate.png", "-o", output, "--retain-count", "8",
        "--max-train-steps", steps, "--stop-margin", "1", "--checkpointing-steps", "1", "--num-validation-images", "1",
        *more,
    ]  # fmt: skip


def start(folder, *args, program=("-m", "unforget"), limits=lambda: None):
    return subprocess.Popen(
        [sys.executable, *program, *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=limits,
    )  # fmt: skip


def told(process):
    """Exit code and what was said, which is never a traceback."""
    stderr = process.communicate(timeout=120)[1]
    assert "Traceback" not in stderr, stderr
    return process.returncode, stderr


def age(path):
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_signals_cost_the_step_in_progress(here, whole):
    checkpoint = here / "a.run" / "checkpoint.safetensors"
    stops = {
        signal.SIGINT: (130, "stopped after step"),
        signal.SIGTERM: (143, "stopped after step"),
        signal.SIGKILL: (-9, ""),
    }
    for k, (number, (code, sentence)) in enumerate(stops.items()):
        before = age(checkpoint)
        process = start(here, *command(*(["--resume"] if k else [])))
        while age(checkpoint) == before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(number)
        found, said = told(process)
        assert found == code, said
        assert sentence in said
        assert "--resume" in said or number == signal.SIGKILL
        open_tensors(checkpoint)
        assert not (here / "a.patch").exists()
    assert told(start(here, *command("--resume")))[0] in (0, 1)
    assert (here / "a.patch").read_bytes() == whole


@pytest.mark.slow
def test_a_disk_that_is_full(here, whole):
    """Files may not grow beyond a limit: the kernel says so where a full disk would."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    for output in ("a.patch", "whole.patch"):  # what was there stays
        code, said = told(start(here, *command("--force", output=output), limits=limit))
        assert (code, said.count("error: ")) == (3, 1), said
        assert "cannot read or write: File too large" in said
        assert not list(here.glob("**/*.partial"))
        assert (here / "whole.patch").read_bytes() == whole
    (here / "a.patch").unlink(missing_ok=True)
    assert told(start(here, *command("--resume")))[0] in (0, 1)
    assert (here / "a.patch").read_bytes() == whole


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(here):
    if os.geteuid() == 0:  # root may write wherever there is a file system that can be written
        code, said = told(start(here, *command(output="/proc/a.patch")))
        assert code in (2, 3)
    else:
        (here / "locked").mkdir(mode=0o555)
        code, said = told(start(here, *command(output="locked/a.patch")))
        assert code == 2
    assert said.count("error: ") == 1


@pytest.mark.slow
def test_too_little_memory(here):
    more = ["--train-batch-size", "512", "--retain-batch-size", "512", "--micro-batch", "512"]
    code, said = told(start(here, str(160 * 2**20), *command(*more, output="b.patch"), program=("-c", WITHIN)))
    assert (code, said.count("error: ")) == (3, 1), said
    assert "out of memory" in said
    assert "--micro-batch" in said
