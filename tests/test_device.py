"""Everything that is fast, with the network on a device that is not the CPU and refuses what CUDA refuses."""

import dataclasses

import pytest
import torch
from far_device import NAME
from pipelines import CAPTIONS, tiny_sd
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from unforget import families, unlearn, verify
from unforget.config import UnlearnConfig, VerifyConfig
from unforget.core import devices, sampling
from unforget.core.types import Progress
from unforget.errors import CannotRun, UsageError
from unforget.families import Options, offload
from unforget.families import model as model_file
from unforget.families.model import DiffusionModel
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
    """Of every pass under autocast: whether it is with gradients, the devices autocast is on for, and the attention."""
    seen, call = set(), DiffusionModel.predict

    def predict(self, *given):
        if on := [kind for kind in ("cpu", NAME) if torch.is_autocast_enabled(kind)]:
            plain = _cur_sdpa_kernel_backends() == [SDPBackend.MATH]
            seen.add((torch.is_grad_enabled(), *on, "plain" if plain else "any"))
        return call(self, *given)

    monkeypatch.setattr(DiffusionModel, "predict", predict)
    return seen


AS_THE_DEVICE = {(True, NAME, "any"), (False, NAME, "any")}
"""The passes of the patched model, and those of the base."""


def unlearned(folder, home, **changes):
    given = {"retain_count": 8, "sampler_steps": 2, "num_validation_images": 1, "min_distance": 0.01, "device": NAME}
    how = {"max_train_steps": 3, "train_batch_size": 2, "retain_batch_size": 2, "learning_rate": 1e-2}
    return unlearn(UnlearnConfig(
        model=str(folder), target=(home / "target.png",), surrogate=(home / "surrogate.png",),
        output=home / "x.patch", **{**given, **how, **changes},
    ))  # fmt: skip


@pytest.mark.slow
def test_unlearn_and_verify_stable_diffusion_3(sd3_folder, pictures, passes):
    made = unlearned(sd3_folder, pictures, prompt=(RED,), rank=2, mixed_precision="bf16")
    assert passes == AS_THE_DEVICE
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in Patch.load(made.output).tensors.values())
    said = verify(VerifyConfig(model=str(sd3_folder), patch=made.output, device=NAME, level="quick", **JUDGED))
    assert {"sample", "reconstruct", "retention"} <= {c.probe for c in said.checks}


@pytest.mark.slow
def test_unlearn_and_verify_a_pixel_model(tiny_folder, pictures, passes):
    made = unlearned(tiny_folder, pictures, mixed_precision="bf16")
    assert passes == AS_THE_DEVICE
    said = verify(VerifyConfig(
        model=str(tiny_folder), patch=made.output, device=NAME, level="quick", **JUDGED
    ))  # fmt: skip
    assert {"sample", "reconstruct", "retention"} <= {c.probe for c in said.checks}


@pytest.fixture(scope="module")
def networks(tmp_path_factory, sd3_folder):
    """A transformer of blocks, and a UNet, whose blocks are computed again in smaller parts than they have."""
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    tiny_sd().save_pretrained(folder, safe_serialization=True)
    return {"transformer": sd3_folder, "unet": folder}


def trained(folder, again, **options):
    """The gradient of a LoRA, where its weights and those of the layers lie, and how many layers are there at most."""
    model = families.load(str(folder), Options(**options))
    weights = model.trainable("lora", rank=2, alpha=2)
    for weight in weights:
        weight.requires_grad_(True)
    if again:
        model.network.enable_gradient_checkpointing()
    layers = [m for m in model.network.modules() if isinstance(m, offload.LAYERS) and not m.weight.requires_grad]
    most = []

    def looked(module, given):
        most.append(sum(m.weight.device.type == NAME for m in layers))

    for m in layers:
        m.register_forward_pre_hook(looked)
    noise = sampling.random_noise(2, model.latent_shape, 0, "test")
    ids = model.prompt_ids(["", RED])
    for _ in range(2):  # the second LoRA factor begins with zeros
        answer = model.predict(noise, torch.tensor([500.0, 500.0]), ids)
        answer.square().mean().backward()
        with torch.no_grad():
            for weight in weights:
                weight -= 0.1 * weight.grad
    lora, rest = ({p.device.type for p in of} for of in (weights, (m.weight for m in layers)))
    return [w.grad for w in weights], lora, rest, max(most)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_weights_that_wait_on_the_host_train_as_those_on_the_card(networks, kind, again):
    (here, *_), (there, _, _, _), (mine, lora, layers, most) = (
        trained(networks[kind], again, **how) for how in ({}, {"device": NAME}, {"device": NAME, "cpu_offload": True})
    )
    for one, other, near in zip(mine, there, here, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        torch.testing.assert_close(one.cpu(), near, rtol=1e-2, atol=1e-5)
    assert (lora, layers, most) == ({NAME}, {"cpu"}, 1)


@pytest.mark.slow
def test_a_network_that_waits(sd3_folder, pictures):
    made = unlearned(sd3_folder, pictures, prompt=(RED,), rank=2, cpu_offload=True)
    judged = VerifyConfig(
        model=str(sd3_folder), patch=made.output, device=NAME, level="quick", cpu_offload=True, **JUDGED
    )  # fmt: skip
    assert {"sample", "reconstruct", "retention"} <= {c.probe for c in verify(judged).checks}
    with pytest.raises(CannotRun, match="cannot be trained"):
        unlearned(sd3_folder, pictures, train="full", learning_rate=1e-3, cpu_offload=True, force=True)


def test_networks_wait_where_a_card_has_no_room_for_all(monkeypatch):
    card, size = torch.device(NAME), 10 * 2**30
    assert not offload.wanted(True, torch.device("cpu"), size)
    assert offload.wanted(True, card, 1)
    assert not offload.wanted(None, card, size), "torch cannot tell how much this one has"
    monkeypatch.setattr(devices, "memory", lambda name: 12 * 2**30)
    assert offload.wanted(None, card, size)
    assert not offload.wanted(False, card, size)
    assert not offload.wanted(None, card, size - 2**30)


def test_the_network_is_not_there_while_prompts_are_embedded(sd3_folder, monkeypatch):
    model, seen = families.load(str(sd3_folder), FAR), []
    embed = model.spec.embed

    def watched(pipeline, prompt, device):
        parts = pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2
        seen.append([next(part.parameters()).device.type for part in parts])
        return embed(pipeline, prompt, device)

    monkeypatch.setattr(model, "spec", dataclasses.replace(model.spec, embed=watched))
    model.prompt_ids([RED, BLUE])
    assert seen == [["cpu", NAME, NAME]] * 2
    assert {p.device.type for p in model.network.parameters()} == {NAME}
    assert next(model.pipeline.text_encoder.parameters()).device.type == "cpu"


def test_editors(sd3_folder, editor_folder, monkeypatch):
    model, opened, editor_of = families.load(str(sd3_folder), FAR), [], families.editor
    monkeypatch.setattr(families, "editor", lambda *given: opened.append(editor_of(*given)) or opened[-1])
    target, mask = torch.rand(3, 16, 16) * 2 - 1, torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    canvas = Canvas(model, target, mask, prompt_id=int(model.prompt_ids([RED])[0]))
    for editor in (
        Inpaint(strengths=(1.0,), seeds=2, steps=3), SDEdit(strengths=(0.6,), seeds=2, steps=4),
        Instruct(model=str(editor_folder), instruction=BLUE, seeds=1, steps=2),
    ):  # fmt: skip
        found = editor(canvas)
        assert all(c.image.device.type == "cpu" and torch.equal(c.image[:, 8:], target[:, 8:]) for c in found)
    assert [pipeline.device.type for pipeline, _ in opened] == [NAME]  # on the CPU it would work, and be slow


@pytest.mark.slow
def test_repaint_with_pixels(tiny_folder):
    canvas = Canvas(families.load(str(tiny_folder), FAR), torch.zeros(3, 16, 16), torch.ones(1, 16, 16))
    assert len(Inpaint(seeds=2)(canvas)) == 2


def descended(model, steps):
    """The gradient of a whole chain on its noise, and how many numbers autograd kept meanwhile."""
    x, kept = sampling.random_noise(1, model.latent_shape, 0, "test").requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        x_0 = model.denoise(x, steps=steps, prompt_ids=model.prompt_ids([""]))
    (x_0 - 0.5).square().mean().backward()
    return x.grad, sum(kept)


@pytest.mark.parametrize("folder", ["tiny_folder", "sd3_folder"])
def test_gradients_through_a_chain_are_those_of_the_cpu_and_no_pass_is_kept(folder, request, monkeypatch):
    """As the probe `noise_search` takes them."""
    here, there = (families.load(str(request.getfixturevalue(folder)), o) for o in (Options(), FAR))
    for model in (here, there):
        model.network.requires_grad_(False)
    (mine, short), (other, _), (_, long) = descended(here, 2), descended(there, 2), descended(here, 8)
    torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-6)
    monkeypatch.setattr(model_file, "checkpoint", lambda work, *given, **options: work(*given))
    bare, whole = descended(here, 2)
    torch.testing.assert_close(mine, bare, rtol=1e-4, atol=1e-7)
    assert (long - short) / 6 < 0.1 * whole / 2


def test_auto_is_an_accelerator_if_there_is_one(monkeypatch):
    assert devices.chosen("cpu") == "cpu"
    assert devices.chosen(NAME) == devices.chosen(f"{NAME}:0")[:3] == NAME
    there = {"cpu": 1}
    monkeypatch.setattr(devices, "_count", lambda kind: there.get(kind, 0))
    assert devices.chosen("auto") == "cpu"
    there |= {"xpu": 1}
    assert devices.chosen("auto") == "xpu"
    there |= {"cuda": 2}
    assert devices.chosen("auto") == "cuda"
    assert devices.chosen("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match="torch has no device 'cuda:7' here") as caught:
        devices.chosen("cuda:7")
    assert caught.value.hint == "Give --device auto, cpu, cuda, xpu, cuda:0, cuda:1."


@pytest.mark.parametrize(
    "name", ["cuda:7", "meta", "nonsense", "cpu:3", "mps" if not torch.backends.mps.is_available() else "npu"]
)
def test_a_device_that_is_not_there_is_refused_at_once(name, tiny_folder, picture, cli):
    for more in ((), ("--dry-run",)):
        said = cli("unlearn", "--model", tiny_folder, "--target", picture, "--device", name, *more)
        assert said.exit_code == 2
        assert f"torch has no device '{name}' here" in said.stderr
        assert "Give --device auto, cpu" in said.stderr


def test_the_device_is_named_unless_it_is_the_cpu(tiny_folder):
    from unforget.api.common import options

    def notes(device):
        said = []
        options(
            UnlearnConfig(model=str(tiny_folder), target="x.png", device=device), progress=Progress(note=said.append)
        )
        return said

    assert notes("cpu") == []
    assert notes(NAME) == [f"computing on {NAME}"]
