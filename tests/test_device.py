"""Everything that is fast, with the network on a device that is not the CPU and refuses what CUDA refuses."""

import json

import pytest
import torch
from conftest import CAPTIONS, PLANTED
from far_device import NAME
from torch.nn.attention import SDPBackend

from unforget import families, unlearn, verify
from unforget.config import UnlearnConfig, VerifyConfig
from unforget.core import devices, sampling
from unforget.core.types import Progress
from unforget.errors import UsageError
from unforget.families import Options
from unforget.files import images
from unforget.files.patch import Patch
from unforget.surrogate.canvas import Canvas
from unforget.surrogate.editors import Inpaint, Instruct, SDEdit

RED, BLUE, _ = CAPTIONS
FAR = Options(device=NAME)
JUDGED = {"max_rate": 0.4, "paired": 16, "controls": 8, "draws": 2, "sampler_steps": 2, "similarity": ("pixels",)}


@pytest.fixture(autouse=True)
def _moved_in_place(monkeypatch):
    """A module that moves keeps its parameters, as between the CPU and CUDA."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.fixture
def pictures(tmp_path):
    g = torch.Generator().manual_seed(3)
    for name in ("target", "surrogate"):
        images.write_image(torch.rand(3, 16, 16, generator=g) * 2 - 1, tmp_path / f"{name}.png")
    return tmp_path


def test_it_refuses_what_cuda_refuses():
    far = torch.randn(3).to(NAME)
    assert (far.device.type, (far + 1).device.type, far.cpu().device.type) == (NAME, NAME, "cpu")
    with pytest.raises(RuntimeError, match="on the same device"):
        far + torch.randn(3)
    assert (far * torch.tensor(2.0)).device.type == NAME


@pytest.mark.parametrize("model", families.EMBEDDED)
def test_the_embedded_models_draw_what_they_draw_on_the_cpu(model):
    here, there = families.load(model), families.load(model, FAR)
    assert {p.device.type for p in there.network.parameters()} == {NAME}
    prompt = here.retain_prompts[:1]
    noise = sampling.random_noise(2, here.latent_shape, 0, "test")
    one, other = (sampling.draw(m, noise, steps=2, prompt_ids=m.prompt_ids(prompt)) for m in (here, there))
    assert other.device.type == "cpu"
    torch.testing.assert_close(other, one, rtol=1e-2, atol=2e-3)
    shown = there.encode(one)
    assert shown.device.type == "cpu"
    assert there.replay(1, steps=2, scheduler=None, prompt_ids=there.prompt_ids([""])).device.type == "cpu"


@pytest.fixture
def passes(monkeypatch):
    """What is in force while a network works: its device, whether autocast is on for it, and whether attention is plain."""
    seen = set()
    call = families.model.DiffusionModel.predict

    def predict(self, *given):
        device = next(self.network.parameters()).device.type
        on = {kind for kind in ("cpu", NAME) if torch.is_autocast_enabled(kind)}
        allowed = torch.nn.attention._cur_sdpa_kernel_backends()
        seen.add((device, bool(self.plain or not _trains(self.network)), *sorted(on), allowed == [SDPBackend.MATH]))
        return call(self, *given)

    monkeypatch.setattr(families.model.DiffusionModel, "predict", predict)
    return seen


def _trains(network):
    return any(p.requires_grad for p in network.parameters())


def unlearned(folder, home, **changes):
    given = {"retain_count": 8, "sampler_steps": 2, "num_validation_images": 1, "min_distance": 0.01, "device": NAME}
    how = {"max_train_steps": 3, "train_batch_size": 2, "retain_batch_size": 2, "learning_rate": 1e-2}
    return unlearn(UnlearnConfig(
        model=str(folder), target=(home / "target.png",), surrogate=(home / "surrogate.png",),
        output=home / "x.patch", **{**given, **how, **changes},
    ))  # fmt: skip


def test_unlearn_and_verify_stable_diffusion_3(sd3_folder, pictures, passes):
    made = unlearned(sd3_folder, pictures, prompt=(RED,), rank=2, mixed_precision="bf16")
    trained = {seen for seen in passes if seen[1:-1] not in ((True,), (False,))}
    assert {seen[1] for seen in trained} == {False, True}
    assert {seen[2:] for seen in trained} == {(NAME, False)}, "autocast and attention are not those of the device"
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in Patch.load(made.output).tensors.values())
    said = verify(VerifyConfig(model=str(sd3_folder), patch=made.output, device=NAME, level="quick", **JUDGED))
    assert {"sample", "reconstruct", "retention"} <= {c.probe for c in said.checks}


def test_unlearn_and_verify_a_pixel_model(tiny_folder, pictures, passes):
    made = unlearned(tiny_folder, pictures, mixed_precision="bf16", stop_margin=0.9)
    assert {seen[2:] for seen in passes if len(seen) > 3} == {(NAME, False)}
    said = verify(VerifyConfig(
        model=str(tiny_folder), patch=made.output, device=NAME, level="quick", require=("quantization",), **JUDGED
    ))  # fmt: skip
    assert {"sample", "reconstruct", "quantization"} <= {c.probe for c in said.checks}


def test_a_run_goes_on(sd3_folder, pictures, monkeypatch):
    """With weights and moments of the device read from a file."""
    from unforget.unlearning import run

    whole = unlearned(sd3_folder, pictures, rank=2).output.read_bytes()
    leave = run.Patience.leave
    monkeypatch.setattr(run.Patience, "asked", 2)
    with pytest.raises(Exception, match="stopped after step 1"):
        unlearned(sd3_folder, pictures, rank=2, force=True)
    monkeypatch.setattr(run.Patience, "asked", None)
    assert leave is run.Patience.leave
    assert unlearned(sd3_folder, pictures, rank=2, resume=True).output.read_bytes() == whole
