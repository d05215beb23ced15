"""A run that is stopped anywhere goes on to the same bytes, and never starts afresh unasked."""

import json
import os
import shutil
import signal

import pytest
import torch
from conftest import STEPS, rewrite, stop_at

from unforget.api import export, unlearn, verify
from unforget.api.common import pictures
from unforget.config import ExportConfig, VerifyConfig
from unforget.core.types import Progress
from unforget.errors import Interrupted, Terminated, UsageError
from unforget.families.recipes import pixel_recipes
from unforget.files import images
from unforget.files.patch import Patch
from unforget.files.storage import checksummed, digest, open_tensors, write_tensors
from unforget.unlearning import trainer
from unforget.unlearning.run_directory import HEADER


@pytest.mark.parametrize("step", [1, 20, *(pytest.param(k, marks=pytest.mark.slow) for k in (19, 21, 27))])
def test_a_stopped_run_goes_on_to_the_same_bytes(config, monkeypatch, step):
    whole = unlearn(config("whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Interrupted, match=f"stopped after step {step} of {STEPS}"):
            unlearn(config())
    assert not config().output.exists()
    rest = []
    monkeypatch.setattr(trainer, "_row", lambda u, *a, row=trainer._row: rest.append(u.number) or row(u, *a))
    result = unlearn(config(resume=True))
    assert rest[0] == step + 1
    assert config().output.read_bytes() == config("whole").output.read_bytes()
    assert (result.steps, result.stopped, result.table) == (whole.steps, whole.stopped, whole.table)
    logs = [(config(n).output.with_suffix(".run") / "metrics.jsonl").read_text() for n in ("a", "whole")]
    assert logs[0] == logs[1]
    assert not (result.folder / "checkpoint.safetensors").exists()


def test_lora_too(sd3_folder, config, monkeypatch):
    options = {
        "model": str(sd3_folder), "prompt": ("a red square",), "retain_count": 12, "max_train_steps": 4,
        "cooldown_steps": 2, "retain_batch_size": 2, "train": "lora", "rank": 2, "forget_range": (50, 1000),
    }  # fmt: skip
    unlearn(config("whole", **options))
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        unlearn(config(**options))
    unlearn(config(resume=True, **options))
    assert config().output.read_bytes() == config("whole").output.read_bytes()


QUICK = ("salun",)  # its mask is in the checkpoint, and it needs no surrogate; `test_training` resumes all of them


@pytest.mark.parametrize(
    "recipe", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in pixel_recipes() if n != "default"]
)
def test_every_recipe_goes_on_to_the_same_bytes_and_is_verified_and_exported(recipe, config, monkeypatch, tmp_path):
    """With two targets, and without surrogates where the recipe needs none."""
    images.write_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(9)) * 2 - 1, tmp_path / "b.png")
    needs = pixel_recipes()[recipe].objective.needs_surrogate
    options = {
        "recipe": recipe, "target": (tmp_path / "target.png", tmp_path / "b.png"), "max_train_steps": 4,
        "learning_rate": 1e-4, "cooldown_steps": None, "stop_margin": None,
        "surrogate": (tmp_path / "surrogate.png",) * 2 if needs else (),
    }  # fmt: skip
    notes = []
    whole = unlearn(config("whole", **options), Progress(note=notes.append))
    assert any("no surrogate" in note for note in notes) != needs
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        unlearn(config(**options))
    monkeypatch.undo()
    assert unlearn(config(resume=True, **options)).table == whole.table
    assert config().output.read_bytes() == config("whole").output.read_bytes()
    made = Patch.load(whole.output).provenance
    assert (len(made.targets), len(made.surrogates)) == (2, 2 * needs)
    judged = verify(VerifyConfig(
        model=config().model, patch=whole.output, level="quick", draws=2, controls=8, paired=16, sampler_steps=2,
        max_rate=0.5, similarity="pixels", cache=False,
    ))  # fmt: skip
    assert [t.id for t in judged.targets] == made.targets
    figures = {check.figure for check in judged.checks}
    assert ("nearer_surrogate" in figures) == needs
    exported = export(ExportConfig(model=config().model, patch=whole.output, output=tmp_path / "exported"))
    assert (exported.output / "model_index.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["esd", "concept-ablation", "salun"])
def test_under_a_prompt_too(recipe, sd3_folder, config, monkeypatch):
    options = {
        "model": str(sd3_folder), "recipe": recipe, "prompt": ("a red square",), "retain_count": 12,
        "max_train_steps": 4, "rank": 2, "cooldown_steps": None, "stop_margin": None, "surrogate": (),
        "retain_batch_size": 2,
    }  # fmt: skip
    whole = unlearn(config("whole", **options))
    assert whole.replaced  # nothing was to take its place
    stop_at(monkeypatch, 2)
    with pytest.raises(Interrupted):
        unlearn(config(**options))
    unlearn(config(resume=True, **options))
    assert config().output.read_bytes() == config("whole").output.read_bytes()


@pytest.mark.slow
def test_killed_before_the_first_update(config, monkeypatch):
    unlearn(config("whole"))
    for name in ("trainable", "denoise"):  # before training, and while the retain set is drawn
        with monkeypatch.context() as patch:
            patch.setattr(f"unforget.families.model.DiffusionModel.{name}", lambda *a, **k: 1 / 0)
            patch.setenv("UNFORGET_CACHE", str(config().output.parent / "empty"))
            with pytest.raises(ZeroDivisionError):
                unlearn(config(force=True))
        unlearn(config(resume=True))
        assert config().output.read_bytes() == config("whole").output.read_bytes()


def test_sigterm_has_its_own_code(config, monkeypatch):
    stop_at(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(Terminated) as caught:
        unlearn(config())
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_ended_is_told_again(config, monkeypatch):
    first = unlearn(config())
    monkeypatch.setattr("unforget.unlearning.run.Trainer", None)
    assert unlearn(config(resume=True)) == first
    config().output.write_bytes(b"something else")
    with pytest.raises(UsageError, match="not a patch"):
        unlearn(config(resume=True))


def stopped(config, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            unlearn(config())
    return config().output.with_suffix(".run")


def test_missing_or_foreign_is_an_error_never_a_fresh_start(config, monkeypatch):
    with pytest.raises(UsageError, match="no run to resume"):
        unlearn(config(resume=True))
    folder = stopped(config, monkeypatch)
    with pytest.raises(UsageError, match="did not end"):
        unlearn(config())
    with pytest.raises(UsageError, match="another one: it differs in seed"):
        unlearn(config(resume=True, seed=7))
    swapped = {"target": config().surrogate, "surrogate": config().target}
    with pytest.raises(UsageError, match="differs in surrogate, target"):
        unlearn(config(resume=True, **swapped))
    stop_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        unlearn(config("third", seed=7))
    before = (folder / "checkpoint.safetensors").read_bytes()
    shutil.copy(config("third").output.with_suffix(".run") / "checkpoint.safetensors", folder)
    with pytest.raises(UsageError, match="of another run"):
        unlearn(config(resume=True))
    (folder / "checkpoint.safetensors").write_bytes(before)
    other = config("b")
    shutil.copytree(folder, other.output.with_suffix(".run"))
    rewrite(other.output.with_suffix(".run") / "run.json", inputs={})
    with pytest.raises(UsageError, match="damaged"):
        unlearn(config("b", resume=True))
    assert (folder / "checkpoint.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["run.json", "prepared.safetensors", "checkpoint.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100])
def test_a_damaged_file_is_an_error(config, monkeypatch, name, content):
    folder = stopped(config, monkeypatch)
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        unlearn(config(resume=True))


@pytest.mark.parametrize("name", ["prepared.safetensors", "checkpoint.safetensors"])
def test_what_is_no_file_is_an_error_never_a_fresh_start(config, monkeypatch, name):
    path = stopped(config, monkeypatch) / name
    for target in ("pipe", "/dev/zero", "nowhere", "."):
        path.unlink()
        os.mkfifo(path) if target == "pipe" else path.symlink_to(target)
        with pytest.raises(UsageError, match="damaged"):
            unlearn(config(resume=True))


@pytest.mark.parametrize("how", ["huge", "endless"])
def test_of_a_log_no_more_is_read_than_was_written(config, monkeypatch, how):
    log = stopped(config, monkeypatch) / "metrics.jsonl"
    if how == "huge":
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(lines[0][:-2])
        os.truncate(log, 2**40)
    else:
        log.unlink()
        log.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="is damaged"):
        unlearn(config(resume=True))


def test_a_run_of_another_version_is_refused_in_a_sentence(config, monkeypatch):
    path = stopped(config, monkeypatch) / "run.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({"asked": found["asked"], "how": found["environment"], "finished": None}))
    with pytest.raises(UsageError, match="of another run or version"):
        unlearn(config(resume=True))


def resealed(path, change):
    """A file of a run that says something else, its digest and checksums right: of another version, or hostile."""
    opened = open_tensors(path)
    tensors, header = opened.load(), json.loads(opened.metadata[HEADER])
    change(tensors, header["values"])
    header["digest"] = digest(tensors)
    write_tensors(tensors, {HEADER: json.dumps(checksummed(header))}, path)


def turned(name):
    return lambda t, v: t.update({name: t[name].flatten()[None]})


CHANGED = {
    "checkpoint": [
        lambda t, v: t.clear(), lambda t, v: t.pop("generator"), lambda t, v: t.pop("weight.0"), turned("weight.0"),
        lambda t, v: t.update(generator=torch.zeros(3)), turned("optimizer.0.exp_avg"), lambda t, v: v.clear(),
        turned("optimizer.0.step"), *(
            lambda t, v, n=n: t.update({n: t[n].long()})
            for n in ("weight.0", "optimizer.0.exp_avg", "optimizer.0.exp_avg_sq", "optimizer.0.step")
        ),
        *(lambda t, v, n=n, odd=odd: v.update({n: odd})
          for n in ("step", "start", "learning_rate", "reached", "margin", "optimizer") for odd in ("x", -1, [1])),
    ],
    "prepared": [
        *(turned(f"{n}.{k}") for n in ("instances", "encoded") for k in ("target", "surrogate")),
        *(turned(f"{n}.x_0") for n in ("retain", "neighbours")), lambda t, v: t.pop("prior_counts"),
        lambda t, v: t.update(prior_counts=torch.zeros(7)), lambda t, v: t["retain.prompt_ids"].fill_(99),
        lambda t, v: t["retain.x_0"].fill_(torch.nan), lambda t, v: v.update(instances=[]),
        lambda t, v: t.update({"retain.x_0": t["retain.x_0"].double()}), lambda t, v: v.update(instances=7),
        lambda t, v: v.update(encoded=[["x", [99]]]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_a_file_of_a_run_that_says_something_else_is_an_error(config, monkeypatch, name):
    path = stopped(config, monkeypatch) / f"{name}.safetensors"
    content = path.read_bytes()
    for change in CHANGED[name]:
        path.write_bytes(content)
        resealed(path, change)
        with pytest.raises(UsageError, match="of another run or version"):
            unlearn(config(resume=True))


def test_an_end_that_says_something_else_is_an_error(config):
    unlearn(config(max_train_steps=2, cooldown_steps=1))
    path = config().folder / "run.json"
    found = json.loads(path.read_text())
    changes = {"steps": "x"}, {"table": [{}]}, {"table": {}}, {"drawn": [1]}, {"more": 1}, {"digest": None}
    for finished in (*(found["finished"] | change for change in changes), 7, ["x"]):
        path.write_text(json.dumps(checksummed(found | {"finished": finished})))
        with pytest.raises(UsageError, match="version"):
            unlearn(config(resume=True, max_train_steps=2, cooldown_steps=1))


def test_what_the_machine_does_otherwise_is_said(config, monkeypatch):
    stopped(config, monkeypatch)
    notes = []
    unlearn(config(resume=True, micro_batch=1), Progress(note=notes.append))
    assert any("micro_batch was None and is 1" in n for n in notes)


def test_a_full_disk_costs_the_step_in_progress(config, monkeypatch):
    """The checkpoint that cannot be written leaves the one before it as it was."""
    from unforget.files import storage

    write = storage.write_tensors
    left = {"writes": 5}

    def full(tensors, metadata, path, **options):
        left["writes"] -= 1
        if left["writes"] < 0:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        write(tensors, metadata, path, **options)

    unlearn(config("whole"))
    with monkeypatch.context() as patch:
        patch.setattr("unforget.unlearning.run_directory.write_tensors", full)
        with pytest.raises(OSError, match="No space"):
            unlearn(config())
    folder = config().output.with_suffix(".run")
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint.safetensors", "metrics.jsonl", "prepared.safetensors", "run.json"
    ]  # fmt: skip
    assert json.loads(open_tensors(folder / "checkpoint.safetensors").metadata["unforget.run"])["values"]["step"] == 4
    unlearn(config(resume=True))
    assert config().output.read_bytes() == config("whole").output.read_bytes()


def test_the_command_takes_both_spellings(cli, config, monkeypatch, tmp_path):
    stopped(config, monkeypatch)
    common = ["unlearn", "--model", config().model, "-t", "target.png", "-o", "a.patch"]
    result = cli(*common, "--resume_from_checkpoint", "elsewhere")
    assert result.exit_code == 2
    assert "is not the run of a.patch" in " ".join(result.output.split())
    result = cli(*common, "--resume-from-checkpoint", "latest")
    assert "it differs in" in " ".join(result.output.split())
    assert cli("unlearn", "--model", config().model, "-t", "target.png", "-o", "c.patch", "--resume").exit_code == 2


def test_later_patches_begin_with_earlier_ones(config, tmp_path):
    """The ledger: a second patch holds the first, names its targets, and they are looked at again."""
    first = unlearn(config("first"))
    options = {"target": config().surrogate, "surrogate": config().target, "patch": (first.output,)}
    second = unlearn(config("second", **options))
    made, before = (Patch.load(p).provenance for p in (second.output, first.output))
    assert [e.targets for e in made.earlier] == [before.targets]
    assert made.earlier[0].digest == Patch.load(first.output).digest
    assert made.base_digest == before.base_digest
    assert {row["target"] for row in second.table} == {*made.targets, *before.targets}
    assert len(list(second.folder.glob("target-*.png"))) == 2
    with pytest.raises(UsageError, match="is forgotten already"):
        unlearn(config("third", patch=(first.output,)))


def test_targets_with_and_without_surrogates_lie_side_by_side(config, tmp_path):
    """A run without a surrogate, and one that begins with its patch and has one: each target keeps its own."""
    first = unlearn(config("first", recipe="siss", max_train_steps=2, cooldown_steps=0, stop_margin=None, surrogate=()))
    assert [p.name for p in first.folder.glob("*-*.png")] == ["target-0.png"]
    options = {"target": config().surrogate, "surrogate": config().target, "patch": (first.output,)}
    notes = []
    second = unlearn(config("second", max_train_steps=2, **options), Progress(note=notes.append))
    assert any("1 target(s) of the earlier patches cannot be looked at again" in note for note in notes)
    shutil.copy(first.folder / "target-0.png", second.folder / "target-1.png")  # as a user would who has it
    pairs = [(t.name, s and s.name) for t, s in pictures(second.output)]
    assert pairs == [("target-0.png", "surrogate-0.png"), ("target-1.png", None)]
    asked = VerifyConfig(
        model=config().model, patch=second.output, level="quick", draws=2, controls=8, paired=16, sampler_steps=2,
        max_rate=0.5, similarity="pixels", cache=False,
    )  # fmt: skip
    checks = verify(asked).checks
    own, earlier = Patch.load(second.output).provenance.targets[0], Patch.load(first.output).provenance.targets[0]
    assert {c.target for c in checks if c.figure == "nearer_surrogate"} == {own}
    assert {c.target for c in checks if c.figure == "recall"} == {own, earlier}
