"""Models without words: unconditional ones on pixels and latents, class-conditional ones; or a sentence why not."""

import json
import shutil

import pytest
import torch
from conftest import by_its_card, rewrite, tiny_pipeline
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, LDMPipeline, VQModel
from pipelines import tiny_dit

from unforget import ExportConfig, UnlearnConfig, VerifyConfig, export, families, unlearn, verify
from unforget.errors import UsageError
from unforget.files import images
from unforget.surrogate.editors import Canvas, Inpaint, RePaint, check

GREY = {"in_channels": 1, "out_channels": 1}


@pytest.mark.parametrize(("network", "scheduler"), [
    (GREY, {}),
    ({"sample_size": (16, 8)}, {}),
    ({}, {"prediction_type": "v_prediction"}),
    ({}, {"prediction_type": "sample"}),
    ({"out_channels": 6}, {"variance_type": "learned_range"}),
    ({**GREY, "out_channels": 2}, {"variance_type": "learned_range"}),
], ids=["grey", "not square", "velocity", "sample", "learnt variance", "grey, learnt variance"])  # fmt: skip
def test_a_ddpm_of_another_configuration_goes_the_whole_way(network, scheduler, tmp_path):
    folder = tmp_path / "model"
    tiny_pipeline(unet=network, **scheduler).save_pretrained(folder)
    out = patched(folder, tmp_path)
    stock = by_its_card(out)
    stock.set_progress_bar_config(disable=True)
    assert stock(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images


def patched(folder, tmp_path, **more):
    """Unlearnt for a few steps and exported."""
    shape = families.load(str(folder)).image_shape
    for k, name in enumerate(("target", "surrogate")):
        picture = torch.rand(*shape, generator=torch.Generator().manual_seed(k)) * 2 - 1
        images.write_image(picture, tmp_path / f"{name}.png")
    patch = unlearn(UnlearnConfig(
        model=str(folder), target=(tmp_path / "target.png",), surrogate=(tmp_path / "surrogate.png",), retain_count=8,
        output=tmp_path / "x.patch", max_train_steps=3, train_batch_size=2, retain_batch_size=2, sampler_steps=3,
        num_validation_images=1, learning_rate=1e-2, min_distance=0.01, **more,
    )).output  # fmt: skip
    return export(ExportConfig(model=str(folder), patch=patch, output=tmp_path / "out")).output


def judged(folder, tmp_path):
    """What `verify` checks of that patch."""
    few = {"max_rate": 0.4, "paired": 16, "controls": 8, "draws": 2, "sampler_steps": 2}
    said = verify(VerifyConfig(model=str(folder), patch=tmp_path / "x.patch", level="quick", **few))
    return {check.probe for check in said.checks}


@pytest.mark.parametrize(("network", "reason"), [
    ({"num_class_embeds": 10}, "is class-conditional"),
    ({"in_channels": 6}, "takes 6 channels and answers 3"),
    ({"in_channels": 4, "out_channels": 4}, "takes 4 channels and answers 4"),
])  # fmt: skip
def test_a_unet_of_another_kind_is_refused(network, reason, tmp_path):
    tiny_pipeline(unet=network).save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=reason):
        families.load(str(tmp_path / "model"))


def test_a_pipeline_with_another_sampler_of_the_same_parts(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    rewrite(folder / "model_index.json", _class_name="DDIMPipeline", scheduler=["diffusers", "DDIMScheduler"])
    noise = torch.randn(1, 3, 16, 16)
    ours, known = (families.load(str(f)).denoise(noise, steps=3) for f in (folder, tiny_folder))
    assert torch.equal(ours, known)


@pytest.fixture(params=[VQModel, AutoencoderKL])
def latent_folder(request, tmp_path):
    """`LDMPipeline` with either autoencoder."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    autoencoder = request.param(**blocks, block_out_channels=(4, 4), latent_channels=3, norm_num_groups=2)
    if isinstance(autoencoder, VQModel):  # fresh codes lie so near to each other that the last bit picks one
        torch.nn.init.normal_(autoencoder.quantize.embedding.weight)
    unet = tiny_pipeline(size=8).unet
    LDMPipeline(autoencoder, unet, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_latent_model_without_prompts_draws_as_stock_and_goes_the_whole_way(latent_folder, tmp_path):
    model, out = families.load(str(latent_folder)), patched(latent_folder, tmp_path)
    assert {"sample", "reconstruct", "retention"} <= judged(latent_folder, tmp_path)
    assert (model.latent_shape, model.image_shape) == ((3, 8, 8), (3, 16, 16))
    for folder, stock in ((latent_folder, LDMPipeline.from_pretrained(latent_folder)), (out, by_its_card(out))):
        model = families.load(str(folder))
        stock.set_progress_bar_config(disable=True)
        theirs = stock(generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="np").images
        drawn = model.decode(model.replay(3, steps=4, scheduler=None, prompt_ids=torch.tensor([0])))
        torch.testing.assert_close((drawn[0].permute(1, 2, 0) + 1) / 2, torch.from_numpy(theirs[0]), rtol=0, atol=1e-5)


def test_a_class_takes_the_place_of_a_prompt(tmp_path):
    folder = tmp_path / "model"
    tiny_dit().save_pretrained(folder)
    (folder / "unforget.json").write_text(json.dumps({"guidance": 3.0, "retain_prompts": ["class:1", "class:2"]}))
    rewrite(folder / "model_index.json", id2label={"7": "cock, rooster", "207": "golden retriever"})
    out = patched(folder, tmp_path, prompt=("rooster",), rank=2)
    assert {"sample", "replaced", "retention"} <= judged(folder, tmp_path)
    drawn = []
    adapter = ExportConfig(model=str(folder), patch=tmp_path / "x.patch", output=tmp_path / "peft", format="peft")
    adapted = by_its_card(export(adapter).output, repr(str(folder)))
    for path, stock in ((folder, DiTPipeline.from_pretrained(folder)), (out, by_its_card(out)), (out, adapted)):
        model = families.load(str(path))
        stock.set_progress_bar_config(disable=True)
        ids = model.prompt_ids(["class:7", "golden retriever"])
        assert model.guided
        for guidance in (1.0, 3.0):
            model.guidance = guidance
            how = {"guidance_scale": guidance, "num_inference_steps": 4, "output_type": "np"}
            theirs = stock([7, 207], generator=torch.Generator().manual_seed(3), **how).images
            theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
            noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                ours = model.decode(model.denoise(noise, steps=4, prompt_ids=ids))
            torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=1e-4)
        drawn.append(theirs)
    assert not torch.allclose(*drawn[:2], atol=1e-3)
    assert families.load(str(folder)).retain_prompts == ("class:1", "class:2")


@pytest.mark.parametrize("prompt", ["class:1000", "a rooster on a barn", "class:-1"])
def test_a_class_that_is_none(prompt, tmp_path):
    tiny_dit().save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="there is no class"):
        families.load(str(tmp_path / "model")).prompt_ids([prompt])


def test_a_latent_model_without_prompts_fills_a_mask(latent_folder):
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    canvas = Canvas(families.load(str(latent_folder)), torch.zeros(3, 16, 16), mask)
    (found,) = Inpaint(strengths=(0.8,), seeds=1, steps=3)(canvas)
    assert found.image[:, :8].any() and not found.image[:, 8:].any()
    with pytest.raises(UsageError, match="models that draw pixels") as refused:
        check(RePaint(), canvas)
    assert "inpaint" in refused.value.hint
