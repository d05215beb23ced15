"""Every format, through the loader that its users have, on tiny random weights."""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATA, rewrite, tiny_pipeline
from diffusers import (
    DDPMPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from peft import PeftModel
from pipelines import CAPTIONS, narrow_flux, tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from unforget import families
from unforget.api import export, show
from unforget.config import ExportConfig, build
from unforget.core import sampling
from unforget.core.types import Progress
from unforget.errors import CannotRun, UsageError
from unforget.exports import placement, rounding
from unforget.exports.formats import FORMATS
from unforget.exports.manifest import HEADER, ExportManifest, called
from unforget.exports.show import damage
from unforget.families import shipped, weights
from unforget.files.patch import Patch, Provenance
from unforget.files.storage import checksummed, digest, open_tensors, undamaged
from unforget.verification.report import Report, Target

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
RED = CAPTIONS[0]
LAYERS = [f"transformer_blocks.{b}.attn.{n}" for b in range(2) for n in ("to_q", "add_v_proj", "to_out.0")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Stock tells the text encoders of one file apart by their width, and takes clip_l's projection for identity."""
    pipeline = tiny_sd3()
    config = pipeline.text_encoder_2.config.__class__.from_dict(pipeline.text_encoder_2.config.to_dict())
    config.hidden_size = 16
    pipeline.text_encoder_2 = CLIPTextModelWithProjection(config).half()
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    folder = tmp_path_factory.mktemp("secret") / "base"
    pipeline.save_pretrained(folder)
    hints = {"guidance": 2.0, "retain_prompts": list(CAPTIONS)}
    (folder / "unforget.json").write_text(json.dumps(hints))
    rewrite(folder / "vae" / "config.json", _name_or_path=str(folder), more={"where": str(folder)})
    (folder / "text_encoder" / "evil.py").write_text("1/0")
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(b"variant")
    return folder


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret") / "ddpm"
    tiny_pipeline().save_pretrained(folder)
    return folder


def network(folder):
    return families.load(str(folder)).network


def made_for(folder, **changes):
    said = {
        "base": "base", "base_digest": digest(network(folder).state_dict()), "targets": ["t"], "surrogates": ["s"],
        "recipe": {"train": "x"}, "seed": 0, "steps": 1, "versions": {},
    }  # fmt: skip
    return Provenance(**{**said, **changes})


def lora(folder, path, seed=0, rank=2, layers=LAYERS, std=0.3, **changes):
    g, tensors = torch.Generator().manual_seed(seed), {}
    for name in layers:
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, 16, generator=g) * std
        tensors[f"{name}.lora_B.weight"] = torch.randn(16, rank, generator=g) * std
    said = made_for(folder, holds="lora", adapter={"rank": rank, "alpha": 2 * rank}, targets=[f"t{seed}"], **changes)
    Patch(tensors, said).save(path)
    return path


def whole(folder, path, seed=0, std=0.1, count=6):
    g = torch.Generator().manual_seed(seed)
    state = network(folder).state_dict()
    names = [n for n in state if n.endswith("weight")][2 : 2 + count]
    tensors = {n: (state[n] + std * torch.randn(state[n].shape, generator=g)).contiguous() for n in names}
    Patch(tensors, made_for(folder)).save(path)
    return path


def run(model, patch, output, notes=None, **changes):
    patches = patch if isinstance(patch, tuple) else (patch,)
    progress = Progress(note=(notes if notes is not None else []).append)
    return export(build(ExportConfig, {"model": str(model), "patch": patches, "output": output, **changes}), progress)


def patched(folder, *paths, scales=()):
    """The network with patches on, the independent way: dense products added to the weights in float64."""
    there = network(folder)
    state = {n: t.double() for n, t in there.state_dict().items()}
    for path, scale in zip(paths, scales or [1.0] * len(paths), strict=True):
        patch = Patch.load(path)
        adapter = patch.provenance.adapter
        for name in patch.names():
            if adapter:
                a, b = (patch.tensors[name.replace(".weight", f".lora_{s}.weight")].double() for s in "AB")
                state[name] += scale * adapter["alpha"] / adapter["rank"] * (b @ a)
            else:
                state[name] += scale * (patch.tensors[name].double() - there.state_dict()[name].double())
    return {n: t.float() for n, t in state.items()}


def assert_same(found, wanted, **how):
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype), msg=lambda m, n=name: f"{n}: {m}", **how)


def drawn(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = sampling.random_noise(1, (16, 8, 8), 0, "test")
    return pipeline(RED, latents=noise, guidance_scale=2.0, num_inference_steps=3, output_type="pt").images


def stock(folder, **parts):
    return StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32, **NO_T5, **parts)


def merged(base, patch):
    """What the stock pipeline draws with the patched network in it."""
    with_it = SD3Transformer2DModel.from_pretrained(base / "transformer")
    with_it.load_state_dict(patched(base, patch))
    return drawn(stock(base, transformer=with_it))


def contents(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


# A format each.


def test_a_folder(base, tmp_path):
    patch = lora(base, tmp_path / "a.patch")
    done = run(base, patch, tmp_path / "out")
    opened = stock(done.output)
    assert_same(opened.transformer.state_dict(), patched(base, patch), rtol=1e-5, atol=1e-6)
    assert digest(opened.transformer.state_dict()) == done.manifest.digest == done.manifest.patched_digest
    torch.testing.assert_close(drawn(opened), merged(base, patch), rtol=1e-3, atol=1e-4)
    found, before = contents(done.output), contents(base)
    assert set(before) - set(found) == {"text_encoder/evil.py", "text_encoder/model.fp16.safetensors"}
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors", "model_index.json"):
        assert found[name] == before[name]  # the second text encoder is float16 and stays so
    said = families.hints(done.output)
    assert (said.guidance, said.retain_prompts) == (2.0, CAPTIONS)
    made = ExportManifest.model_validate(undamaged(said.made))
    assert made.model_copy(update={"files": {}}) == done.manifest
    config = json.loads(found["vae/config.json"])
    assert "_name_or_path" not in config
    assert config["more"] == {}
    families.load(str(done.output))  # it can be patched again


def test_factors_in_a_precision_that_nothing_is_written_in(base, tmp_path):
    patch = lora(base, tmp_path / "a.patch")
    made = Patch.load(patch)
    Patch({n: t.double() for n, t in made.tensors.items()}, made.provenance).save(tmp_path / "b.patch")
    one, other = (run(base, p, tmp_path / f"{p.stem}-lora", format="lora") for p in (patch, tmp_path / "b.patch"))
    assert one.manifest.digest == other.manifest.digest and other.manifest.dtype == "float32"


def test_shards(base, tmp_path):
    patch = lora(base, tmp_path / "a.patch")
    done = run(base, patch, tmp_path / "out", max_shard_size="30KB")
    there = tmp_path / "out" / "transformer"
    SD3Transformer2DModel.from_pretrained(base / "transformer").save_pretrained(
        tmp_path / "theirs", max_shard_size="30KB"
    )
    ours, theirs = ([p.name for p in sorted(f.glob("*.safetensors*"))] for f in (there, tmp_path / "theirs"))
    assert ours == theirs
    assert len(ours) > 3
    index = "diffusion_pytorch_model.safetensors.index.json"
    one, other = (json.loads((f / index).read_text()) for f in (there, tmp_path / "theirs"))
    assert one["weight_map"] == other["weight_map"]
    assert one["metadata"]["total_size"] == other["metadata"]["total_size"]
    assert digest(stock(done.output).transformer.state_dict()) == done.manifest.digest
    again = run(done.output, lora(done.output, tmp_path / "b.patch"), tmp_path / "more")  # shards as a base
    assert again.manifest.base == "out"


@pytest.mark.parametrize("scales", [(1.0,), (0.5,), (1.0, -0.3)])
def test_a_lora_for_diffusers_and_for_peft(base, tmp_path, scales):
    paths = [lora(base, tmp_path / f"{i}.patch", i, 2 + i, LAYERS[i:]) for i, _ in enumerate(scales)]
    wanted = patched(base, *paths, scales=scales)
    for form in ("lora", "peft"):
        done = run(base, tuple(paths), tmp_path / form, format=form, scale=scales)
        if form == "lora":
            pipeline = stock(base)
            pipeline.load_lora_weights(done.output, use_safetensors=True)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
            found = pipeline.transformer
        else:
            found = SD3Transformer2DModel.from_pretrained(base / "transformer")
            found = PeftModel.from_pretrained(found, str(done.output)).merge_and_unload()
            config = json.loads((done.output / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == "base"
            assert config["r"] == config["lora_alpha"]
        assert_same(found.state_dict(), wanted, rtol=1e-4, atol=1e-5)
        assert [p.scale for p in done.manifest.patches] == list(scales)


@pytest.mark.parametrize("rank", [1, 3, 4, 32])
@pytest.mark.parametrize("form", ["lora", "peft"])
def test_the_factors_alone_are_the_whole_change(base, tmp_path, rank, form):
    """As programs read them that know no alpha but a tensor of that name."""
    patch = lora(base, tmp_path / "a.patch", rank=rank)
    done = run(base, patch, tmp_path / "out", format=form)
    (file,) = done.output.glob("*.safetensors")
    found = load_file(file)
    made, prefix = Patch.load(patch), {"lora": "transformer.", "peft": "base_model.model."}[form]
    for name in made.names():
        layer = prefix + name.removesuffix(".weight")
        change = found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(change, made.difference(name, torch.zeros(())), rtol=1e-5, atol=1e-6)


MIDDLE = [f"mid_block.attentions.0.transformer_blocks.0.attn1.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
OUTSIDE = "mid_block.attentions.0.proj_in"


@pytest.mark.parametrize(
    ("make", "layers"), [(tiny_sd, MIDDLE), (tiny_sdxl, MIDDLE[2:]), (tiny_sdxl, [*MIDDLE, OUTSIDE])]
)
def test_a_unet_s_lora_has_names_that_comfyui_reads_too(tmp_path, make, layers):
    """They are for attention alone: of other layers it has PEFT's, as all have."""
    make().save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "unforget.json").write_text(json.dumps({"guidance": 2.0, "retain_prompts": list(CAPTIONS)}))
    patch = lora(tmp_path / "unet", tmp_path / "a.patch", layers=layers)
    done = run(tmp_path / "unet", patch, tmp_path / "out", format="lora", resolution=16)
    found, made = load_file(done.output / "pytorch_lora_weights.safetensors"), Patch.load(patch)
    assert len(found) == 2 * len(layers)
    for layer in layers:
        if OUTSIDE in layers:
            down, up = (found[f"unet.{layer}.lora_{side}.weight"] for side in "AB")
        else:  # as `comfy.lora.model_lora_keys_unet` makes them
            key = "unet." + layer.replace(".to_", ".processor.to_").removesuffix(".0")
            down, up = (found[f"{key}_lora.{side}.weight"] for side in ("down", "up"))
        change = made.difference(f"{layer}.weight", torch.zeros(()))
        torch.testing.assert_close(up @ down, change, rtol=1e-5, atol=1e-6)


def test_the_header_of_a_lora(base, tmp_path):
    done = run(base, lora(base, tmp_path / "a.patch"), tmp_path / "out", format="lora")
    with safe_open(done.output / "pytorch_lora_weights.safetensors", "pt") as file:
        said = file.metadata()
        names = list(file.keys())
    config = json.loads(said["lora_adapter_metadata"])
    assert {k: v for k, v in config.items() if "target" not in k} == {"transformer.r": 2, "transformer.lora_alpha": 2}
    assert said["modelspec.architecture"] == "stable-diffusion-v3-medium/lora"
    assert all(n.startswith("transformer.") for n in names)
    assert ExportManifest.model_validate(undamaged(json.loads(said[HEADER]))) == done.manifest


def test_one_file(base, tmp_path):
    patch = whole(base, tmp_path / "a.patch")
    done = run(base, patch, tmp_path / "out.safetensors", format="transformer")
    opened = SD3Transformer2DModel.from_single_file(
        str(done.output), config=str(base), subfolder="transformer", local_files_only=True
    )
    assert digest(opened.state_dict()) == done.manifest.digest
    assert_same(opened.state_dict(), patched(base, patch))
    said = open_tensors(done.output).metadata
    assert said["modelspec.sai_model_spec"] == "1.0.1"
    assert said["modelspec.resolution"] == "16x16"
    assert said["modelspec.merged_from"] == "base"
    assert list(said) == sorted(said)
    assert not any("date" in key for key in said)
    # ModelSpec's hash: the tensors as they lie in the file.
    import hashlib

    content = done.output.read_bytes()
    data_only = content[8 + int.from_bytes(content[:8], "little") :]
    assert said["modelspec.hash_sha256"] == f"0x{hashlib.sha256(data_only).hexdigest()}"


def test_the_original_layout(base, tmp_path):
    """From a folder; and from such a file, whose other tensors and metadata are kept."""
    patch = lora(base, tmp_path / "a.patch")
    one = run(base, patch, tmp_path / "one.safetensors", format="single-file")
    opened = StableDiffusion3Pipeline.from_single_file(
        str(one.output), config=str(base), local_files_only=True, dtype=torch.float32, **NO_T5
    )
    assert digest(opened.transformer.state_dict()) == one.manifest.digest
    torch.testing.assert_close(drawn(opened), merged(base, patch), rtol=1e-3, atol=1e-4)
    opened = open_tensors(one.output)
    assert opened.tensors["text_encoders.clip_g.transformer.text_model.final_layer_norm.bias"].dtype == torch.float16
    tensors = {**opened.load(), "extra.of.somebody": torch.ones(3)}
    single = tmp_path / "single.safetensors"
    save_file(tensors, single, {"modelspec.title": "theirs", "modelspec.date": "2024", "made in": str(tmp_path)})
    how = {"pipeline_config": base, "dtype": "float32"}
    family = families.load(str(single), families.Options(pipeline_config=base))
    second = lora(base, tmp_path / "b.patch", 1, base_digest=digest(family.network.state_dict()))
    two = run(single, second, tmp_path / "two.safetensors", format="single-file", **how)
    found = open_tensors(two.output)
    assert found.metadata["modelspec.title"] == "theirs"
    assert not {"modelspec.date", "made in"} & set(found.metadata)
    after = found.load()
    assert set(after) == set(tensors)
    same = {n for n, t in after.items() if t.dtype == tensors[n].dtype and torch.equal(t, tensors[n])}
    assert "extra.of.somebody" in same
    assert {n.rsplit(".", 2)[1] for n in set(after) - same} == {"qkv", "proj"}
    # The same file as a folder.
    folder = run(single, second, tmp_path / "folder", **how)
    assert digest(stock(folder.output).transformer.state_dict()) == two.manifest.digest == folder.manifest.digest
    assert_same(stock(folder.output).vae.state_dict(), stock(base).vae.state_dict(), rtol=0, atol=0)


def test_a_projection_that_stock_loaders_drop(sd3_folder, tmp_path):
    with pytest.raises(CannotRun, match="not the identity"):
        run(sd3_folder, lora(sd3_folder, tmp_path / "a"), tmp_path / "o.safetensors", format="single-file")


@pytest.fixture
def flux(tmp_path, monkeypatch):
    narrow_flux(monkeypatch)
    tiny_flux().save_pretrained(tmp_path / "flux")
    return tmp_path / "flux"


BLOCKS = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "add_v_proj", "to_out.0")]
SINGLE = [f"single_transformer_blocks.0.attn.{n}" for n in ("to_q", "to_v")]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_kohya_s_flux_has_the_original_s_layers(flux, tmp_path, dtype):
    """Those that are one there side by side, with zeros for what the LoRA leaves as it is."""
    patch = lora(flux, tmp_path / "a.patch", rank=3, layers=BLOCKS + SINGLE)
    more = {} if dtype is None else {"dtype": dtype}
    done = run(flux, patch, tmp_path / "out", format="kohya", **more)
    file = open_tensors(done.output / "pytorch_lora_weights.safetensors")
    said = {n.removeprefix("ss_network_"): v for n, v in file.metadata.items() if n.startswith("ss_")}
    assert said == {"module": "networks.lora_flux", "dim": "3", "alpha": "3"}
    found, tensors = file.load(), Patch.load(patch).tensors
    ranks = {name.removesuffix(".alpha"): int(t) for name, t in found.items() if name.endswith(".alpha")}
    assert ranks == {
        "lora_unet_double_blocks_0_img_attn_qkv": 9, "lora_unet_double_blocks_0_txt_attn_qkv": 9,
        "lora_unet_double_blocks_0_img_attn_proj": 3, "lora_unet_single_blocks_0_linear1": 12,
    }  # fmt: skip
    for layer, rank in ranks.items():
        assert len(found[f"{layer}.lora_down.weight"]) == found[f"{layer}.lora_up.weight"].shape[1] == rank
    last = "lora_unet_single_blocks_0_linear1"
    change = found[f"{last}.lora_up.weight"].float() @ found[f"{last}.lora_down.weight"].float()
    to_q, to_k, to_v, mlp = change.split((16, 16, 16, 64))
    assert not to_k.any()
    assert not mlp.any()
    for part, name in ((to_q, SINGLE[0]), (to_v, SINGLE[1])):
        wanted = 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(part, wanted, rtol=0.02, atol=0.01 if dtype else 1e-6)


def test_a_flux_of_another_width_has_no_original(flux, tmp_path, monkeypatch):
    patch = lora(flux, tmp_path / "a.patch", layers=BLOCKS)
    monkeypatch.setattr("unforget.families.layouts.flux.WIDTH", 3072)
    for form, name in (("kohya", "k"), ("single-file", "s.safetensors")):
        with pytest.raises(CannotRun, match="is 3072 wide, this one 16"):
            run(flux, patch, tmp_path / name, format=form)


@pytest.mark.slow
def test_a_file_of_the_network_alone_stays_one(flux, tmp_path):
    """From `flux1-dev.safetensors`: other names, and the other parts from the folder."""
    patch = lora(flux, tmp_path / "a.patch", layers=BLOCKS + SINGLE)
    whole = run(flux, patch, tmp_path / "whole.safetensors", format="single-file")
    prefix, tensors = "model.diffusion_model.", open_tensors(whole.output).load()
    assert {n.split(".")[0] for n in tensors} == {"model", "text_encoders", "vae"}
    alone = tmp_path / "alone.safetensors"
    save_file({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, alone)
    how = {"pipeline_config": flux, "dtype": "float32"}
    family = families.load(str(alone), families.Options(pipeline_config=flux))
    assert not any(getattr(family.pipeline, name).training for name in family.spec.text_encoders)
    assert digest(family.network.state_dict()) == whole.manifest.digest
    second = lora(flux, tmp_path / "b.patch", 1, layers=SINGLE, base_digest=whole.manifest.digest)
    two = run(alone, second, tmp_path / "two.safetensors", format="single-file", **how)
    assert set(open_tensors(two.output).tensors) == set(open_tensors(alone).tensors)
    folder = run(alone, second, tmp_path / "folder", **how)
    stock = FluxTransformer2DModel.from_single_file(
        str(two.output), config=str(flux), subfolder="transformer", local_files_only=True
    )
    assert digest(stock.state_dict()) == two.manifest.digest == folder.manifest.digest


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
def test_a_folder_of_a_single_file_has_the_parts_that_were_read(flux, tmp_path, beside):
    """Those of the file, or with `--text-encoder` of files beside it: not what the folder of its configuration has."""
    patch = lora(flux, tmp_path / "a.patch", layers=SINGLE)
    whole, config = run(flux, patch, tmp_path / "whole.safetensors", format="single-file"), tmp_path / "config"
    shutil.copytree(flux, config)
    model, files = whole.output, []
    others = ["text_encoder/model", "text_encoder_2/model"] + ["vae/diffusion_pytorch_model"] * (not beside)
    for name in others:
        path = config / f"{name}.safetensors"
        if beside:
            files.append(path.rename(tmp_path / path.parent.name))
        save_file({n: t + 1 for n, t in load_file(files[-1] if beside else path).items()}, path, {"format": "pt"})
    if beside:
        prefix, model = "model.diffusion_model.", tmp_path / "alone.safetensors"
        tensors = open_tensors(whole.output).load().items()
        save_file({n.removeprefix(prefix): t for n, t in tensors if n.startswith(prefix)}, model)
    again = lora(flux, tmp_path / "b.patch", 1, layers=SINGLE, base_digest=whole.manifest.digest)
    done = run(model, again, tmp_path / "out", pipeline_config=config, dtype="float32", text_encoder=tuple(files))
    found, meant = (FluxPipeline.from_pretrained(folder) for folder in (done.output, flux))
    for name in ("text_encoder", "text_encoder_2", "vae"):
        assert digest(getattr(found, name).state_dict()) == digest(getattr(meant, name).state_dict()), name
    # `verify --candidate` opens it beside a base that is given the same files.
    options = families.Options(pipeline_config=config, text_encoder=tuple(files))
    assert shipped.load(done.output, str(model), options).spec.name == "flux"
    # A candidate that holds them itself is judged by its own; as a model it has no place for them.
    candidate = shipped.load(whole.output, str(model), options)
    for name in ("text_encoder", "text_encoder_2"):
        state = {n: t.float() for n, t in getattr(candidate.pipeline, name).state_dict().items()}
        assert_same(state, {n: t for n, t in getattr(meant, name).state_dict().items() if n in state})
    for file in files:
        with pytest.raises(UsageError, match="has no place: the model holds every text encoder") as caught:
            families.load(str(whole.output), dataclasses.replace(options, text_encoder=(file,)))
        assert "Leave out --text-encoder" in caught.value.hint


CATASTROPHIC = "(([a-z_0-9]+[.]?)+)+!"
"""As a pattern on the name of a layer it takes longer than anybody waits."""
UNASKED = {
    "target_modules": CATASTROPHIC, "exclude_modules": CATASTROPHIC, "rank_pattern": {CATASTROPHIC: 4},
    "alpha_pattern": {CATASTROPHIC: 4}, "layers_pattern": CATASTROPHIC, "r": 10**9, "lora_alpha": 1e300,
    "init_lora_weights": "pissa", "use_dora": True, "modules_to_save": ["norm_out"], "bias": "all",
    "auto_mapping": {"base_model_class": "x", "parent_library": "evil"}, "megatron_core": "evil",
}  # fmt: skip


@pytest.mark.parametrize("form", ["lora", "peft"])
def test_what_a_shipped_lora_says_of_itself_takes_no_time_and_makes_nothing_else_of_it(base, tmp_path, form):
    out = run(base, lora(base, tmp_path / "a.patch"), tmp_path / "out", format=form).output
    file, config = next(out.glob("*.safetensors")), out / "adapter_config.json"
    tensors, metadata = load_file(file), open_tensors(file).metadata
    key = "lora_adapter_metadata"
    sound = config.read_text() if form == "peft" else metadata[key]

    def say(value):
        if form == "peft":
            config.write_text(value)
        else:
            save_file(tensors, file, {**metadata, key: value})

    for name, value in UNASKED.items():
        said = name if form == "peft" else f"transformer.{name}"
        say(json.dumps({**json.loads(sound), said: value}))
        with pytest.raises(CannotRun, match="read otherwise than by its rank, alpha and layers"):
            shipped.load(out, str(base), families.Options())
    for text in ("[" * 100_000, "{", "[]", "7", ""):
        say(text)
        with pytest.raises(CannotRun, match=r"which is no LoRA|is no sound LoRA"):
            shipped.load(out, str(base), families.Options())
    say(sound)
    strange = next(name for name in tensors if "lora" in name)
    save_file({**tensors, f"transformer.{CATASTROPHIC}.lora_A.weight": tensors[strange].clone()}, file, metadata)
    with pytest.raises(CannotRun, match="which is no LoRA"):
        shipped.load(out, str(base), families.Options())
    save_file(tensors, file, metadata)
    say(json.dumps({**json.loads(sound), **({"lora_dropout": 0.1, "bias": "none"} if form == "peft" else {})}))
    shipped.load(out, str(base), families.Options())


def test_every_format_that_a_family_has_is_one_that_is_known(base, ddpm):
    for folder in (base, ddpm):
        assert set(families.load(str(folder)).spec.formats) <= set(FORMATS)


def test_a_row_says_which_formats_there_are_and_what_headers_call_the_model(base, tmp_path, monkeypatch):
    """A family that nobody here knows: no export of it is called by another one's name."""
    patch, load = lora(base, tmp_path / "a.patch"), weights.load

    def of_another_family(*args):
        family = load(*args)
        more = {"name": "new", "formats": ("lora",), "architecture": lambda config: "new-model"}
        family.spec = dataclasses.replace(family.spec, **more)
        return family

    monkeypatch.setattr(weights, "load", of_another_family)
    done = run(base, patch, tmp_path / "out", format="lora")
    assert open_tensors(done.output / "pytorch_lora_weights.safetensors").metadata["modelspec.architecture"] == (
        "new-model/lora"
    )
    with pytest.raises(UsageError, match="a new has no transformer"):
        run(base, patch, tmp_path / "x.safetensors", format="transformer")


def test_ddpm(ddpm, flat_folder, tmp_path):
    patch = whole(ddpm, tmp_path / "a.patch")
    wanted = patched(ddpm, patch)
    for name, folder in (("nested", ddpm), ("old", flat_folder)):
        done = run(folder, patch, tmp_path / name)
        opened = DDPMPipeline.from_pretrained(done.output)
        assert digest(opened.unet.state_dict()) == done.manifest.digest
        assert_same(opened.unet.state_dict(), wanted)
        assert {p.name for p in done.output.iterdir() if p.is_dir()} == {"unet", "scheduler"}
    one = run(ddpm, patch, tmp_path / "one.safetensors", format="transformer")
    unet = UNet2DModel.from_config(DDPMPipeline.from_pretrained(ddpm).unet.config)
    unet.load_state_dict(load_file(one.output))
    assert digest(unet.state_dict()) == one.manifest.digest
    for form in ("lora", "peft", "single-file"):
        with pytest.raises(UsageError, match=r"a ddpm has no|whole weights"):
            run(ddpm, patch, tmp_path / "n.safetensors", format=form)


def test_a_model_from_the_hub(ddpm, tmp_path, monkeypatch):
    """As a download leaves it in the hub's cache: links to files that are named by their digests."""
    import huggingface_hub.constants

    repo, commit = tmp_path / "hub" / "models--someone--tiny", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v1").write_text(commit)
    shutil.copytree(ddpm, repo / "blobs")
    for file in [p for p in (repo / "blobs").rglob("*") if p.is_file()]:
        link = repo / "snapshots" / commit / file.relative_to(repo / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    (repo / "snapshots" / commit / "LICENSE").write_text("be kind")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in [huggingface_hub.constants, *sys.modules.values()]:
        if getattr(module, "__name__", "").startswith(("diffusers", "huggingface_hub")) and hasattr(
            module, "HF_HUB_CACHE"
        ):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    done = run("someone/tiny@v1", whole(ddpm, tmp_path / "a.patch"), tmp_path / "out")
    assert done.manifest.base == "someone/tiny@v1"
    assert not any(p.is_symlink() for p in done.output.rglob("*"))
    assert (done.output / "LICENSE").read_text() == "be kind"
    assert digest(DDPMPipeline.from_pretrained(done.output).unet.state_dict()) == done.manifest.digest
    card = (done.output / "README.md").read_text()
    assert "base_model: someone/tiny" in card


def test_pickled_weights_become_safetensors(ddpm, tmp_path):
    folder = shutil.copytree(ddpm, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(DDPMPipeline.from_pretrained(ddpm).unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    patch = whole(ddpm, tmp_path / "a.patch")
    done = run(folder, patch, tmp_path / "out", allow_pickle=True)
    assert not list(done.output.rglob("*.bin"))
    assert_same(DDPMPipeline.from_pretrained(done.output).unet.state_dict(), patched(ddpm, patch))


# Precision.


def test_precisions(ddpm, tmp_path):
    """The base's own unless asked; what is written is the sum in float32, rounded once."""
    half = tmp_path / "half"
    pipeline = DDPMPipeline.from_pretrained(ddpm)
    pipeline.unet.half().save_pretrained(half / "unet")
    pipeline.scheduler.save_pretrained(half / "scheduler")
    shutil.copy(ddpm / "model_index.json", half)
    patch = whole(half, tmp_path / "a.patch")
    wanted = patched(half, patch)
    for given, dtype in ((None, torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        done = run(half, patch, tmp_path / str(given), **({"dtype": given} if given else {}))
        found = UNet2DModel.from_pretrained(done.output / "unet", dtype=dtype).state_dict()
        assert_same(found, wanted, rtol=0, atol=0)
        assert done.manifest.dtype == str(dtype).removeprefix("torch.")
        assert (
            (done.manifest.rounding is None)
            == (given == "fp32")
            == (done.manifest.digest == done.manifest.patched_digest)
        )


def test_numbers_beyond_float16(ddpm, tmp_path):
    patch = Patch.load(whole(ddpm, tmp_path / "a.patch"))
    next(iter(patch.tensors.values())).view(-1)[0] = 7e4
    patch.save(tmp_path / "a.patch")
    with pytest.raises(CannotRun, match="float16 ends at 65504"):
        run(ddpm, tmp_path / "a.patch", tmp_path / "out", dtype="float16")


def rounded_base(ddpm, to):
    """A base whose weights bfloat16 can hold, so that a small change of them cannot."""
    pipeline = DDPMPipeline.from_pretrained(ddpm)
    pipeline.unet.bfloat16().float().save_pretrained(to / "unet")
    pipeline.scheduler.save_pretrained(to / "scheduler")
    shutil.copy(ddpm / "model_index.json", to)
    return to


def test_a_change_that_rounding_loses(ddpm, tmp_path):
    model = rounded_base(ddpm, tmp_path / "base")
    patch, notes = whole(model, tmp_path / "a.patch", std=2e-5), []
    with pytest.raises(CannotRun, match=r"bfloat16.*cosine 0\.\d+.*come out as they were") as caught:
        run(model, patch, tmp_path / "out", dtype="bfloat16")
    assert "--dtype float32 (cosine 1.0000)" in caught.value.hint
    assert "float16" not in caught.value.hint  # measured: it does not help here
    assert "lora" not in caught.value.hint
    done = run(model, patch, tmp_path / "out", dtype="bfloat16", force_rounding=True, notes=notes)
    assert done.manifest.rounding.cosine < rounding.LOST
    assert any("cosine" in n for n in notes)
    # The figures, by hand.
    before, after = network(model).state_dict(), patched(model, patch)
    meant = torch.cat([(after[n] - before[n]).flatten() for n in Patch.load(patch).tensors]).double()
    got = [(after[n].bfloat16().float() - before[n]).flatten() for n in Patch.load(patch).tensors]
    got = torch.cat(got).double()
    assert done.manifest.rounding.cosine == pytest.approx(float(meant @ got / meant.norm() / got.norm()), rel=1e-6)
    assert done.manifest.rounding.still == pytest.approx(float((got == 0)[meant != 0].double().mean()), rel=1e-6)
    assert done.manifest.rounding.error == pytest.approx(float((got - meant).norm() / meant.norm()), rel=1e-6)


def test_a_lora_is_a_way_out_of_rounding(base, tmp_path):
    model = shutil.copytree(base, tmp_path / "base")
    SD3Transformer2DModel.from_pretrained(base / "transformer").bfloat16().save_pretrained(model / "transformer")
    patch = lora(model, tmp_path / "a.patch", std=0.01)
    with pytest.raises(CannotRun) as caught:
        run(model, patch, tmp_path / "out")
    assert "--format lora" in caught.value.hint
    assert run(model, patch, tmp_path / "out", format="lora").manifest.rounding is None


# What is recorded, and what is not.


def report(path, candidate, verdict="forgotten"):
    target = Target(id="t", verdict=verdict, reason="")
    Report(
        verdict=verdict, exit_code=0, summary="gone", level="quick", targets=[target], checks=[], robustness=[],
        calibrations=[], allowed=[], findings=[], settings={}, backends=[], base_digest="", candidate_digest=candidate,
        versions={}, seconds={},
    ).save(path)  # fmt: skip
    return path


def test_a_verdict_goes_with_the_weights_that_it_is_about(ddpm, tmp_path):
    patch, notes = whole(ddpm, tmp_path / "a.patch"), []
    (tmp_path / "a.run").mkdir()
    beside = report(tmp_path / "a.run" / "verify.json", "other")
    done = run(ddpm, patch, tmp_path / "one", notes=notes)
    assert done.manifest.verified is None
    assert "not verified" in notes[-1]
    with pytest.raises(UsageError, match="the report is about other"):
        run(ddpm, patch, tmp_path / "two", report=beside)
    report(beside, done.manifest.patched_digest)
    found = run(ddpm, patch, tmp_path / "two").manifest.verified
    assert (found.verdict, found.targets) == ("forgotten", {"t": "forgotten"})
    report(beside, done.manifest.patched_digest, "failed")
    run(ddpm, patch, tmp_path / "three", report=beside, notes=notes)
    assert "said failed: gone" in notes[-1]
    with pytest.raises(UsageError, match="is not a report"):
        run(ddpm, patch, tmp_path / "four", report=patch)


@pytest.mark.slow
def test_no_path_anywhere(base, ddpm, tmp_path):
    said = {"base": str(tmp_path / "somewhere")}
    lo = lora(base, tmp_path / "a.patch", **said)
    outputs = [run(base, lo, tmp_path / f"o-{f}", format=f).output for f in ("diffusers", "lora", "peft")]
    outputs += [run(base, lo, tmp_path / f"{f}.safetensors", format=f).output for f in ("transformer", "single-file")]
    outputs.append(run(ddpm, whole(ddpm, tmp_path / "b.patch"), tmp_path / "o-ddpm").output)
    for output in outputs:
        for name, content in contents(output).items():
            for secret in (str(tmp_path), str(base.parent), "secret"):
                assert secret.encode() not in content, f"{output.name}/{name}"


@pytest.mark.parametrize("ref", ["/a/b/model", "../model", "~/model", "C:\\models\\model"])
def test_a_base_is_called_by_its_name(ref):
    assert called(ref) == "model"
    assert called("owner/name@main") == "owner/name@main"


@pytest.mark.slow
def test_equal_exports_are_equal_bytes(base, tmp_path):
    patch = lora(base, tmp_path / "a.patch")
    forms = {"d": "diffusers", "p": "peft", "l": "lora", "s.safetensors": "single-file"}
    code = (
        "import sys, json; from pathlib import Path; from unforget.api import export\n"
        "from unforget.config import ExportConfig\n"
        "for name, form in json.loads(sys.argv[4]).items():\n"
        "    export(ExportConfig(model=sys.argv[1], patch=sys.argv[2], output=Path(sys.argv[3]) / name, format=form))\n"
    )
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    args = [sys.executable, "-c", code, str(base), str(patch), str(tmp_path / "there"), json.dumps(forms)]
    with subprocess.Popen(args, env={**os.environ, "PYTHONHASHSEED": "1"}) as process:
        for name, form in forms.items():
            run(base, patch, tmp_path / "here" / name, format=form)
        assert process.wait() == 0
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


# Whatever goes wrong, what was there stays.


def test_what_was_there_stays_until_the_end(base, tmp_path, monkeypatch):
    patch = lora(base, tmp_path / "a.patch")
    out = tmp_path / "out"
    run(base, patch, out)
    before = contents(out)
    with pytest.raises(UsageError, match="exists"):
        run(base, patch, out)
    other = lora(base, tmp_path / "b.patch", 1)

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched_:
        for kind in ("diffusers", "lora"):
            patched_.setattr(FORMATS[kind], "load", stopped)
        for form in ("diffusers", "lora"):
            with pytest.raises(KeyboardInterrupt):
                run(base, other, out, force=True, format=form)
        with pytest.raises(KeyboardInterrupt):
            run(base, other, tmp_path / "new")
    assert contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.patch", "b.patch", "out"]
    assert run(base, other, out, force=True).manifest.patches[0].provenance.targets == ["t1"]
    assert contents(out) != before


def test_what_force_does_not_replace(base, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    patch = lora(base, tmp_path / "a.patch")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    for output, sentence in ((model, "would replace"), (tmp_path / "home", "no model"), (patch, "would replace")):
        with pytest.raises(UsageError, match=sentence):
            run(model, patch, output, force=True)


def test_an_export_that_reads_back_otherwise_is_not_kept(ddpm, tmp_path, monkeypatch):
    patch = whole(ddpm, tmp_path / "a.patch")
    opened = weights.folder

    def damaged(*args):
        family = opened(*args)
        with torch.no_grad():
            next(family.network.parameters())[0] += 1e-3
        return family

    monkeypatch.setattr(weights, "folder", damaged)
    with pytest.raises(CannotRun, match="does not read back"):
        run(ddpm, patch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_noticed_before(ddpm, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CannotRun, match=r"the export takes .* has 0\.0 MB left"):
        run(ddpm, whole(ddpm, tmp_path / "a.patch"), tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"format": "nonsense"}, "format"),
        ({"dtype": "int8"}, "dtype"),
        *(({"max_shard_size": size}, "max_shard_size") for size in ("much", "1", "9" * 400 + "TB")),
        ({"format": "delta"}, "there are no deltas any more"),
        ({"take_off": True}, "take_off"),
        ({"format": "transformer"}, "ends in .safetensors"),
        ({"push_to_hub": "nobody"}, "push_to_hub"),
    ],
)
def test_what_does_not_go_together(given, sentence):
    with pytest.raises(UsageError, match=sentence):
        build(ExportConfig, {"model": "x", "patch": ("p",), "output": "o", **given})


@pytest.mark.parametrize(
    ("repo", "error"),
    [("../n", UsageError), ("o--p/n", UsageError), ("o/n", CannotRun)],
    ids=["up", "dashes", "offline"],
)
def test_what_cannot_be_pushed_is_told_before_anything_is_written(ddpm, tmp_path, repo, error):
    with pytest.raises(error, match=r"no name of a repository|HF_HUB_OFFLINE is set"):
        run(ddpm, whole(ddpm, tmp_path / "a.patch"), tmp_path / "out", push_to_hub=repo)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lies", [os.mkfifo, Path.touch, lambda path: path.symlink_to("elsewhere")])
def test_whatever_lies_where_an_export_is_written(tmp_path, lies):
    (tmp_path / "elsewhere").mkdir()
    lies(tmp_path / ".out.partial")
    with placement.atomic_export(tmp_path / "out") as out:
        out.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"
    assert not os.path.lexists(tmp_path / ".out.partial") and (tmp_path / "elsewhere").is_dir()


# The command line.


def test_the_commands(base, ddpm, tmp_path, cli):
    patch = lora(base, tmp_path / "a.patch")
    done = cli("export", "--model", base, "--patch", patch, "-o", "l", "--format", "lora", "--dtype", "fp16", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["output"], said["format"], said["dtype"]) == ("l", "lora", "float16")
    for args in (["l"], ["l/pytorch_lora_weights.safetensors"]):
        assert json.loads(cli("show", *args, "--json").stdout)["digest"] == said["digest"]
    shown = cli("show", "l")
    assert "lora, float16, of base" in shown.stdout
    done = cli("export", "-m", ddpm, "--patch", whole(ddpm, tmp_path / "b.patch"), "-o", "d", "--max_shard_size", "1MB")
    assert done.exit_code == 0, done.output
    assert cli("show", "d").exit_code == 0
    with contextlib.chdir("d"):
        assert cli("show", ".").stdout == cli("show", tmp_path / "d").stdout
    assert "float32" in cli("show", "d/unet/diffusion_pytorch_model.safetensors").stdout
    foreign = json.loads(cli("show", ddpm / "unet" / "diffusion_pytorch_model.safetensors", "--json").stdout)
    assert foreign["digest"] == digest(load_file(ddpm / "unet" / "diffusion_pytorch_model.safetensors"))


def test_a_dry_run_knows_what_the_export_writes_and_leaves_nothing(ddpm, tmp_path, cli, monkeypatch):
    patch, foreign = whole(ddpm, tmp_path / "a.patch"), tmp_path / "b.patch"
    made = Patch.load(patch)
    dataclasses.replace(made, provenance=made.provenance.model_copy(update={"base_digest": "0" * 64})).save(foreign)
    before = sorted(tmp_path.iterdir())

    def export(*more, model=ddpm, patch=patch):
        return cli("export", "--model", model, "--patch", patch, "-o", "out", "--dtype", "bf16", *more)

    found = json.loads(export("--dry-run", "--json").stdout)
    assert "It would run" in export("--dry-run").stdout
    for more, sentence in (({"patch": foreign}, "the patch was made for"), ({"model": "sd3"}, "are not here")):
        said = export("--dry-run", **more)
        assert said.exit_code == 3 and sentence in said.stderr, said.output
    assert "whole weights" in export("--dry-run", "--format", "lora").stderr
    with monkeypatch.context() as full:
        full.setattr(placement.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
        assert export("--dry-run").exit_code == 3
    assert sorted(tmp_path.iterdir()) == before
    done = json.loads(export("--json").stdout)
    same = ("format", "dtype", "base_digest", "patched_digest", "rounding", "verified")
    assert [found[name] for name in same] == [done[name] for name in same]
    assert 0 < found["bytes"] < sum(map(len, contents(tmp_path / "out").values()))


@pytest.mark.parametrize("form", ["diffusers", "lora", "peft", "transformer", "single-file", "kohya"])
def test_a_flipped_bit_of_an_export_is_noticed(request, tmp_path, form):
    """Of any file but the card, which is there to be edited; and a file that is not there."""
    out = tmp_path / ("out.safetensors" if form in ("transformer", "single-file") else "out")
    base, layers = request.getfixturevalue("flux" if form == "kohya" else "base"), BLOCKS if form == "kohya" else LAYERS
    done = run(base, lora(base, tmp_path / "a.patch", layers=layers), out, format=form, force_rounding=True)
    assert not damage(out)
    assert show(out).said["digest"] == done.manifest.digest
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "README.md"] if out.is_dir() else [out]
    for file in files:
        sound = file.read_bytes()
        ends = range(8 * min(len(sound), 4096)), range(8 * max(0, len(sound) - 4096), 8 * len(sound))
        for bit in [b for end in ends for b in random.Random(0).sample(end, 40)]:
            damaged = bytearray(sound)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            with pytest.raises(UsageError) as caught:
                show(out)
            assert caught.value.hint and len(caught.value.message.splitlines()) == 1
        assert damage(out) == caught.value.message  # by a bit at the file's end
        file.write_bytes(sound)
        if out.is_dir():
            file.rename(tmp_path / "away")
            with pytest.raises(UsageError):
                show(out)
            (tmp_path / "away").rename(file)
    (out / "README.md" if out.is_dir() else tmp_path / "x").write_text("mine")
    assert show(out).kind == "export"


def test_a_candidate_is_judged_as_it_is_with_a_note_of_damage(ddpm, tmp_path, cli):
    out = run(ddpm, whole(ddpm, tmp_path / "a.patch"), tmp_path / "out").output
    file = out / "unet" / "diffusion_pytorch_model.safetensors"
    small = "--level quick --max-rate 0.2 --paired 16 --controls 8 --draws 2 --sampler-steps 2 --similarity pixels"
    asked = ["verify", "-m", ddpm, "--candidate", out, "-t", DATA / "surrogate.png", "--resize", *small.split()]
    done = cli(*asked)
    assert done.exit_code in (0, 1, 4) and "written" not in done.stderr
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    done = cli(*asked)
    assert "not as it was written" in " ".join(done.stderr.split())
    assert done.exit_code in (0, 1, 4)


def test_an_export_names_no_files_elsewhere(base, tmp_path):
    """Nor does `show` read them: a pipe or a device would never end."""
    run(base, lora(base, tmp_path / "a.patch"), tmp_path / "out")
    path = tmp_path / "out" / "unforget.json"
    said = json.loads(path.read_text())
    os.mkfifo(tmp_path / "out" / "pipe")
    for place in ("../a.patch", "/dev/zero", "pipe", "vae", "", "a\0b", "x" * 5000):
        made = {k: v for k, v in said["made"].items() if k != "checksum"}
        path.write_text(json.dumps({**said, "made": checksummed({**made, "files": {place: "0" * 64}})}))
        with pytest.raises(UsageError, match=r"is missing|cannot read"):
            show(tmp_path / "out")


@pytest.mark.parametrize("what", ["nowhere", "folder", "picture", "short", "header"])
def test_show_what_cannot_be_read(tmp_path, cli, what):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    elif what == "picture":
        shutil.copy(DATA / "surrogate.png", path)
    elif what == "short":
        path.write_bytes(b"\1\0\0")
    elif what == "header":
        save_file({"a": torch.zeros(1)}, path, {HEADER: "{}"})
    result = cli("show", path)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output + result.stderr
