import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from conftest import rewrite, tiny_pipeline
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from unforget import families
from unforget.core import sampling
from unforget.errors import CannotRun, UsageError
from unforget.families import loading
from unforget.families.sd3 import SPEC as SD3
from unforget.families.spec import tokenizer
from unforget.files.patch import digest


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_both_layouts_hold_the_same_model(tiny_folder, flat_folder):
    one, other = families.load(str(tiny_folder)), families.load(str(flat_folder))
    assert digest(one.network.state_dict()) == digest(other.network.state_dict())


def test_predict_is_the_network_at_the_schedule_s_timestep(tiny):
    x = torch.randn(2, *tiny.latent_shape)
    index = torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(
            tiny.predict(x, index, torch.zeros(2, dtype=torch.long)),
            tiny.pipeline.unet(x, index).sample,
            rtol=1e-4,
            atol=1e-5,
        )


def test_denoise_is_ddim_of_diffusers(tiny):
    x = sampling.random_noise(2, tiny.latent_shape, 0, "test")
    sampler = DDIMScheduler.from_config(tiny.pipeline.scheduler.config)
    sampler.set_timesteps(5)
    expected = x
    with torch.no_grad():
        for t in sampler.timesteps:
            expected = sampler.step(tiny.pipeline.unet(expected, t).sample, t, expected).prev_sample
    torch.testing.assert_close(tiny.denoise(x, steps=5), expected.clamp(-1, 1), rtol=1e-3, atol=1e-4)


def test_denoise_from_a_level_leaves_out_the_noisier_ones(tiny):
    assert tiny.sampling_timesteps(20)[:2] == [950, 900]
    seen = []
    predict = tiny.predict
    tiny.predict = lambda x, i, c: seen.append(int(i[0])) or predict(x, i, c)
    tiny.denoise(torch.zeros(1, *tiny.latent_shape), steps=20, start=250)
    assert seen == [250, 200, 150, 100, 50, 0]


def test_a_copy_shares_nothing_and_is_frozen(tiny):
    twin = tiny.copy()
    before = digest(twin.network.state_dict())
    with torch.no_grad():
        next(tiny.network.parameters()).add_(1)
    assert digest(twin.network.state_dict()) == before
    assert not any(p.requires_grad for p in twin.network.parameters())


def test_the_bottleneck_is_the_middle_and_the_first_block_up_without_norms(tiny):
    names = {id(p): n for n, p in tiny.network.named_parameters()}
    found = [names[id(p)] for p in tiny.trainable("bottleneck")]
    assert {".".join(n.split(".")[:2]) for n in found} <= {"mid_block.attentions", "mid_block.resnets", "up_blocks.0"}
    assert {n.split(".")[0] for n in found} == {"mid_block", "up_blocks"}
    assert not any("norm" in n for n in found)
    assert [names[id(p)] for p in tiny.trainable("full")] == list(names.values())


def test_another_network_is_carried(tiny):
    x, index, row = torch.randn(1, *tiny.latent_shape), torch.tensor([300]), torch.tensor([0])
    other = tiny_pipeline(seed=1).unet
    tiny.set_network(None)
    assert tiny.network is tiny.pipeline.unet is None
    tiny.set_network(other)
    with torch.no_grad():
        torch.testing.assert_close(tiny.predict(x, index, row), other(x, index).sample)


@pytest.mark.parametrize("spec", families.FAMILIES, ids=lambda spec: spec.name)
def test_a_row_is_whole(spec):
    """Names that are looked up only when they are needed exist, and what a row says goes together."""
    pipeline, network = getattr(diffusers, spec.pipeline_class), getattr(diffusers, spec.network_class)
    parts = {*inspect.signature(pipeline.__init__).parameters}
    assert {spec.network, *spec.text_encoders, *map(tokenizer, spec.text_encoders), *spec.passed} <= parts
    assert {"default", "paper"} <= set(spec.recipes)
    assert all(how.train in spec.scopes for how in spec.recipes.values())
    assert ("lora" in spec.scopes) == bool(spec.lora_targets)
    assert ("bottleneck" in spec.scopes) == (spec.bottleneck is not None)
    assert ("single-file" in spec.formats) == (spec.layout is not None)
    assert issubclass(getattr(diffusers, spec.sampler), diffusers.SchedulerMixin)
    assert issubclass(network, diffusers.ModelMixin)
    assert all(hasattr(transformers, name) for name in spec.text_encoders.values())
    refs = [ref for ref in families.EMBEDDED if families.spec_of(ref) is spec]
    assert refs or spec.aliases


@pytest.mark.parametrize("spec", families.FAMILIES, ids=lambda spec: spec.name)
def test_a_scope_that_a_family_has_not_is_refused_before_anything_is_loaded(spec):
    for scope in ("bottleneck", "full", "lora"):
        if scope in spec.scopes:
            families.check_scope(spec, scope)
        else:
            with pytest.raises(UsageError, match=f"has no --train {scope}") as caught:
                families.check_scope(spec, scope)
            assert caught.value.hint == f"Give --train {' or '.join(spec.scopes)}."


def test_no_code_outside_a_family_s_file_asks_for_its_name():
    names = {spec.name for spec in families.FAMILIES}
    for path in Path(families.__file__).parent.glob("*.py"):
        if path.stem in families.ROWS or path.name == "__init__.py":
            continue
        words = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        assert not words & names, path


def test_the_rows_are_there_without_diffusers():
    code = "import sys, unforget.families as f; f.spec_of('faces'); sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_single_file_of_no_family(tmp_path):
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    refused(UsageError, tmp_path / "x.safetensors", "is a checkpoint of no family that has such")
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    refused(UsageError, tmp_path / "x.safetensors", "cannot be opened")


def refused(error, folder, sentence, **options):
    with pytest.raises(error, match=sentence) as caught:
        families.load(str(folder), families.Options(**options))
    assert caught.value.hint


def test_no_model_index(folder):
    (folder / "model_index.json").unlink()
    refused(UsageError, folder, "has no model_index.json")


@pytest.mark.parametrize("content", ["{}", "not json", "[]"])
def test_a_model_index_without_a_class(folder, content):
    (folder / "model_index.json").write_text(content)
    refused(UsageError, folder, "does not name a pipeline class")


def test_an_unsupported_family_names_the_supported(folder):
    rewrite(folder / "model_index.json", _class_name="StableAudioPipeline")
    with pytest.raises(UsageError, match="is a StableAudioPipeline") as caught:
        families.load(str(folder))
    assert "DDPMPipeline" in caught.value.hint


def test_missing_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(CannotRun, folder, "holds no weights")


def test_a_missing_shard(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.rmtree(folder / "unet")
    tiny_pipeline().unet.save_pretrained(folder / "unet", max_shard_size="20KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    families.load(str(folder))
    shards[0].unlink()
    refused(CannotRun, folder, f"misses the shard {shards[0].name}")
    assert not weights.exists()


def test_truncated_weights(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(UsageError, folder, "is no sound one")


def test_nan_weights(folder):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        next(pipeline.unet.parameters())[0] = torch.nan
    pipeline.unet.save_pretrained(folder / "unet")
    refused(CannotRun, folder, "NaN")


def test_pickles_are_opened_on_request_only(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline = tiny_pipeline()
    torch.save(pipeline.unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    refused(UsageError, folder, "pickled weights only")
    opened = families.load(str(folder), families.Options(allow_pickle=True))
    assert digest(opened.network.state_dict()) == digest(pipeline.unet.state_dict())


def test_a_pickle_that_runs_code_is_not_unpickled_even_then(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (mark.touch, ())

    torch.save({"conv_in.weight": Evil()}, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(CannotRun, folder, "cannot open the model", allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    "ref", ["nonsense", "./nowhere", "/no/such/folder", "models/sd3.safetensors", "sd3.safetensors"]
)
def test_a_reference_to_nothing(ref):
    refused(UsageError, ref, "no model")


@pytest.mark.parametrize("how", ["device", "pipe", "dangling"])
def test_the_hub_is_not_asked_for_what_lies_here(tmp_path, monkeypatch, how):
    """Though its name could be a repository's, and it is no model."""
    monkeypatch.chdir(tmp_path)
    path = Path("owner/name")
    path.parent.mkdir()
    if how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if how == "device" else "nowhere")
    refused(UsageError, "owner/name", "no model")
    with pytest.raises(UsageError, match="there is no folder"):
        loading._check_single(Path("x.safetensors"), SD3, families.Options(pipeline_config=path))


def test_the_hub_is_asked_for_what_was_named(monkeypatch):
    """Offline, the real `from_pretrained` path ends in one clear sentence."""
    refused(CannotRun, "ddpm-celebahq", "cannot open the model 'ddpm-celebahq'")
    refused(CannotRun, "someone/something@abc", "cannot open the model")


def test_a_cached_hub_repository_opens_offline_with_its_revision(tiny_folder, tmp_path, monkeypatch):
    """The hub's own cache layout, as a download leaves it."""
    commit = "a" * 40
    repo = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_folder, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "v1").write_text(commit)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for module in list(__import__("sys").modules.values()):
        if getattr(module, "__name__", "").startswith(("diffusers", "huggingface_hub")) and hasattr(
            module, "HF_HUB_CACHE"
        ):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    family = families.load("someone/tiny@v1")
    assert family.latent_shape == (3, 16, 16)
    assert json.loads((tiny_folder / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    refused(CannotRun, "someone/tiny@v2", "cannot open the model")
