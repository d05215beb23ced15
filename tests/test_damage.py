"""A flipped bit is noticed, in whatever of ours is read back: an error, or the same content (a blank in JSON)."""

import json
import random

import pytest
import torch

from unforget import families
from unforget.api import show
from unforget.errors import CannotRun, UsageError
from unforget.exports.manifest import AppliedPatch, ExportManifest, Verified
from unforget.files.patch import HEADER, Patch, Provenance, Stack
from unforget.files.storage import BadFile, checksummed, digest, undamaged, write_json, write_tensors
from unforget.unlearning.run_directory import RunDirectory
from unforget.verification.report import Report, Target

FLIPS = 1500


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))


def provenance(**changes):
    fields = {
        "base": "net", "base_digest": digest(network().state_dict()), "targets": ["7f"], "surrogates": ["\u00e9"],
        "prompts": ["a red square"], "recipe": {"rate": 1e-3, "surgery": {"kind": "project"}}, "seed": 3, "steps": 4,
        "versions": {"torch": "2"},
    }  # fmt: skip
    return Provenance(**{**fields, **changes})


def patch(**changes):
    net = network()
    tensors = {"1.weight": net[1].weight.detach() + 1}
    after = {**net.state_dict(), **tensors}
    return Patch(tensors, provenance(patched_digest=digest(after), **changes))


def lora(**changes):
    tensors = {"1.lora_A.weight": torch.ones(1, 4), "1.lora_B.weight": torch.ones(2, 1)}
    made = Patch(tensors, provenance(holds="lora", adapter={"rank": 1, "alpha": 1}))
    after = Stack((made,)).digest(network().state_dict())
    return Patch(tensors, made.provenance.model_copy(update={"patched_digest": after, **changes}))


def flips(path):
    """Leaves the file with one bit flipped at a time: every bit of a small file, else as many, drawn by a seed."""
    sound = path.read_bytes()
    for flip in random.Random(0).sample(range(8 * len(sound)), min(8 * len(sound), FLIPS)):
        damaged = bytearray(sound)
        damaged[flip // 8] ^= 1 << flip % 8
        path.write_bytes(damaged)
        yield flip
    path.write_bytes(sound)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def everything_is_noticed(path, read, least=0.9):
    """What is read of the damaged file is refused in a sentence, or is what it was."""
    first, noticed, tried = read(), 0, 0
    for flip in flips(path):
        tried += 1
        try:
            found = read()
        except UsageError as error:
            noticed += 1
            assert len(error.message.splitlines()) == 1
            continue
        assert same(found, first), f"bit {flip} of {path.name}"
    assert noticed >= least * tried


@pytest.mark.parametrize("make", [patch, lora])
def test_a_patch(tmp_path, make):
    path = tmp_path / "a.patch"
    make().save(path)

    def read():
        found = Patch.load(path)
        return {"tensors": found.tensors, "said": found.provenance.model_dump()}

    everything_is_noticed(path, read, least=1)


def test_a_patch_of_the_version_before_is_read_and_a_downgraded_one_is_not(tmp_path):
    made = patch()
    said = {**made.provenance.model_dump(), "format": 2, "digest": digest(made.tensors)}
    write_tensors(made.tensors, {HEADER: json.dumps(said)}, tmp_path / "old")
    assert Patch.load(tmp_path / "old").tensors.keys() == made.tensors.keys()
    write_tensors(made.tensors, {HEADER: json.dumps({**said, "format": 3})}, tmp_path / "new")
    with pytest.raises(UsageError, match="checksum does not fit"):
        Patch.load(tmp_path / "new")


def test_a_patch_must_make_of_the_base_what_it_made_where_it_was_written():
    Stack((patch(),)).apply(network())
    other = patch()
    other.provenance.__dict__["patched_digest"] = "0" * 64
    with pytest.raises(CannotRun, match=r"with the patch on, the model is .*, and was 000000000000 where it was made"):
        Stack((other,)).apply(network())


def test_of_a_lora_that_is_a_note():
    """Its factors are multiplied, and another machine may round the sums otherwise."""
    notes = []
    Stack((lora(),)).apply(network(), note=notes.append)
    assert not notes
    Stack((lora(patched_digest="0" * 64),)).apply(network(), note=notes.append)
    assert ["rounded otherwise" in note for note in notes] == [True]


@pytest.fixture
def run(tmp_path):
    """The folder of a run that was stopped after two updates."""
    made = RunDirectory(tmp_path / "a.run", {"seed": 1, "prompt": ["x"]}, {"threads": 2})
    made.begin()
    (tmp_path / "a.run" / "metrics.jsonl").write_text('{"step": 1, "forget": 0.25}\n{"step": 2, "forget": 0.125}\n')
    made.save(({"step": 2, "margin": None, "learning_rate": 1e-3}, {"weight.0": torch.linspace(0, 1, 9)}))
    return made


def test_a_checkpoint(run):
    def read():
        values, tensors = run.saved()
        return {"values": values, "tensors": tensors}

    everything_is_noticed(run.folder / "checkpoint.safetensors", read, least=1)


def test_the_log_of_a_run(run):
    everything_is_noticed(run.folder / "metrics.jsonl", lambda: run.saved()[0], least=1)
    with (run.folder / "metrics.jsonl").open("a") as log:  # updates after the checkpoint, which are made again
        log.write('{"step": 3, "forget": 0.1')
    assert run.saved()[0]["step"] == 2


def test_what_a_run_prepared(run):
    path = run.folder / "prepared.safetensors"
    run._store(path, {"prompts": ["", "x"]}, {"retain.x_0": torch.rand(2, 3)})

    def read():
        from unforget.unlearning.run_directory import _whole

        with _whole(path):
            values, tensors, _ = run._open(path)
        return {**values, **tensors}

    everything_is_noticed(path, read, least=1)


@pytest.mark.parametrize("finished", [None, {"steps": 2, "drift": {"median": 0.1}}])
def test_the_record_of_a_run(run, finished):
    if finished is not None:
        run.finish(finished)

    def read():
        again = RunDirectory(run.folder, run.inputs, run.environment)
        return {"notes": again.take_up(), "finished": again.finished}

    everything_is_noticed(run.folder / "run.json", read)


def report():
    return Report(
        verdict="failed", exit_code=1, summary="1 of 1 target failed", level="quick", checks=[], robustness=[],
        targets=[Target(id="7f" * 8, verdict="failed", reason="it is drawn")], calibrations=[], allowed=[], findings=[],
        settings={"max_rate": 0.005}, backends=["pixels (RMS)"], base_digest="b" * 64, candidate_digest="c" * 64,
        versions={"torch": "2"}, seconds={"sample": 1.5},
    )  # fmt: skip


def test_a_report(tmp_path):
    path = tmp_path / "verify.json"
    report().save(path)
    everything_is_noticed(path, lambda: Verified.of(path).model_dump(exclude={"report_digest"}))


def manifest(tmp_path):
    report().save(tmp_path / "r.json")
    return ExportManifest(
        format="lora", dtype="float32", base="net", base_digest="b" * 64, patched_digest="c" * 64, digest="d" * 64,
        patches=[AppliedPatch(scale=0.5, provenance=provenance())], verified=Verified.of(tmp_path / "r.json"),
        versions={"torch": "2"},
    )  # fmt: skip


def test_what_an_export_says_of_itself_in_its_header(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_tensors({"a": torch.ones(1)}, manifest(tmp_path).header(), path)
    told = ("format", "dtype", "base", "base_digest", "patched_digest", "digest", "patches", "verified", "versions")

    def read():
        found = show(path)
        if found.kind != "export":  # the bit was in the key by which it is an export
            raise UsageError("no export")
        return {name: found.said[name] for name in told}

    everything_is_noticed(path, read)


def test_what_an_exported_folder_says_of_itself(tmp_path):
    made = manifest(tmp_path)
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "unforget.json"
    write_json({"made": made.said()}, path)

    def read():
        assert families.hints(path.parent).made is not None
        return show(path.parent).said

    everything_is_noticed(path, read, least=0.8)


@pytest.mark.parametrize("value", [{}, {"a": [1, 1e-7, None, "\u00e9", {"b": True}]}, {"checksum": "x", "a": 1}])
def test_a_checksum_is_of_the_rest(value):
    made = checksummed(value)
    rest = {k: v for k, v in value.items() if k != "checksum"}
    assert undamaged(json.loads(json.dumps(made))) == rest
    assert undamaged(rest, always=False) == rest
    for wrong in (rest, {**made, "more": 0}, {**made, "checksum": None}, [], None, "text"):
        with pytest.raises(BadFile):
            undamaged(wrong)
    deep = []
    for depth in range(100_000):
        deep = [deep]
        if depth in (100, 99_999):
            with pytest.raises(BadFile, match="nested too deeply"):
                undamaged({"a": deep})


def test_a_deep_header_is_refused_in_a_sentence(tmp_path):
    for text in ("[" * 100_000, "{", '{"format": 3, "checksum": ' + "[" * 900 + "]" * 900 + "}", "\x00", "7"):
        write_tensors({"a": torch.ones(1)}, {HEADER: text}, tmp_path / "a.patch")
        with pytest.raises(UsageError, match="is not a patch"):
            Patch.load(tmp_path / "a.patch")
