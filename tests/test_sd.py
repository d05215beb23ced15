"""Stable Diffusion 1.x, against diffusers' own pipeline on tiny random weights."""

import json
import shutil

import pytest
import torch
from conftest import CAPTIONS
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unforget import ExportConfig, UnlearnConfig, VerifyConfig, export, families, unlearn, verify
from unforget.core import sampling
from unforget.errors import UsageError
from unforget.families.memory import blueprint, reckon
from unforget.files import images
from unforget.files.patch import Patch
from unforget.surrogate.editors import Canvas, Inpaint, RePaint

RED, BLUE, _ = CAPTIONS


def tiny_sd(**scheduler):
    """Random weights, 16x16 pixels, latents of 4x8x8, a safety checker, and the scheduler of SD 1.x."""
    torch.manual_seed(0)
    words = CLIPTokenizer().train_new_from_iterator(CAPTIONS, 560)
    words.model_max_length = 8
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=16, projection_dim=8, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    look = CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=8)
    how = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True,
        "steps_offset": 1, **scheduler,
    }  # fmt: skip
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), words, unet, PNDMScheduler(**how), StableDiffusionSafetyChecker(look),
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8),
    )  # fmt: skip


def saved(folder, **scheduler):
    tiny_sd(**scheduler).save_pretrained(folder)
    (folder / "unforget.json").write_text(json.dumps({"guidance": 2.0, "retain_prompts": list(CAPTIONS)}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(params=["epsilon", "v_prediction"])
def either(request, tmp_path):
    return saved(tmp_path / "model", prediction_type=request.param)


def stock(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_denoise_is_the_stock_pipeline_s(either, guidance):
    model = families.load(str(either), families.Options(guidance=guidance))
    noise = sampling.random_noise(2, model.latent_shape, 0, "test")
    theirs = stock(either)(
        [RED, BLUE], latents=noise, guidance_scale=guidance, num_inference_steps=5, output_type="latent"
    ).images
    with torch.no_grad():
        ours = model.denoise(noise, steps=5, prompt_ids=model.prompt_ids([RED, BLUE]))
    assert model.guidance == guidance
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_pictures_go_in_and_out_as_stock_scales_them(folder):
    model, pipeline, picture = families.load(str(folder)), stock(folder), torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(picture).latent_dist.mean
        shown = pipeline.vae.decode(mean).sample.clamp(-1, 1)
    torch.testing.assert_close(model.encode(picture), mean * pipeline.vae.config.scaling_factor)
    torch.testing.assert_close(model.decode(model.encode(picture)), shown, rtol=1e-4, atol=1e-5)


def test_the_target_is_the_training_script_s(either):
    model = families.load(str(either))
    theirs = DDPMScheduler.from_config(model.scheduler_config)
    x_0, noise = torch.randn(2, 3, *model.latent_shape)
    t = torch.tensor([3, 500, 990])
    x_t = theirs.add_noise(x_0, noise, t)
    torch.testing.assert_close(model.schedule.add_noise(x_0, noise, t), x_t, rtol=1e-5, atol=1e-5)
    velocity = model.scheduler_config["prediction_type"] == "v_prediction"
    target = theirs.get_velocity(x_0, noise, t) if velocity else noise
    torch.testing.assert_close(model.schedule.target(x_0, noise, t), target, rtol=1e-5, atol=1e-5)


def test_a_replay_is_the_stock_pipeline_s_with_a_seed(folder):
    model, pipeline = families.load(str(folder)), stock(folder)
    how = {"guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "latent"}
    theirs = pipeline(RED, generator=torch.Generator().manual_seed(5), **how).images
    ours = model.replay(5, steps=4, scheduler=None, prompt_ids=model.prompt_ids([RED]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
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


def test_what_it_has_not(folder):
    model = families.load(str(folder))
    with pytest.raises(UsageError, match="has no --train bottleneck"):
        model.trainable("bottleneck")
    canvas = Canvas(model, torch.zeros(3, 16, 16), torch.ones(1, 16, 16))
    with pytest.raises(UsageError, match="models that draw pixels"):
        RePaint()(canvas)


def test_inpainting_keeps_what_is_outside_the_mask(folder):
    model, target, mask = families.load(str(folder)), torch.rand(3, 16, 16) * 2 - 1, torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    row = int(model.prompt_ids([RED])[0])
    found = Inpaint(strengths=(1.0,), seeds=2, steps=3)(Canvas(model, target, mask, seed=0, prompt_id=row))
    assert all(torch.equal(c.image[:, 8:], target[:, 8:]) for c in found)
    assert not torch.equal(found[0].image, found[1].image)


def test_the_memory_plan(folder):
    found = blueprint(str(folder), families.Options())
    plain, less = (
        reckon(found, "lora", 2, micro_batch=2, checkpointing=on, half=False).activations for on in (False, True)
    )
    assert found.image_shape == (3, 16, 16)
    assert 0 < less < plain


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


@pytest.fixture
def patch(folder, tmp_path):
    return unlearned(folder, tmp_path)


def test_unlearn_verify_export(folder, patch, tmp_path):
    assert all(".lora_" in name for name in Patch.load(patch).tensors)
    judged = verify(VerifyConfig(
        model=str(folder), patch=patch, max_rate=0.4, paired=16, controls=8, draws=2, sampler_steps=2,
    ))  # fmt: skip
    assert {"sample", f"sample '{RED}'", "retention"} <= {c.name for c in judged.checks}
    config = ExportConfig(model=str(folder), patch=patch, output=tmp_path / "whole")
    whole = export(config).output
    lora = export(config.model_copy(update={"output": tmp_path / "lora", "format": "lora"})).output
    peft = export(config.model_copy(update={"output": tmp_path / "peft", "format": "peft"})).output
    ask = {
        "prompt": BLUE, "latents": sampling.random_noise(1, (4, 8, 8), 0, "test"), "guidance_scale": 2.0,
        "num_inference_steps": 4, "output_type": "latent",
    }  # fmt: skip
    base, merged = stock(folder)(**ask).images, stock(whole)(**ask).images
    assert not torch.allclose(merged, base, atol=1e-3)
    with_lora, with_peft = stock(folder), stock(folder)
    with_lora.load_lora_weights(lora)
    with_peft.unet = PeftModel.from_pretrained(with_peft.unet, peft)
    for pipeline in (with_lora, with_peft):
        torch.testing.assert_close(pipeline(**ask).images, merged, rtol=1e-3, atol=1e-3)


def test_a_folder_of_half_precision_is_exported_without_its_safety_checker(folder, tmp_path):
    """It is not loaded, so it cannot be written; stock opens what is left."""
    half = halved(folder, tmp_path / "half")
    whole = export(ExportConfig(model=str(half), patch=unlearned(half, tmp_path), output=tmp_path / "whole")).output
    assert json.loads((whole / "model_index.json").read_text())["safety_checker"] == [None, None]
    opened = StableDiffusionPipeline.from_pretrained(whole, requires_safety_checker=False)
    assert load_file(whole / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    assert opened.safety_checker is None


def test_the_command_line(folder, patch, cli):
    args = ["--model", folder, "--target", patch.parent / "target.png", "--prompt", RED]
    shown = cli("unlearn", *args, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["recipe"]["train"] == "lora"
