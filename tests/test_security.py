"""The promises of docs/security.md."""

import ast
import json
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from conftest import rewrite, tiny_pipeline
from safetensors.torch import save_file

from unforget import families
from unforget.errors import CannotRun, UsageError
from unforget.families.safety import check
from unforget.files import images
from unforget.files.patch import Patch, Provenance
from unforget.files.storage import digest

PACKAGE = Path(families.__file__).parents[1]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def text_to_image(sd3_folder, tmp_path):
    return Path(shutil.copytree(sd3_folder, tmp_path / "model"))


class Evil:
    """What a pickle would do."""

    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def refused(folder, sentence, kind=UsageError):
    with pytest.raises(kind, match=sentence):
        families.load(str(folder))
    assert not Path("pwned").exists()


# 1. Nothing is unpickled unless you say so.


def test_no_module_unpickles_and_one_backend_runs_a_program_that_you_name():
    users, runs = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = {a.name for a in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            loads = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            runs |= {path.name} if loads == "torch.jit.load" else set()
            if loads == "torch.load" or named & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
                users.add(path.name)
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
                users.add(path.name)
    assert not users
    assert runs == {"similarity.py"}


def test_pickled_weights_are_refused_and_then_read_without_running_anything(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"conv_in.weight": Evil()}, weights.with_suffix(".bin"))
    refused(folder, "pickled weights only")
    with pytest.raises(CannotRun):
        families.load(str(folder), families.Options(allow_pickle=True))
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ["a.patch", "x.run/prepared.safetensors", "x.run/checkpoint.safetensors"])
def test_a_pickle_in_place_of_our_own_files(cli, tiny_folder, picture, tmp_path, name):
    (tmp_path / "x.run").mkdir()
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    (tmp_path / "x.run" / "run.json").write_text('{"asked": {}, "how": {}, "finished": null}')
    common = ["unlearn", "--model", tiny_folder, "-t", picture, "-o", "x.patch"]
    result = cli(*common, *(["--patch", name] if name == "a.patch" else ["--resume"]))
    assert result.exit_code == 2, result.output
    assert not Path("pwned").exists()


# 2. No code comes with a model.

CODE = "from pathlib import Path\nPath('pwned').mkdir()\nclass Evil: pass\n"


@pytest.mark.parametrize("part", [["evil", "Evil"], ["pipeline", "Evil"], ["os", "system"], ["torch.nn", "Linear"]])
def test_a_part_that_brings_its_own_class(folder, tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("evil.py", "pipeline.py", "unet/evil.py"):
        (folder / name).write_text(CODE)
    rewrite(folder / "model_index.json", unet=part)
    refused(folder, "is code of its own")


def test_a_pipeline_class_of_its_own(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "evil.py").write_text(CODE)
    rewrite(folder / "model_index.json", _class_name=["evil", "Evil"])
    refused(folder, "is a ")


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_a_configuration_that_asks_for_code(text_to_image, tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    (text_to_image / part / "evil.py").write_text(CODE)
    rewrite(text_to_image / part / "config.json", auto_map={"AutoModel": "evil.Evil"})
    refused(text_to_image, "auto_map")
    assert "evil" not in sys.modules


# 3. No network unless a hub id was given. (conftest blocks sockets for every test but those of the hub.)


def test_sockets_are_blocked_here():
    with pytest.raises(AssertionError, match="network"), socket.socket() as s:
        s.connect(("127.0.0.1", 9))


@pytest.mark.parametrize("ref", ["faces", "folder", "file"])
def test_local_models_ask_nobody(ref, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    if ref == "file":
        save_file({"model.diffusion_model.joint_blocks.0.x": torch.ones(1)}, tmp_path / "x.safetensors")
        with pytest.raises(UsageError, match="does not say what its model is made of"):
            families.load(str(tmp_path / "x.safetensors"))
    else:
        families.load(str(folder) if ref == "folder" else ref)


# 4. Nothing leads elsewhere.


@pytest.mark.parametrize(
    "name", ["../../secret.safetensors", "/etc/passwd", "x/../y", "", "a b", "..", "~root", "x\0y"]
)
def test_shards_lie_in_their_folder(folder, tmp_path, name):
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "names the file")


@pytest.mark.parametrize("name", ["../unet", "/tmp/unet", "a/b", ".."])
def test_parts_lie_in_their_folder(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "UNet2DModel"]}))
    refused(folder, "describes")


# 5. Sizes are checked before memory is taken.


@pytest.mark.parametrize(("change", "sentence"), [
    ({"block_out_channels": [8, 2**30]}, "block_out_channels"),
    ({"block_out_channels": [8, 2**19]}, "wanted"),
    ({"layers_per_block": 10**6}, "layers_per_block"),
    ({"sample_size": 10**6}, "sample_size"),
    ({"down_block_types": ["DownBlock2D"] * 5000}, "a list of 5000"),
    ({"in_channels": -(10**9)}, "in_channels"),
    ({"down_block_types": ["NoBlock", "NoBlock"]}, "describes no UNet2DModel"),
    ({"norm_num_groups": 0}, "describes no UNet2DModel|wanted"),
])  # fmt: skip
def test_numbers_that_no_model_has(folder, change, sentence):
    rewrite(folder / "unet" / "config.json", **change)
    with pytest.raises((UsageError, CannotRun), match=sentence):
        check(folder, families.spec_of(str(folder)), False)


@pytest.mark.parametrize(("part", "change"), [
    ("text_encoder", {"num_hidden_layers": 500}), ("text_encoder", {"vocab_size": 900_000}),
    ("transformer", {"num_layers": 500}), ("transformer", {"pos_embed_max_size": 1000}),
    ("vae", {"layers_per_block": 60}),
])  # fmt: skip
def test_a_configuration_asks_for_no_more_than_its_file_holds(text_to_image, part, change):
    rewrite(text_to_image / part / "config.json", **change)
    with pytest.raises(CannotRun, match=r"asks for|lacks|wanted"):
        check(text_to_image, families.spec_of(str(text_to_image)), False)


def test_nested_json(folder):
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        kept = (folder / name).read_text()
        (folder / name).write_text('{"_class_name":' + "[" * 100_000)
        with pytest.raises((UsageError, CannotRun)):
            families.load(str(folder))
        (folder / name).write_text(kept)


# 6. Content is what it was: tests/test_patch.py and tests/test_resume.py.
# 7. No secrets, no places.


def test_nothing_that_is_shared_says_where_it_was_made(cli, tiny_folder, picture, tmp_path, monkeypatch):
    """Every file and all output of a whole path, but for the folder of the run."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "S3cretS3cret")
    monkeypatch.setenv("UNFORGET_SALT", "a-salt-to-keep")
    home = tmp_path / "users" / "alice"
    home.mkdir(parents=True)
    shutil.copytree(tiny_folder, home / "base")
    shutil.copy(picture, home / "private-name.png")
    common = ["--model", home / "base"]
    made = cli(
        "unlearn", *common, "-t", home / "private-name.png", "-s", picture_of(home), "-o", "a.patch",
        "--retain-count", 8, "--max-train-steps", 2, "--num-validation-images", 1,
    )  # fmt: skip
    assert made.exit_code in (0, 1), made.output
    judged = cli(
        "verify", *common, "--patch", "a.patch", "--level", "quick", "--max-rate", 0.3, "--draws", 2, "--sampler-steps",
        2, "--report", "r.json", "--junit", "r.xml", "--html", "r.html", "--summary", "r.md",
    )  # fmt: skip
    assert judged.exit_code in (0, 1, 4), judged.output
    written = cli("export", *common, "--patch", "a.patch", "-o", "out", "--report", "r.json")
    assert written.exit_code == 0, written.output
    shared = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(home) and "a.run" not in p.parts]
    shared = [p for p in shared if p != picture]
    assert len(shared) > 8
    for path in shared:
        content = path.read_bytes()
        for secret in (b"alice", b"S3cret", b"a-salt-to-keep", b"private-name", str(tmp_path).encode()):
            assert secret not in content, f"{path.name} holds {secret!r}"
    for result in (made, judged, written):
        assert "S3cret" not in result.output
        assert "a-salt-to-keep" not in result.output


def picture_of(home):
    path = home / "surrogate.png"
    images.write_image(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(9)) * 2 - 1, path)
    return path


def test_tokens_in_messages_are_blanked(cli, monkeypatch, tiny_folder):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "S3cretS3cret")

    def leak(*args, **kwargs):
        raise CannotRun("401 for Authorization: Bearer hf_S3cretS3cret, and hf_anotherToken12345", "")

    monkeypatch.setattr("unforget.families.load", leak)
    result = cli("export", "--model", tiny_folder, "--patch", made_patch(tiny_folder), "-o", "out")
    assert result.exit_code == 3
    assert "S3cret" not in result.output
    assert "anotherToken" not in result.output


def made_patch(folder):
    network = tiny_pipeline().unet
    state = network.state_dict()
    made = Provenance(
        base="x", base_digest=digest(state), targets=[], surrogates=[], recipe={}, seed=0, steps=0, versions={}
    )
    Patch({"conv_in.bias": state["conv_in.bias"] + 1}, made).save(Path("made.patch"))
    return "made.patch"


def test_ids_tell_nothing_without_the_salt(monkeypatch):
    from unforget.api.common import salted

    image = torch.zeros(3, 4, 4)
    ids = set()
    for base in ("a", "b"):
        for salt in (b"", b"one", b"two", b"\xff\xfe"):  # a secret may be any bytes
            monkeypatch.setitem(os.environb, b"UNFORGET_SALT", salt)
            ids.add(images.image_id(image, salted(base)))
    assert len(ids) == 8
