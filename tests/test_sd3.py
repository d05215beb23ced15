"""Stable Diffusion 3, against diffusers' own pipelines on tiny random weights."""

import json
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from conftest import rewrite
from diffusers import (
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from pipelines import CAPTIONS, tiny_sd3
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from unforget import families
from unforget.api.unlearning import _note_what_is_lost
from unforget.config import ExportConfig, UnlearnConfig, VerifyConfig
from unforget.core import sampling
from unforget.core.types import Instance, Pool, Progress, Trajectory
from unforget.errors import CannotRun, UsageError
from unforget.families import Hints, Options, samplers
from unforget.families import sd3 as sd3_row
from unforget.families.model import DiffusionModel
from unforget.families.sd3 import ABSENT, SCORES, WithoutT5, _LastCount
from unforget.files import cache, images
from unforget.files.patch import Patch, Provenance, Stack
from unforget.surrogate.canvas import Canvas
from unforget.surrogate.editors import Inpaint, Instruct, SDEdit
from unforget.unlearning.compute import Compute, mixed
from unforget.unlearning.prepare import Prepared
from unforget.unlearning.trainer import Trainer

RED, BLUE, GREEN = CAPTIONS
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture
def stock(sd3_folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3_folder, dtype=torch.float32, **NO_T5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_draw_is_the_stock_pipeline_s(sd3, stock):
    noise = sampling.random_noise(2, sd3.latent_shape, 0, "test")
    theirs = stock(
        [RED, BLUE], latents=noise, guidance_scale=2.0, num_inference_steps=5, output_type="pt"
    ).images * 2 - 1  # fmt: skip
    ours = sampling.draw(sd3, noise, steps=5, prompt_ids=sd3.prompt_ids([RED, BLUE]))
    assert float(ours.std()) > 0.02
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_prompts_matter_and_keep_their_rows(sd3):
    assert sd3.prompts == [""]
    assert sd3.prompt_ids([RED, "", BLUE, RED]).tolist() == [1, 0, 2, 1]
    x, index = torch.randn(3, *sd3.latent_shape), torch.tensor([900, 900, 900])
    with torch.no_grad():
        answers = sd3.predict(x[:1].expand(3, -1, -1, -1), index, torch.tensor([0, 1, 2]))
    assert not torch.allclose(answers[0], answers[1])
    assert not torch.allclose(answers[1], answers[2])


@pytest.mark.parametrize("dual", [(), (0,)])
def test_two_tokens_count_for_all_of_the_missing_t5(dual):
    """With the second attention of SD3.5, too, which sees the image alone."""
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
        dual_attention_layers=dual, qk_norm="rms_norm" if dual else None,
    ).eval()  # fmt: skip
    for p in network.norm_out.parameters():
        torch.nn.init.normal_(p, std=0.5)
    words, pooled = torch.randn(1, 8, 24), torch.randn(1, 16)
    rest = (pooled, torch.tensor([500.0]))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        whole = network(x, torch.cat([words, torch.zeros(1, 256, 24)], 1), *rest).sample
        network.set_attn_processor(WithoutT5())
        short = network(x, torch.cat([words, torch.zeros(1, 2, 24)], 1), *rest).sample
        network.set_attn_processor(JointAttnProcessor2_0())
        wrong = network(x, torch.cat([words, torch.zeros(1, 2, 24)], 1), *rest).sample
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=3e-5)
    assert not torch.allclose(wrong, whole, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_count_256_in_every_precision(dtype, autocast):
    """Counted by what they get of the attention, over many queries, for one answer in bfloat16 has three digits."""
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, n, 16, generator=g).to(dtype) for n in (8192, 200))
    key = torch.cat([key, key.new_zeros(1, 1, len(SCORES), 16)], 2)
    value = torch.zeros_like(key)
    value[..., -len(SCORES) :, :] = 1
    with _LastCount(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        share = torch.nn.functional.scaled_dot_product_attention(query, key, value)[0, 0, :, 0].double()
    others = (query.double() @ key[:, :, :200].double().mT / 4).exp().sum(-1)[0, 0]
    assert float((share / (1 - share) * others).mean()) == pytest.approx(ABSENT, rel=1e-3)


def test_latents_are_the_scaled_shifted_mean(sd3, stock):
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = stock.vae.encode(picture).latent_dist.mean
    torch.testing.assert_close(sd3.encode(picture), (mean - 0.1) * 1.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        sd3.decode(sd3.encode(picture)), stock.vae.decode(mean).sample.clamp(-1, 1), rtol=1e-3, atol=1e-4
    )


def test_a_trajectory_at_another_guidance_is_the_stock_pipeline_s(sd3, stock, monkeypatch):
    monkeypatch.setattr(samplers, "STEEPEST", 0.0)  # steps of the first order, as Euler's
    noise, ids = sampling.random_noise(1, sd3.latent_shape, 0, "test"), sd3.prompt_ids([RED])
    way = Trajectory(torch.tensor(sd3.sampling_timesteps(5), dtype=torch.float64), guidance=6.0)
    ask = {"latents": noise, "num_inference_steps": 5, "output_type": "pt"}
    theirs, usual = (stock(RED, guidance_scale=g, **ask).images * 2 - 1 for g in (6.0, 2.0))
    ours = sampling.draw(sd3, noise, steps=way, prompt_ids=ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(ours, usual, atol=2e-2) and sd3.guidance == 2.0


def test_the_schedule_is_the_scheduler_s_with_its_shift(sd3, stock):
    x_0, noise = torch.randn(2, 1, *sd3.latent_shape)
    for row in (0, 400, 999):
        t = stock.scheduler.timesteps[len(stock.scheduler.timesteps) - 1 - row]
        theirs = stock.scheduler.scale_noise(x_0, t[None], noise)
        torch.testing.assert_close(sd3.schedule.add_noise(x_0, noise, t[None]), theirs)


def test_denoising_from_a_level_is_the_stock_sampler_begun_there(sd3, stock):
    sampler = stock.scheduler
    sampler.set_timesteps(10)
    row = sd3.sampling_timesteps(10)[4]
    x_0, noise = torch.randn(2, 1, *sd3.latent_shape)
    ours = sd3.denoise(
        sd3.schedule.add_noise(x_0, noise, torch.tensor([row])), steps=10, start=row, prompt_ids=sd3.prompt_ids([RED])
    )
    sampler.set_begin_index(4)
    x_t = sampler.scale_noise(x_0, sampler.timesteps[4][None], noise)
    embeds = stock.encode_prompt(RED, RED, RED)
    with torch.no_grad():
        for t in sampler.timesteps[4:]:
            asked, plain = (stock.transformer(x_t, embeds[i], embeds[i + 2], t[None]).sample for i in (0, 1))
            x_t = sampler.step(plain + 2.0 * (asked - plain), t, x_t).prev_sample
    torch.testing.assert_close(ours, x_t, rtol=1e-2, atol=5e-3)


def test_the_view_of_a_lora_is_the_base_and_costs_no_copy(sd3):
    x, index, row = torch.randn(1, *sd3.latent_shape), torch.tensor([700]), sd3.prompt_ids([RED])
    with torch.no_grad():
        before = sd3.predict(x, index, row)
    weights = sd3.trainable("lora", rank=2, alpha=2, seed=0)
    view = sd3.frozen_reference("lora")
    assert view.network is sd3.network
    with torch.no_grad():
        for p in weights:
            p.add_(0.3)
        assert not torch.allclose(sd3.predict(x, index, row), before, atol=1e-3)
        torch.testing.assert_close(view.predict(x, index, row), before)
        assert not torch.allclose(sd3.predict(x, index, row), before, atol=1e-3)
    assert {n.split(".lora_")[0].split(".attn.")[1] for n, _ in sd3.network.named_parameters() if ".lora_" in n} == {
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    }  # fmt: skip


@pytest.fixture
def rough(sd3_folder):
    """The same model, computed in bfloat16."""
    return families.load(str(sd3_folder), Options(network_dtype=torch.bfloat16, rest_dtype=torch.bfloat16))


def test_what_is_trained_is_float32_whatever_the_base_is(rough, pictures):
    """A step of 1e-5 is less than the last digit of a bfloat16 number, and would leave it as it was."""
    instance = Instance(*(rough.encode(images.read_image(pictures / f"{n}.png", rough.image_shape)[None])[0]
                          for n in ("target", "surrogate")), "t")  # fmt: skip
    retain = Pool.of(torch.randn(4, *rough.latent_shape))
    prepared = Prepared((instance,), (instance,), retain, retain[:0], torch.ones(1, 1))
    few = {"max_train_steps": 2, "cooldown_steps": 0, "learning_rate": 1e-5, "warmup_steps": 0}
    recipe = rough.spec.recipes["default"].model_copy(update={**few, "forget_batch_size": 2, "retain_batch_size": 2})
    trainer = Trainer(rough, rough.frozen_reference("lora"), prepared, recipe, seed=0, compute=Compute())
    before = [w.detach().clone() for w in trainer.weights]
    assert {w.dtype for w in trainer.weights} == {torch.float32}
    assert next(rough.network.parameters()).dtype == torch.bfloat16
    for _ in trainer:  # the first update moves the factors that begin at zero, and only then the others have gradients
        pass
    moments = {m.dtype for state in trainer.optimizer.state.values() for m in state.values()}
    assert moments == {torch.float32}
    last = len(rough.network.transformer_blocks) - 1  # what its text comes to is not used any more
    names = [n for n, _ in rough.network.named_parameters() if ".lora_" in n]
    for name, one, other in zip(names, before, trainer.weights, strict=True):
        if f".{last}.attn.add_q" not in name and f".{last}.attn.to_add" not in name:
            assert float((one != other).float().mean()) > 0.9, name  # some gradients are 0 in bfloat16
    patch = Patch.between(rough.network, rough.network, a_lora(16, 16))
    for name, factor in patch.tensors.items():
        assert factor.dtype == torch.float32, name


@pytest.mark.parametrize("half", [False, True])
def test_the_gradient_of_an_adapter_beside_bfloat16_is_that_beside_float32(sd3, rough, half):
    x, timestep = torch.randn(2, *sd3.latent_shape), torch.tensor([700, 300])

    def answered(model, half):
        ids, weights = model.prompt_ids([RED, BLUE]), model.trainable("lora", rank=2, alpha=2, seed=0)
        generator = torch.Generator().manual_seed(1)
        for p in weights:
            p.data.normal_(std=0.1, generator=generator)
            p.requires_grad_(True)
        answer = mixed(model.predict, half, model.device)(x, timestep, ids)
        return answer, torch.cat([g.flatten() for g in torch.autograd.grad(answer.square().mean(), weights)])

    (exact, right), (answer, gradient) = answered(sd3, False), answered(rough, half)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(answer, exact, rtol=0.05, atol=0.05)
    assert float(torch.cosine_similarity(gradient, right, dim=0)) > 0.99


def test_all_weights_of_a_network_that_is_not_float32_are_refused_with_the_memory(sd3):
    sd3.network.bfloat16()
    numbers = sum(p.numel() for p in sd3.network.parameters())
    for ask in (sd3.trainable, sd3.frozen_reference):
        with pytest.raises(CannotRun, match=f"here they are bfloat16: {28 * numbers / 2**30:.1f} GiB") as caught:
            ask("full")
        assert caught.value.hint == "Give --train lora."


def test_after_release_known_prompts_work_and_new_ones_do_not(sd3):
    row = sd3.prompt_ids([RED])
    sd3.unload_text_encoders()
    assert sd3.pipeline.text_encoder is None
    sd3.denoise(torch.randn(1, *sd3.latent_shape), steps=2, prompt_ids=row)
    assert sd3.prompt_ids([RED]).tolist() == row.tolist()
    with pytest.raises(CannotRun, match="after the text encoders"):
        sd3.prompt_ids([BLUE])


def test_a_prompt_that_is_too_long(sd3):
    with pytest.raises(UsageError, match="has 12 tokens, the tokenizer allows 8"):
        sd3.prompt_ids(["red " * 10])


@pytest.fixture
def t5():
    torch.manual_seed(0)
    return pipelines.t5(24)


def test_a_long_prompt_that_t5_reads_whole(sd3_folder, t5):
    """CLIP reads its beginning, as in the stock pipeline, and the user is told."""
    notes = []
    model = families.load(str(sd3_folder), Options(note=notes.append))
    model.pipeline.text_encoder_3, model.pipeline.tokenizer_3 = t5
    model.absent = ()
    model.network.set_attn_processor(JointAttnProcessor2_0())
    prompt, ends = "red " * 10, "red " * 9 + "blue"
    one, other = model.prompt_ids([prompt, ends]).tolist()
    assert len(notes) == 2
    assert "has 12 tokens: text_encoder, text_encoder_2 read the first 8" in notes[0]
    assert "text_encoder_3 reads it whole" in notes[0]
    words, pooled = zip(*model._conditioning, strict=True)
    assert torch.equal(words[one][:8], words[other][:8])
    assert torch.equal(pooled[one], pooled[other])
    assert not torch.equal(words[one][8:], words[other][8:])
    stock = model.pipeline.encode_prompt(prompt, prompt, prompt, do_classifier_free_guidance=False)
    torch.testing.assert_close(words[one], stock[0][0])
    with pytest.raises(UsageError, match="the tokenizer allows 256"):
        model.prompt_ids(["red " * 400])


def test_a_resolution_that_it_cannot_draw(sd3_folder):
    assert families.load(str(sd3_folder), Options(resolution=8)).image_shape == (3, 8, 8)
    with pytest.raises(UsageError, match="cannot draw 10x10") as caught:
        families.load(str(sd3_folder), Options(resolution=10))
    assert "multiple of 4, 32 at most" in caught.value.hint


def test_a_missing_text_encoder(sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder, tmp_path / "model")
    rewrite(folder / "model_index.json", text_encoder_2=[None, None])
    with pytest.raises(CannotRun, match="lacks its text_encoder_2"):
        families.load(str(folder))


def test_missing_weights_name_their_folder(sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder, tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CannotRun, match="vae' holds no weights"):
        families.load(str(folder))


def test_hints_that_are_none(sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder, tmp_path / "model")
    (folder / "unforget.json").write_text('{"guidance": "much"}')
    with pytest.raises(UsageError, match="is not what this tool expects"):
        families.load(str(folder))
    (folder / "unforget.json").unlink()
    plain = families.load(str(folder))
    assert plain.guidance == 7.0
    assert len(plain.retain_prompts) == len(set(plain.retain_prompts)) > 50


def test_a_single_file_offline_says_what_it_needs(tmp_path):
    path = tmp_path / "sd3.safetensors"
    save_file({"model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": torch.zeros(8)}, path)
    with pytest.raises(UsageError, match="does not say what its model is made of") as caught:
        families.load(str(path))
    assert "--pipeline-config" in caught.value.hint
    (tmp_path / "sd3.ckpt").write_bytes(b"pickle")
    with pytest.raises(UsageError, match=r"not a \.safetensors file"):
        families.load(str(tmp_path / "sd3.ckpt"))


def test_a_gated_model_says_how_to_get_it():
    from unforget.families.loading import _hint

    assert "Accept its licence" in _hint("stabilityai/x@main", "403 Client Error: gated repo")
    with pytest.raises(CannotRun, match="cannot open the model 'sd3'"):
        families.load("sd3")


# The commands, on random weights: that the plumbing holds, not that anything is learnt.

SHORT = {"max_train_steps": 3, "train_batch_size": 2, "retain_batch_size": 2, "learning_rate": 1e-2, "rank": 2}


def a_lora(rank, alpha):
    return Provenance(
        base="x", base_digest="", targets=[], surrogates=[], holds="lora", adapter={"rank": rank, "alpha": alpha},
        recipe={}, seed=0, steps=0, versions={},
    )  # fmt: skip


def unlearned(folder, home, *, prompts=(RED,), **changes):
    from unforget import unlearn

    return unlearn(UnlearnConfig(
        model=str(folder), target=(home / "target.png",), surrogate=(home / "surrogate.png",), prompt=prompts,
        output=home / "x.patch", retain_count=12, sampler_steps=3, num_validation_images=1,
        min_distance=0.01, **{**SHORT, **changes},
    ))  # fmt: skip


def test_unlearn_verify_export(sd3_folder, pictures, stock):
    from unforget import export, verify

    result = unlearned(sd3_folder, pictures, lora_alpha=16)
    patch = Patch.load(result.output)
    assert patch.provenance.adapter == {"rank": 2, "alpha": 16}
    assert patch.provenance.prompts == [RED]
    assert all(".lora_" in n for n in patch.tensors)
    assert {row["target"] for row in result.table} == {patch.provenance.targets[0]}
    assert sum(row["prompt"] == RED for row in result.table) == 3
    judged = verify(VerifyConfig(
        model=str(sd3_folder), patch=result.output, max_rate=0.4, paired=16, controls=8, draws=2, sampler_steps=2,
    ))  # fmt: skip
    earliest = next(c.timestep for c in judged.checks if c.probe == "reconstruct")
    assert {"sample", f"sample '{RED}'", "retention", f"quantization@{earliest:g} bf16 '{RED}'"} <= {
        c.name for c in judged.checks
    }
    assert str(pictures) not in judged.model_dump_json()

    config = ExportConfig(model=str(sd3_folder), patch=result.output, output=pictures / "whole")
    whole = export(config).output
    lora = export(config.model_copy(update={"output": pictures / "lora", "format": "lora"})).output
    noise = sampling.random_noise(1, (16, 8, 8), 0, "test")
    ask = {"prompt": BLUE, "latents": noise, "guidance_scale": 2.0, "num_inference_steps": 4, "output_type": "pt"}
    base = stock(**ask).images
    merged = StableDiffusion3Pipeline.from_pretrained(whole, dtype=torch.float32, **NO_T5)
    stock.load_lora_weights(lora)
    one, other = merged(**ask).images, stock(**ask).images
    assert not torch.allclose(one, base, rtol=0, atol=1e-4)
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    with safe_open(lora / "pytorch_lora_weights.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (2, 2)


def test_training_all_weights(sd3_folder, pictures):
    from unforget import export

    result = unlearned(sd3_folder, pictures, train="full", rank=None, prompts=())
    patch = Patch.load(result.output)
    assert patch.provenance.adapter is None
    assert not any("lora" in n for n in patch.tensors)
    with pytest.raises(UsageError, match="not a LoRA"):
        export(ExportConfig(model=str(sd3_folder), patch=result.output, output=pictures / "l", format="lora"))


def test_the_same_run_twice_is_the_same_patch(sd3_folder, pictures):
    first = unlearned(sd3_folder, pictures).output.read_bytes()
    shutil.rmtree(pictures / "x.run")
    (pictures / "x.patch").unlink()
    assert unlearned(sd3_folder, pictures).output.read_bytes() == first


def test_a_lora_for_another_architecture(sd3_folder, pictures, tmp_path):
    result = unlearned(sd3_folder, pictures)
    patch = Patch.load(result.output)
    patch.tensors["transformer_blocks.7.attn.to_q.lora_A.weight"] = torch.zeros(2, 16)
    patch.tensors["transformer_blocks.7.attn.to_q.lora_B.weight"] = torch.zeros(16, 2)
    shapes = {n: t.shape for n, t in tiny_sd3().transformer.state_dict().items()}
    with pytest.raises(CannotRun, match=r"the network has no place for 'transformer_blocks\.7\.attn\.to_q\.weight'"):
        patch.check(shapes)
    with pytest.raises(CannotRun, match="the patch was made for"):
        Stack((Patch.load(result.output),)).apply(tiny_sd3(seed=1).transformer)


def test_merging_is_the_adapter(sd3):
    weights = sd3.trainable("lora", rank=3, alpha=6, seed=0)
    with torch.no_grad():
        for p in weights:
            p.normal_(std=0.2)
    from peft import get_peft_model_state_dict

    factors = get_peft_model_state_dict(sd3.network)
    plain = tiny_sd3().transformer.eval()
    patch = Patch(factors, a_lora(3, 6))
    for name in patch.names():
        plain.state_dict()[name].copy_(patch.after(name, plain.state_dict()[name]))
    x, row = torch.randn(1, *sd3.latent_shape), sd3.prompt_ids([RED])
    with torch.no_grad():
        with_adapter = sd3.predict(x, torch.tensor([700]), row)
        sd3.network = plain
        plain.set_attn_processor(WithoutT5())
        torch.testing.assert_close(sd3.predict(x, torch.tensor([700]), row), with_adapter, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scope", ["bottleneck"])
def test_a_scope_that_it_has_not(sd3, scope):
    with pytest.raises(UsageError, match="has no --train bottleneck"):
        sd3.trainable(scope)


def test_gradient_checkpointing_changes_no_gradient(sd3):
    x, index, row = torch.randn(1, *sd3.latent_shape), torch.tensor([700]), sd3.prompt_ids([RED])
    weights = sd3.trainable("lora", rank=2, alpha=2, seed=0)
    with torch.no_grad():
        for p in weights:
            p.add_(0.1)

    def gradient(**options):
        says = mixed(sd3.predict, True, sd3.device, **options)
        return torch.autograd.grad(says(x, index, row).square().mean(), weights)

    plain = gradient()
    sd3.network.enable_gradient_checkpointing()
    for one, other in zip(plain, gradient(checkpointed=True), strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=1e-3)


def test_inpainting_keeps_what_is_outside_the_mask(sd3):
    target, mask = torch.rand(3, 16, 16) * 2 - 1, torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    row = int(sd3.prompt_ids([RED])[0])
    found = Inpaint(strengths=(1.0,), seeds=2, steps=3)(Canvas(sd3, target, mask, seed=0, prompt_id=row))
    assert len(found) == 2
    for c in found:
        assert torch.equal(c.image[:, 8:], target[:, 8:])
        assert not torch.allclose(c.image[:, :8], target[:, :8], atol=0.05)
    assert not torch.equal(found[0].image, found[1].image)


def test_sdedit_under_a_prompt(sd3):
    target = torch.rand(3, 16, 16) * 2 - 1
    row = int(sd3.prompt_ids([RED])[0])
    editor = SDEdit(strengths=(0.6,), seeds=2, steps=4)
    plain, asked = (editor(Canvas(sd3, target, torch.ones(1, 16, 16), prompt_id=r)) for r in (0, row))
    assert plain[0].image.shape == target.shape
    assert not torch.equal(plain[0].image, asked[0].image)


def test_an_instruction_editor_from_a_folder(sd3, editor_folder):
    notes, target = [], torch.rand(3, 16, 16) * 2 - 1
    ask = Instruct(model=str(editor_folder), instruction="a blue circle", seeds=2, steps=2)
    found = ask(Canvas(sd3, target, torch.ones(1, 16, 16), note=notes.append))
    assert [c.image.shape for c in found] == [target.shape] * 2
    assert not torch.equal(found[0].image, found[1].image)
    assert len(notes) == 1
    assert notes[0].endswith("is under cc0-1.0")


def test_a_pipeline_that_edits_nothing(tiny_folder):
    with pytest.raises(UsageError, match="takes no picture and instruction"):
        families.editor(str(tiny_folder))


def test_the_command_line(sd3_folder, pictures, cli):
    args = ["--model", sd3_folder, "--target", pictures / "target.png", "--prompt", RED]
    shown = cli("unlearn", *args, "--rank", "4", "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert (said["recipe"]["train"], said["recipe"]["rank"], said["prompt"]) == ("lora", 4, [RED])
    made = cli("edit-surrogate", *args, "-o", "s.png", "--retain-count", "8", "--min-distance", "0.01", "--json")
    assert made.exit_code == 0, made.output
    assert (pictures / "s.sheet.png").is_file()


def test_prompts_to_a_model_without(tiny_folder, picture, cli):
    refused = cli("unlearn", "--model", tiny_folder, "--target", picture, "--prompt", "a face")
    assert refused.exit_code == 2
    assert "takes no prompts" in refused.stderr


def test_where_a_target_belongs_it_stays(sd3, pictures):
    """A near-copy under a prompt that is not to forget it is kept beside given prompts, and dropped without."""
    from unforget.core.types import Instance, Pool, Progress
    from unforget.unlearning import prepare

    target, other = (images.read_image(pictures / f"{n}.png", sd3.image_shape) for n in ("target", "surrogate"))
    rows = sd3.prompt_ids(["", RED, BLUE, GREEN])
    kept = Pool(torch.stack([target, target, other, other]), rows[[1, 2, 2, 0]])
    notes = []
    draw = prepare.Drawer(sd3, 0, 2, Progress(note=notes.append))

    def look(*prompt_ids):
        instances = (Instance(target, other, "t", prompt_ids),)
        more = prepare.retained_lookalikes(draw, instances, kept)
        return more, prepare.encoded(sd3, instances, kept, more, 0.16)

    more, prepared = look(0, 1)
    assert prepared.prior_counts[0].tolist() == [1, 1, 0, 0]
    assert prepared.retain.prompt_ids.tolist() == [2, 2, 0, *[2] * len(more)]
    assert more.prompt_ids.tolist() == [2] * prepare.LOOKALIKES
    assert len(prepared.neighbours) == 3 + len(more)
    assert BLUE in notes[0]
    assert "stays" in notes[0]
    more, prepared = look(0)
    assert len(more) == 0
    assert prepared.retain.prompt_ids.tolist() == [2, 0]
    assert "--prompt" in notes[1]


def test_show_says_where_a_patch_came_from(sd3_folder, pictures, cli):
    unlearned(sd3_folder, pictures)
    said = json.loads(cli("show", pictures / "x.patch", "--json").stdout)
    assert said["prompts"] == [RED]
    assert said["adapter"] == {"rank": 2, "alpha": 2}
    shown = cli("show", pictures / "x.patch")
    assert shown.exit_code == 0
    assert said["base_digest"] in shown.stdout
    assert str(pictures) not in shown.stdout
    assert cli("show", pictures / "target.png").exit_code == 2


def test_other_guidance_is_another_retain_set(sd3):
    prompts = [RED] * 2
    first = cache.drawn_cached(sd3, "d", prompts, seed=0, steps=2)
    sd3.guidance = 9.0
    assert not torch.equal(cache.drawn_cached(sd3, "d", prompts, seed=0, steps=2), first)


def test_a_t5_that_answers_zeros_is_left_out_and_stock_opens_the_folder_as_it_is(sd3_folder, tmp_path):
    """Stock `from_pretrained` refuses a folder without a T5, and draws with 256 tokens of zeros where it has none."""
    folder = tmp_path / "silent"
    pipe = StableDiffusion3Pipeline.from_pretrained(sd3_folder, text_encoder_3=None, tokenizer_3=None)
    width = pipe.transformer.config.joint_attention_dim
    config = T5Config(vocab_size=len(T5Tokenizer()), d_model=width, d_kv=4, d_ff=4, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    loud = StableDiffusion3Pipeline(**{**pipe.components, "text_encoder_3": encoder, "tokenizer_3": T5Tokenizer()})
    assert DiffusionModel(sd3_row.SPEC, loud, "loud", Options(), Hints()).absent == ()
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    loud.register_modules(text_encoder_3=encoder, tokenizer_3=T5Tokenizer())
    loud.save_pretrained(folder)
    assert families.load(str(folder)).absent == ("text_encoder_3",)
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    drawn, wanted = (
        p("a flag", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (stock, pipe)
    )
    torch.testing.assert_close(drawn, wanted)


def test_what_the_autoencoder_loses_of_a_surrogate_is_said_before_the_work(sd3, monkeypatch):
    said = []
    progress = Progress(note=said.append)
    target, surrogate = torch.rand(2, *sd3.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _note_what_is_lost(Path("s.png"), target, surrogate, sd3, progress)  # its weights are random
    assert len(said) == 1 and "'s.png'" in said[0]
    monkeypatch.setattr(type(sd3), "decode", lambda self, x_0: surrogate[None])
    _note_what_is_lost(Path("s.png"), target, surrogate, sd3, progress)
    assert len(said) == 1
