"""What folders of Stable Diffusion 1.x have besides: a safety checker, half precision, other samplers."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines import CAPTIONS, tiny_sd
from safetensors.torch import load_file, save_file

from unforget import ExportConfig, UnlearnConfig, export, families, unlearn
from unforget.files import images

RED = CAPTIONS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_sd().save_pretrained(home)
    (home / "unforget.json").write_text(json.dumps({"guidance": 2.0, "retain_prompts": list(CAPTIONS)}))
    return home


def test_a_replay_with_the_sampler_of_the_folder(folder):
    model = families.load(str(folder))
    how = {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "latent"}
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)(
        RED, generator=torch.Generator().manual_seed(5), **how
    ).images
    ours = model.replay(5, steps=4, scheduler="PNDMScheduler", prompt_ids=model.prompt_ids([RED]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def halved(folder, to):
    """The folder as repositories have it in half precision alone."""
    shutil.copytree(folder, to)
    for file in to.rglob("*.safetensors"):
        tensors = {n: t.half() if t.is_floating_point() else t for n, t in load_file(file).items()}
        save_file(tensors, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    return to


def test_a_folder_as_it_is_in_the_world(folder, tmp_path):
    """A safety checker, which is not loaded, and weights in half precision only."""
    assert (folder / "safety_checker" / "model.safetensors").is_file()
    whole, half = families.load(str(folder)), families.load(str(halved(folder, tmp_path / "half")))
    assert half.pipeline.safety_checker is half.pipeline.feature_extractor is None
    assert half.network.dtype == half.pipeline.vae.dtype == torch.float32
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(half.network.state_dict()[name], tensor.half().float()), name
    assert families.weights.source(str(tmp_path / "half"), half, None).tensors["conv_in.weight"].dtype == torch.float16


def test_a_safety_checker_that_brings_its_own_code_is_not_looked_at(folder, tmp_path):
    evil = shutil.copytree(folder, tmp_path / "evil")
    (evil / "safety_checker" / "stable_diffusion.py").write_text("raise SystemExit('ran')")
    (evil / "safety_checker" / "model.safetensors").write_bytes(b"no weights")
    assert families.load(str(evil)).pipeline.safety_checker is None


def unlearned(folder, home):
    g = torch.Generator().manual_seed(3)
    for name in ("target", "surrogate"):
        images.write_image(torch.rand(3, 16, 16, generator=g) * 2 - 1, home / f"{name}.png")
    short = {"max_train_steps": 3, "train_batch_size": 2, "retain_batch_size": 2, "learning_rate": 1e-2, "rank": 2}
    return unlearn(UnlearnConfig(
        model=str(folder), target=(home / "target.png",), surrogate=(home / "surrogate.png",), prompt=(RED,),
        output=home / "x.patch", **short, retain_count=12, sampler_steps=3,
        num_validation_images=1, min_distance=0.01,
    )).output  # fmt: skip


def test_a_folder_of_half_precision_is_exported_with_all_its_parts(folder, tmp_path):
    """Under the names that stock opens without being told of a variant; what is not loaded is copied."""
    half = halved(folder, tmp_path / "half")
    whole = export(ExportConfig(model=str(half), patch=unlearned(half, tmp_path), output=tmp_path / "whole")).output
    opened = StableDiffusionPipeline.from_pretrained(whole)
    assert not list(whole.rglob("*fp16*"))
    assert load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    assert opened.safety_checker is not None


def test_the_command_line(folder, picture, cli):
    args = ["--model", folder, "--target", picture, "--prompt", RED]
    shown = cli("unlearn", *args, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["recipe"]["train"] == "lora"
