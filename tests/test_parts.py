"""A candidate is more than its network: what lies beside it is the base's, or is named."""

import json
import shutil

import pytest
import torch
from conftest import PLANTED
from safetensors.torch import load_file, save_file

from unforget import families
from unforget.errors import CannotRun
from unforget.families import shipped
from unforget.families.loading import Options


@pytest.fixture
def candidate(sd3_folder, tmp_path):
    return shutil.copytree(sd3_folder, tmp_path / "candidate")


def apart(base, candidate) -> dict[str, float]:
    models = [families.load(str(folder)) for folder in (base, candidate)]
    for model in models:
        model.prompt_ids(["a green circle"])
    return families.parts_apart(*models)


def edit(path, **changed) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def weigh(folder, change, stem="model") -> None:
    path = folder / f"{stem}.safetensors"
    tensors = {name: change(t) if t.is_floating_point() else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def one_weight(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = tensor.view(-1)[0] * 1.1 + 0.01
    return tensor


def reword(path) -> None:
    """Two words have each other's number."""
    said = json.loads(path.read_text())
    words = said["model"]["vocab"]
    first, second = list(words)[5:7]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(said))


CHANGES = {
    "scheduler": lambda f: edit(f / "scheduler" / "scheduler_config.json", shift=1.5),
    "vae": lambda f: weigh(f / "vae", one_weight, "diffusion_pytorch_model"),
    "vae config": lambda f: edit(f / "vae" / "config.json", scaling_factor=0.7),
    "text_encoder": lambda f: weigh(f / "text_encoder", one_weight),
    "text_encoder_2": lambda f: weigh(f / "text_encoder_2", lambda t: -t),
    "tokenizer": lambda f: reword(f / "tokenizer" / "tokenizer.json"),
}


def test_the_same_parts_are_no_other(sd3_folder, candidate):
    found = apart(sd3_folder, candidate)
    assert {"scheduler", "vae", "text_encoder", "tokenizer", "prompts"} <= set(found)
    assert "transformer" not in found
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_other_part(sd3_folder, candidate, dtype):
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        weigh(candidate / part, lambda t: t.to(dtype), stem)
    found = apart(sd3_folder, candidate)
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("part", CHANGES)
def test_another_part_is_named(sd3_folder, candidate, part):
    CHANGES[part](candidate)
    found = apart(sd3_folder, candidate)
    assert found[part.split()[0]] > 0.01
    assert {name for name, value in found.items() if value} <= {part.split()[0], "prompts"}


@pytest.mark.parametrize("name", [
    "transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.non_ema.safetensors",
    "transformer/diffusion_pytorch_model.bin", "transformer/model.safetensors", "base.safetensors", "sd3.ckpt",
    "transformer_ema/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
    "onnx/model.onnx", "pytorch_lora_weights.safetensors",
])  # fmt: skip
def test_weights_beside_those_that_are_judged_are_refused(candidate, sd3_folder, name):
    (candidate / name).parent.mkdir(exist_ok=True)
    shutil.copyfile(sd3_folder / "transformer" / "diffusion_pytorch_model.safetensors", candidate / name)
    with pytest.raises(CannotRun, match=f"also holds '{name}'"):
        shipped.load(candidate, str(sd3_folder), Options())


@pytest.mark.parametrize("name", ["base.safetensors", "unet/diffusion_pytorch_model.bin"])
def test_weights_beside_an_adapter_are_refused(tmp_path, sd3_folder, name):
    folder = tmp_path / "lora"
    (folder / name).parent.mkdir(parents=True)
    for place in (name, "pytorch_lora_weights.safetensors"):
        save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, folder / place)
    with pytest.raises(CannotRun, match=f"also holds '{name}'"):
        shipped.load(folder, str(sd3_folder), Options())


def test_pictures_and_words_beside_them_are_not(candidate, sd3_folder):
    (candidate / "README.md").write_text("a model")
    shutil.copyfile(PLANTED / "0.png", candidate / "example.png")
    assert shipped.load(candidate, str(sd3_folder), Options())


def test_another_scheduler_fails_unless_the_policy_allows_it(cli, tiny_folder, picture, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "other")
    edit(tmp_path / "other" / "scheduler" / "scheduler_config.json", clip_sample=False)
    few = ("--level", "quick", "--draws", 2, "--paired", 16, "--controls", 8, "--samples", 8, "--sampler-steps", 2)
    common = ("--model", tiny_folder, "--candidate", tmp_path / "other", "-t", picture, "--json", *few)
    for more, outcome in (((), "failed"), (("--may-differ", "scheduler"), "informational")):
        result = cli("verify", *common, *more)
        assert result.exit_code in (0, 1, 4), result.output
        said = json.loads(result.stdout)
        assert [c["outcome"] for c in said["checks"] if (c["probe"], c["variant"]) == ("parts", "scheduler")] == [
            outcome
        ]
