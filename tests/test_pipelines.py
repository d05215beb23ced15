"""Every row that takes prompts, against diffusers' own pipeline on tiny random weights; SD3's more are in test_sd3."""

import json
import re

import pytest
import torch
from conftest import by_its_card, rewrite
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    PixArtSigmaPipeline,
    SanaPipeline,
    StableDiffusionInpaintPipeline,
    ZImagePipeline,
)
from pipelines import (
    CAPTIONS,
    narrow_flux,
    tiny_flux,
    tiny_flux2,
    tiny_pixart,
    tiny_sana,
    tiny_sd,
    tiny_sd2,
    tiny_sdxl,
    tiny_z_image,
)

from unforget import ExportConfig, UnlearnConfig, VerifyConfig, api, export, families, unlearn, verify
from unforget.core import sampling
from unforget.core.schedule import Schedule
from unforget.errors import UsageError
from unforget.families import shipped
from unforget.families.memory import blueprint, reckon
from unforget.files import images
from unforget.files.patch import Patch
from unforget.surrogate.editors import Canvas, Inpaint, RePaint, SDEdit, check

RED, BLUE, _ = CAPTIONS
MADE = {
    "sd": tiny_sd,
    "sd2": tiny_sd2,
    "sdxl": tiny_sdxl,
    "sdxl-no-zeros": lambda: tiny_sdxl(zeros=False),
    "flux-dev": tiny_flux,
    "flux-schnell": lambda: tiny_flux(dev=False),
    "flux2-klein": tiny_flux2,
    "z-image": tiny_z_image,
    "sana": tiny_sana,
    "pixart": tiny_pixart,
}


def size(folder) -> int:
    """Of its pictures, in pixels."""
    return 32 if families.spec_of(str(folder)).name == "sana" else 16


def options(folder, **more):
    return families.Options(resolution=size(folder), **more)


@pytest.fixture(scope="module", params=MADE)
def folder(request, tmp_path_factory):
    home = tmp_path_factory.mktemp("models") / request.param
    MADE[request.param]().save_pretrained(home)
    (home / "unforget.json").write_text(json.dumps({"guidance": 2.0, "retain_prompts": list(CAPTIONS)}))
    return home


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    narrow_flux(monkeypatch)


@pytest.fixture
def model(folder):
    return families.load(str(folder), options(folder))


class Stock:
    """The stock pipeline of a folder with the sampler of ours, latents as ours are."""

    def __init__(self, folder, pipeline=None):
        self.pipeline = pipeline or DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.spec = families.spec_of(str(folder))
        self.flux = isinstance(self.pipeline, FluxPipeline)
        self.schnell = self.flux and not self.pipeline.transformer.config.guidance_embeds
        self.size = size(folder)
        config = self.pipeline.scheduler.config
        if isinstance(self.pipeline, SanaPipeline):
            self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, solver_order=1)
        elif not isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            self.pipeline.scheduler = DDIMScheduler.from_config(config, clip_sample=False)

    def __call__(self, prompts, steps, guidance, *, noise=None, seed=None):
        if noise is not None and self.flux:
            noise = self.pipeline._pack_latents(noise, *noise.shape)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        more = {"max_sequence_length": 256} if self.schnell else {}  # as its card says
        if isinstance(self.pipeline, (SanaPipeline, PixArtSigmaPipeline)):
            more = {"use_resolution_binning": False}  # else it draws at a released size, and scales
        guidance -= isinstance(self.pipeline, ZImagePipeline)  # which counts from 0
        drawn = self.pipeline(
            prompt=prompts, latents=noise, generator=generator, num_inference_steps=steps, guidance_scale=guidance,
            height=self.size, width=self.size, output_type="latent", **more,
        ).images  # fmt: skip
        if isinstance(self.pipeline, Flux2KleinPipeline):
            return self.spec.to_x_0(self.pipeline.vae, drawn)
        return self.pipeline._unpack_latents(drawn, self.size, self.size, 2) if self.flux else drawn


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_denoise_is_the_stock_pipeline_s(folder, guidance):
    model = families.load(str(folder), options(folder, guidance=guidance))
    noise = sampling.random_noise(2, model.latent_shape, 0, "test")
    theirs = Stock(folder)([RED, BLUE], 5, guidance, noise=noise)
    with torch.no_grad():
        ours = model.denoise(noise, steps=5, prompt_ids=model.prompt_ids([RED, BLUE]))
    assert model.guidance == guidance
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_a_prompt_it_is_the_empty_one_s(folder, model):
    noise = sampling.random_noise(1, model.latent_shape, 0, "test")
    against = {"sdxl": (1, 3), "sana": (2, 3)}.get(folder.name)
    if against:  # "no prompt" is zeros, or lacks an instruction: what the stock pipeline only sets against a prompt
        embeds = model.pipeline.encode_prompt(RED, do_classifier_free_guidance=True)
        assert embeds[1].any() == (folder.name == "sana")
        for tensor, i in zip(model._conditioning[0], against, strict=True):
            torch.testing.assert_close(tensor, embeds[i][0])
        return
    with torch.no_grad():
        ours = model.denoise(noise, steps=3)
    theirs = Stock(folder)([""], 3, 2.0 if model.spec.distilled else 1.0, noise=noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_replay_is_the_stock_pipeline_s_with_a_seed(folder, model):
    theirs = Stock(folder)(RED, 4, 2.0, seed=5)
    ours = model.replay(5, steps=4, scheduler=None, prompt_ids=model.prompt_ids([RED]))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_pictures_go_in_and_out_as_stock_scales_them(model):
    vae, picture = model.pipeline.vae, torch.rand(1, *model.image_shape) * 2 - 1
    with torch.no_grad():
        encoded = vae.encode(picture)
        mean = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        shown = vae.decode(mean).sample.clamp(-1, 1)
    if model.spec.gathered == 1:
        x_0 = (mean - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
        torch.testing.assert_close(model.encode(picture), x_0)
    else:
        torch.testing.assert_close(model.encode(picture), model.pipeline._encode_vae_image(picture, None))
    torch.testing.assert_close(model.decode(model.encode(picture)), shown, rtol=1e-4, atol=1e-5)


def test_the_target_is_the_training_script_s(model):
    """The formulas of diffusers' scripts, with its own schedulers."""
    x_0, noise = torch.randn(2, 3, *model.latent_shape)
    if model.scheduler_config.get("prediction_type", "flow_prediction") == "flow_prediction":
        theirs = FlowMatchEulerDiscreteScheduler.from_config(model.scheduler_config)
        rows = torch.tensor([3, 500, 990])
        sigmas, t = theirs.sigmas[rows].reshape(-1, 1, 1, 1), theirs.timesteps[rows]
        x_t, target = (1 - sigmas) * x_0 + sigmas * noise, noise - x_0
    else:
        theirs, t = DDIMScheduler.from_config(model.scheduler_config), torch.tensor([3, 500, 990])
        x_t = theirs.add_noise(x_0, noise, t)
        velocity = model.scheduler_config["prediction_type"] == "v_prediction"
        target = theirs.get_velocity(x_0, noise, t) if velocity else noise
    torch.testing.assert_close(model.schedule.add_noise(x_0, noise, t), x_t, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.schedule.target(x_0, noise, t), target, rtol=1e-5, atol=1e-5)


def test_a_network_by_the_name_that_it_was_released_under(tmp_path):
    tiny_pixart().save_pretrained(tmp_path)
    rewrite(tmp_path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    rewrite(tmp_path / "transformer" / "config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    model = families.load(str(tmp_path), families.Options(resolution=16))
    assert type(model.network).__name__ == model.spec.network_class


def test_the_recipe_works_at_the_same_noise_as_every_other(model):
    """Timesteps of a row's own schedule; of noise to image, where they are put in `latent_recipes`."""
    own = {**model.scheduler_config, "rescale_betas_zero_snr": False}  # as released
    recipe, s = model.spec.recipes["default"], Schedule.from_diffusers(type(model.pipeline.scheduler).from_config(own))
    levels = torch.tensor([*recipe.objective.taper, recipe.forget_range[0]])
    ratio = s.sigmas[s._rows(levels)] / s.alphas[s._rows(levels)]
    torch.testing.assert_close(ratio, torch.tensor([2.45, 3.76, 0.107]).double(), rtol=0.06, atol=0)


@pytest.mark.parametrize(("name", "hint"), [
    ("StableDiffusionXLImg2ImgPipeline", "refiner"), ("AudioLDMPipeline", r"FluxPipeline.*one file with its row"),
])  # fmt: skip
def test_another_pipeline_is_refused_with_what_there_is(name, hint, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UsageError, match=f"is a {name}") as refused:
        families.load(str(tmp_path))
    assert re.search(hint, refused.value.hint)


def test_what_it_has_not(model):
    with pytest.raises(UsageError, match="has no --train bottleneck"):
        model.trainable("bottleneck")
    canvas = Canvas(model, torch.zeros(model.image_shape), torch.ones(1, *model.image_shape[1:]))
    with pytest.raises(UsageError, match="models that draw pixels"):
        check(RePaint(), canvas)


@pytest.mark.parametrize("editor", [
    Inpaint(strengths=(1.0,), seeds=2, steps=3), SDEdit(strengths=(0.6,), seeds=2, steps=4),
], ids=["inpaint", "sdedit"])  # fmt: skip
def test_an_edit_keeps_what_is_outside_the_mask(model, editor):
    target, mask = torch.rand(model.image_shape) * 2 - 1, torch.zeros(1, *model.image_shape[1:])
    mask[:, :8] = 1
    row = int(model.prompt_ids([RED])[0])
    found = editor(Canvas(model, target, mask, seed=0, prompt_id=row))
    assert not any(torch.allclose(c.image[:, :8], target[:, :8], atol=0.05) for c in found)
    assert all(torch.equal(c.image[:, 8:], target[:, 8:]) for c in found)
    assert not torch.equal(found[0].image, found[1].image)


@pytest.mark.parametrize("folder", ["sd"], indirect=True)
def test_a_fill_is_the_stock_inpainting_pipeline_s(folder, model):
    """Which takes latents for the picture here, and draws them from the encoder's distribution elsewhere."""
    target, mask = torch.rand(model.image_shape) * 2 - 1, torch.zeros(1, *model.image_shape[1:])
    mask[:, :8] = 1
    noise, row = sampling.random_noise(1, model.latent_shape, 0, "test"), int(model.prompt_ids([RED])[0])
    x_0, stock = model.encode(target[None]), StableDiffusionInpaintPipeline(**Stock(folder).pipeline.components)
    theirs = stock(
        RED, x_0, mask, masked_image_latents=x_0, latents=noise, strength=1.0, num_inference_steps=5,
        guidance_scale=2.0, height=16, width=16, output_type="pt",
    ).images  # fmt: skip
    ours = Canvas(model, target, mask, prompt_id=row).fill(noise, model.schedule.share(1.0), steps=5)
    torch.testing.assert_close(ours, theirs * 2 - 1, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_not_loaded_costs_the_same(folder, model):
    found = blueprint(str(folder), options(folder))
    assert (found.image_shape, found.latent_shape) == (model.image_shape, model.latent_shape)
    assert (found.guided, found.setting, found.retain_prompts) == (model.guided, (model.image_shape[1:], 2.0), CAPTIONS)
    assert found.sampling_timesteps(4) == model.sampling_timesteps(4)
    embedded = [tensor.shape[-1] for tensor in model._conditioning[0]]
    assert [shape[-1] for shape in model.spec.conditioning_shapes(model.network.config)] == embedded
    plain, less = (
        reckon(found, "lora", 2, micro_batch=2, checkpointing=on, half=False).activations for on in (False, True)
    )
    assert 0 < less < plain


WHOLE_WAY = [name if name == "z-image" else pytest.param(name, marks=pytest.mark.slow) for name in MADE]


@pytest.mark.parametrize("folder", WHOLE_WAY, indirect=True)
def test_unlearn_verify_export(folder, tmp_path):
    g = torch.Generator().manual_seed(3)
    for name in ("target", "surrogate"):
        images.write_image(torch.rand(3, size(folder), size(folder), generator=g) * 2 - 1, tmp_path / f"{name}.png")
    asked = {"model": str(folder), "resolution": size(folder)}
    config = UnlearnConfig(
        **asked, target=(tmp_path / "target.png",), surrogate=(tmp_path / "surrogate.png",), prompt=(RED,),
        output=tmp_path / "x.patch", max_train_steps=3, train_batch_size=2, retain_batch_size=2, learning_rate=5e-2,
        rank=2, lora_alpha=3, retain_count=12, sampler_steps=3, num_validation_images=1, min_distance=0.01,
    )  # fmt: skip
    patch = unlearn(config).output
    assert all(".lora_" in name for name in Patch.load(patch).tensors)
    assert api.plan_unlearn(config)["passes"]["in all"][0] > 0
    judged = verify(VerifyConfig(
        **asked, patch=patch, max_rate=0.4, paired=16, controls=8, draws=2, sampler_steps=2,
    ))  # fmt: skip
    assert {"sample", f"sample '{RED}'", "retention"} <= {c.name for c in judged.checks}
    spec = families.spec_of(str(folder))
    loras = [kind for kind in ("lora", "kohya") if kind in spec.formats]
    out = {
        kind: export(ExportConfig(**asked, patch=patch, output=tmp_path / kind, format=kind)).output
        for kind in ("diffusers", "peft", *loras)
    }
    noise = sampling.random_noise(1, families.load(str(folder), options(folder)).latent_shape, 0, "test")
    base, merged = (Stock(f)([RED], 4, 2.0, noise=noise) for f in (folder, out["diffusers"]))
    assert not torch.allclose(merged, base, atol=1e-3)
    out["transformer"] = export(ExportConfig(
        **asked, patch=patch, output=tmp_path / "network.safetensors", format="transformer"
    )).output  # fmt: skip
    if "single-file" in spec.formats:
        out["single-file"] = file = export(ExportConfig(
            **asked, patch=patch, output=tmp_path / "x.safetensors", format="single-file"
        )).output  # fmt: skip
        how = options(folder, pipeline_config=folder)
        one, all_parts = families.load(str(file), how), families.load(str(out["diffusers"]), options(folder))
        assert one.spec is spec
        for name in (spec.network, "vae", *spec.text_encoders):
            theirs = getattr(all_parts.pipeline, name).state_dict()
            for key, tensor in getattr(one.pipeline, name).state_dict().items():
                assert torch.equal(tensor, theirs[key]), (name, key)
    wanted = families.load(str(out["diffusers"]), options(folder)).network.state_dict()
    for kind, path in out.items():  # as `verify --candidate` opens them
        shown = shipped.load(path, str(folder), options(folder)).network.state_dict()
        assert set(shown) == set(wanted), kind
        assert all(torch.allclose(shown[name], wanted[name], rtol=1e-3, atol=1e-4) for name in wanted), kind
    for kind in ("diffusers", *loras, "peft"):
        stock = Stock(folder, by_its_card(out[kind], repr(str(folder))))
        torch.testing.assert_close(stock([RED], 4, 2.0, noise=noise), merged, rtol=1e-3, atol=1e-3)
