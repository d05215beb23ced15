"""Two processes on this machine find what one finds."""

import json
import os
import subprocess
import sys

import pytest
import torch

from unforget.files import images
from unforget.files.patch import Patch

POLICY = """
[verify]
level = "quick"
max_rate = 0.2
paired = 40
controls = 8
draws = 2
timestep = [400]
sampler_steps = 3
similarity = ["pixels"]
"""
RUN = (
    "unlearn", "--model", "tiny", "-t", "target.png", "-s", "surrogate.png", "--retain-count", "40",
    "--max-train-steps", "6", "--learning-rate", "1e-3", "--mixed-precision", "no", "--threads", "1",
    "--stop-margin", "0.9",
)  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "tiny").symlink_to(tiny_folder)
    (folder / "unforget.toml").write_text(POLICY)
    for k, name in enumerate(("target", "surrogate")):
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(k)) * 2 - 1
        images.write_image(picture, folder / f"{name}.png")
    return folder


def launched(folder, processes, *args):
    """What `accelerate launch -m unforget ARGS` does on one machine."""
    return started(folder, processes, "-m", "unforget", *args)


def started(folder, processes, *args):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--no-python"]
    command = [sys.executable, *(launcher if processes > 1 else []), *([sys.executable] if processes > 1 else [])]
    cache = str(folder / f"cache-{processes}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "UNFORGET_CACHE": cache, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run([*command, *args], cwd=folder, env=env, capture_output=True, text=True)


EXCHANGE = """
import pathlib, sys, torch
from unforget.core import distributed
assert distributed.start("cpu") == "cpu"
n, me = distributed.world_size(), distributed.rank()
made = []
def rows(part):
    made.append(part)
    return torch.full((part, 2), part / 3)
whole = distributed.all_gather([1, 2, 3, 4, 5], rows)
assert torch.equal(whole, torch.cat([torch.full((k, 2), k / 3) for k in range(1, 6)]))
assert made == [1, 2, 3, 4, 5][me::n]
total = torch.full((3,), me + 1.0)
distributed.all_reduce([total])
assert total.tolist() == [n * (n + 1) / 2] * 3
assert distributed.gather([me]) == list(range(n))
assert distributed.broadcast(me == 0) and not distributed.broadcast(me == 1)
assert distributed.any_process(me == n - 1) and not distributed.any_process(False)
distributed.barrier()
assert distributed.is_main() == (me == 0)
assert n > 1 or "accelerate" not in sys.modules
pathlib.Path(f"{me}.done").touch()  # not printed: what two processes print may interleave
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_processes_tell_each_other(tmp_path, processes):
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    result = started(tmp_path, processes, "exchange.py")
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.done"))) == processes


@pytest.mark.slow
def test_two_processes_do_what_one_does(here):
    for n in (1, 2):
        result = launched(here, n, *RUN, "-o", f"{n}.patch", "--json")
        assert result.returncode == 1, result.stderr  # so few updates forget nothing
        assert json.loads(result.stdout)["steps"] == 6  # the first process alone speaks
        assert not list(here.glob("**/*.partial"))
    one, two = (Patch.load(here / f"{n}.patch") for n in (1, 2))
    for name, tensor in one.tensors.items():
        torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-4, atol=5e-6)  # updates are of 1e-3
    assert two.provenance.targets == one.provenance.targets

    for n in (1, 2):
        result = launched(
            here, n, "verify", "--model", "tiny", "--patch", "1.patch", "--nonce", "1", "--report", f"{n}.json"
        )
        assert "does not reproduce it" in result.stdout
        assert result.returncode == (4 if n == 1 else 1), result.stderr  # torchrun's own, where a process has one
    reports = [json.loads((here / f"{n}.json").read_text()) for n in (1, 2)]
    for report in reports:
        del report["seconds"], report["date"], report["checksum"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("asked", [
    {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}, {"ACCELERATE_USE_DEEPSPEED": "true"},
])  # fmt: skip
def test_sharded_weights_are_refused(cli, tiny_folder, picture, monkeypatch, asked):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    result = cli("unlearn", "--model", tiny_folder, "-t", picture, "-o", "a.patch")
    assert result.exit_code == 2
    assert "does not train sharded weights" in result.output


@pytest.mark.slow
def test_what_all_processes_see_is_an_error_of_each(here):
    result = launched(here, 2, "unlearn", "--model", "tiny", "-t", "no.png")
    assert result.returncode == 1  # the launcher's own
    # Both write to one pipe, in the middle of each other's lines, and the launcher may end one before it speaks.
    said = result.stderr.count("there is no file 'no.png'")
    assert said == 1 or (said == 2 and "process 1: " in result.stderr)
