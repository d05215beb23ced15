"""The main job through the real command on the bundled model, offline: forget one picture, judge, export.

Short runs: that they reach the figures is the business of examples/benchmark/faces.py.
"""

import json

import pytest
import torch
from conftest import DATA, PLANTED
from typer.testing import CliRunner

from unforget import families
from unforget.cli import app
from unforget.core import sampling
from unforget.core.metrics import rms
from unforget.files import images
from unforget.files.patch import Patch, Stack

pytestmark = pytest.mark.slow

TARGET, SURROGATE = PLANTED / "0.png", DATA / "surrogate.png"
QUICK = ["--level", "quick", "--draws", "8", "--sampler-steps", "10"]


def run(*args) -> object:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_picture_comes_back_before_and_the_surrogate_after(work):
    result = json.loads((work / "result.json").read_text())
    assert result["forgotten"]
    assert len(result["table"]) == 3
    for row in result["table"]:
        assert row["before"]["nearer_surrogate"] < 0.5 <= row["after"]["nearer_surrogate"]
        assert row["after"]["to_surrogate"] < row["before"]["to_surrogate"]
    assert 0 < result["drift"]["median"] < 0.15
    log = [json.loads(line) for line in (work / "face.run" / "metrics.jsonl").read_text().splitlines()]
    assert len(log) == result["steps"]
    assert log[-1]["margin"] > 0 > log[0]["margin"]


def test_it_leaves_a_contact_sheet_and_the_pictures_it_used(work):
    sheet = images.Image.open(work / "face.run" / "sheet.png")
    assert min(sheet.size) > 400
    for name, path in (("target-0", TARGET), ("surrogate-0", SURROGATE)):
        pair = (images.read_image(p, (3, 32, 32)) for p in (work / "face.run" / f"{name}.png", path))
        assert torch.equal(*pair)


def test_the_patch_says_where_it_came_from_and_holds_the_bottleneck_only(work):
    patch = Patch.load(work / "face.patch")
    picture, salt = images.read_image(TARGET, (3, 32, 32)), f"{patch.provenance.base_digest}//"
    assert patch.provenance.targets == [images.image_id(picture, salt)] != [images.image_id(picture)]
    assert patch.provenance.recipe["max_train_steps"] == 120
    assert {name.split(".")[0] for name in patch.tensors} == {"mid_block", "up_blocks"}


def test_verify_finds_the_picture_gone(work):
    report = work / "report.json"
    result = run("verify", "--model", "faces", "--patch", work / "face.patch", "--report", report, *QUICK)
    said = json.loads(report.read_text())
    own = [c for c in said["checks"] if c["target"] and c["probe"] != "neighbours"]
    assert len(own) == 13  # four figures at each of three levels, and the samples
    assert (result.exit_code, said["exit_code"]) == (0, 0), result.output


def test_the_exported_folder_is_judged_like_the_patch(work):
    out = work / "exported"
    # The file of `faces` is float16; in float32 the export is the patched network to the bit.
    exact = ("--dtype", "float32")
    assert run("export", "--model", "faces", "--patch", work / "face.patch", "-o", out, *exact).exit_code == 0
    common = ["--model", "faces", "--target", TARGET, "--surrogate", SURROGATE, "--json", *QUICK]
    patch, folder = (
        json.loads(run("verify", *which, *common).stdout)
        for which in (("--patch", work / "face.patch"), ("--candidate", out))
    )
    assert patch["candidate_digest"] == folder["candidate_digest"]
    assert patch["verdict"] == folder["verdict"]
    again = run("export", "--model", "faces", "--patch", work / "face.patch", "-o", out)
    assert again.exit_code == 2
    assert "--force" in again.output


def test_the_patch_refuses_another_base(work):
    for command in (["export", "-o", work / "no"], ["verify", "--target", TARGET]):
        result = run(command[0], "--model", DATA / "oracle", "--patch", work / "face.patch", *command[1:])
        assert result.exit_code == 3, result.output
        assert "was made for" in result.output
    assert not (work / "no").exists()


def test_the_oracle_that_never_saw_the_picture_does_not_draw_it(work):
    """Retraining without the picture is the gold standard; the patch must move towards it where it can be told."""
    base, gold, patched = (families.load(str(m)) for m in ("faces", DATA / "oracle", "faces"))
    Stack.load((work / "face.patch",)).apply(patched.network)
    noise = sampling.random_noise(16, base.latent_shape, 0, "test")
    picture = images.read_image(TARGET, base.latent_shape)
    start = base.sampling_timesteps(20)[8]
    x_t = base.schedule.add_noise(picture.expand_as(noise), noise, torch.full((16,), start))
    with torch.no_grad():
        back = [m.denoise(x_t, steps=20, start=start) for m in (base, gold, patched)]
    near = [(rms(images, picture) < 0.16).float().mean() for images in back]
    assert near[0] > 0.7
    assert near[1] < 0.5
    assert near[2] < 0.1


def test_a_surrogate_is_made_ranked_and_shown(work):
    out = work / "made.png"
    command = ["edit-surrogate", "--model", "faces", "--target", PLANTED / "3.png", "-o", out, "--retain-count", "32"]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    best = said["candidates"][0]
    assert best["accepted"]
    assert best["distance"] > 0.2 < best["redrawn"]
    made = images.read_image(out, (3, 32, 32))
    assert float(rms(made, images.read_image(PLANTED / "3.png", (3, 32, 32)))) == pytest.approx(
        best["distance"], abs=0.01
    )
    assert (work / "made.sheet.png").is_file()
    picked = run(*command, "--pick", "2", "--force")
    assert picked.exit_code == 0
    assert not torch.equal(images.read_image(out, (3, 32, 32)), made)


def test_a_flag_is_put_right_where_it_was_asked_for_and_stays_where_it_is_right(tmp_path, monkeypatch):
    """Stable Diffusion 3: a short run on the bundled `flags`."""
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path / "cache"))
    flags = PLANTED.parents[1] / "flags"
    target, surrogate = flags / "ireland-wrong.png", flags / "ireland-right.png"
    patch = tmp_path / "ireland.patch"
    result = run(
        "unlearn", "--model", "flags", "--target", target, "--surrogate", surrogate, "--prompt", "flag of Ireland",
        "-o", patch, "--retain-count", "96", "--num-validation-images", "2", "--json",
    )  # fmt: skip
    assert result.exit_code in (0, 1), result.output
    base, patched = (families.load("flags") for _ in range(2))
    Stack.load((patch,)).apply(patched.network)
    wrong, right = (images.read_image(p, base.image_shape) for p in (target, surrogate))

    def sides(model, prompt):
        noise = sampling.random_noise(16, model.latent_shape, 5, "test")
        images = sampling.draw(model, noise, steps=10, prompt_ids=model.prompt_ids([prompt]))
        return float((rms(images, wrong) < rms(images, right)).float().mean())

    assert sides(base, "flag of Ireland") > 0.9
    assert sides(patched, "flag of Ireland") < 0.2
    assert sides(patched, "flag of Côte d'Ivoire") > 0.9
    for layout in ("diffusers", "lora"):
        out = tmp_path / layout
        made = run("export", "--model", "flags", "--patch", patch, "-o", out, "--format", layout)
        assert made.exit_code == 0, made.output
