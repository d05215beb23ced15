"""The real command: exact codes, one sentence, nothing written."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import PLANTED

import unforget
from unforget.api import export, unlearn
from unforget.config import ExportConfig, UnlearnConfig
from unforget.files.patch import Patch

SHORT = {
    "retain_count": 8,
    "sampler_steps": 4,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "retain_batch_size": 2,
}


def said(result) -> str:
    return " ".join((result.output + (result.stderr or "")).split())


def test_every_public_name_is_there_and_costs_nothing_before_it_is_asked_for():
    assert set(unforget._HOME) == set(unforget.__all__)
    for name in unforget.__all__:
        assert getattr(unforget, name).__name__ in (name, "look")  # `show` is its module's `look`
    with pytest.raises(AttributeError, match="has no attribute 'recipe'"):
        unforget.recipe  # noqa: B018
    code = "import sys, unforget; assert not {'torch', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["unlearn", "--model", "faces"], "error: target is missing See"),
        (["unlearn", "--model", "faces", "--target", "demo:9"], "demo:3 See"),
        (["unlearn", "--model", "faces", "--target", "demo:0", "--max-train-steps", "few"], "integer, found 'few' See"),
        (["unlearn", "--model", "faces", "--target", "no.png"], "there is no file 'no.png'"),
        (["unlearn", "--model", "faces", "--target", "picture.png"], "is 16x16 pixels, the model's images are 32x32"),
        (["unlearn", "--model", "faces", "-t", PLANTED / "0.png", "--surrogate", PLANTED / "0.png"], "is its target"),
        (["unlearn", "--model", "faces", "--target", PLANTED / "0.png", "--max-train-steps", "0"], "max_train_steps"),
        (["unlearn", "--model", "faces", "--target", PLANTED / "0.png", "--lr", "-1"], "learning_rate"),
        (["unlearn", "--model", "faces", "--target", PLANTED / "0.png", "--recipe", "magic"], "no recipe 'magic'"),
        (["unlearn", "--model", "faces", "--target", PLANTED / "0.png", "-o", "no/a.patch"], "there is no folder"),
        (["unlearn", "--model", "faces", "--target", PLANTED / "0.png", "-o", "picture.png"], "give another name"),
        (["verify", "--model", "faces"], "either --patch or --candidate"),
        (["verify", "--model", "faces", "--patch", "no.patch"], "there is no patch"),
        (["verify", "--model", "faces", "--patch", "."], "'.' is a folder, and is to be a patch"),
        (["verify", "--model", "faces", "--patch", "no.patch", "--timestep", "5000"], "1000, found '5000' See"),
        (["verify", "--model", "faces", "--candidate", "no", "-t", "demo:0"], "there is no candidate 'no'"),
        (["verify", "--model", "faces", "--candidate", "a/b.safetensors", "-t", "demo:0"], "no candidate 'a/b"),
        (["export", "--model", "faces", "--patch", "picture.png", "-o", "out"], "is not a patch"),
        (["edit-surrogate", "--model", "faces", "-t", PLANTED / "0.png", "--box", "9,9,99,9"], "leaves the 32x32"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_sentence_and_nothing_written(cli, picture, args, sentence, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = cli(*args)
    assert result.exit_code == 2, said(result)
    assert sentence in said(result)
    assert "Traceback" not in said(result)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("args", "code"), [
    (["nonsense"], 2), (["unlearn", "--nonsense"], 2), (["unlearn", "--model", "faces"], 2), (["show", "no.patch"], 2),
    (["unlearn", "--model", "faces", "-t", "demo:0", "-s", "demo:0"], 2),
    (["unlearn", "--model", "faces", "-t", "demo:0", "--use-8bit-adam"], 3),
])  # fmt: skip
def test_an_error_is_json_where_json_is_asked_for(cli, monkeypatch, args, code):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    result = cli(*args, "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["exit_code"]) == (code, code)
    assert result.stderr.endswith(f"error: {told['error']}\n  {told['hint']}\n")
    assert not cli(*args).stdout


@pytest.mark.slow
def test_what_is_refused_late_does_not_block_the_corrected_command(cli, tmp_path):
    (tmp_path / "retain").mkdir()
    shutil.copy(PLANTED / "0.png", tmp_path / "retain")
    args = ["unlearn", "--model", "faces", "-t", "demo:0", "-s", "demo:1", "-o", "a.patch", "--max-train-steps", 1]
    result = cli(*args, "--retain", "retain")
    assert result.exit_code == 2 and "every picture of the retain set is a near-copy" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["retain"]
    shutil.copy(PLANTED / "2.png", tmp_path / "retain")
    assert cli(*args, "--retain", "retain").exit_code in (0, 1)


@pytest.mark.slow
def test_the_base_verified_against_itself_is_not_forgotten(cli, tmp_path):
    base = unforget.__path__[0] + "/families/models/faces"
    result = cli(
        "verify", "--model", "faces", "--candidate", base, "--target", PLANTED / "0.png", "--level", "quick",
        "--draws", 4, "--sampler-steps", 5, "--max-rate", 0.005, "--paired", 32, "--report", "report.json",
    )  # fmt: skip
    assert result.exit_code == 1, said(result)
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "failed"


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes_and_exports(tmp_path, tiny_folder):
    def run(name):
        config = UnlearnConfig(model="faces", target=(PLANTED / "0.png",), surrogate=(PLANTED / "1.png",),
                               output=tmp_path / name, **SHORT)  # fmt: skip
        return unlearn(config)

    result = run("a.patch")
    run("b.patch")
    assert (tmp_path / "a.patch").read_bytes() == (tmp_path / "b.patch").read_bytes()
    assert len((result.folder / "metrics.jsonl").read_text().splitlines()) == 2
    config = ExportConfig(model="faces", patch=tmp_path / "a.patch", output=tmp_path / "out", dtype="float32")
    out = export(config).output
    from diffusers import DDPMPipeline

    weights = DDPMPipeline.from_pretrained(out).unet.state_dict()
    assert all((weights[k] == v).all() for k, v in Patch.load(tmp_path / "a.patch").tensors.items())
