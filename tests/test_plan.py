"""The memory plan counts what it says it counts."""

import json

import pytest
import torch
from conftest import PLANTED

from unforget import UnlearnConfig, families
from unforget.api import computing
from unforget.families import Options
from unforget.families.memory import blueprint, reckon


@pytest.mark.parametrize("folder", ["tiny_folder", "sd3_folder"])
def test_weights_gradients_and_moments_are_those_of_the_model(folder, request):
    found = blueprint(str(request.getfixturevalue(folder)), Options())
    weights = sum(p.numel() * 4 for p in found.network.parameters())
    plan = reckon(found, "full", 16, micro_batch=2, checkpointing=False, half=False)
    assert plan.weights == weights + found.beside
    assert (plan.base, plan.gradients, plan.optimizer) == (weights, 3 * weights, 2 * weights)
    used = {name: size for name, size in vars(plan).items() if name != "embedding"}
    assert plan.peak == max(sum(used.values()), plan.runtime + plan.embedding)


@pytest.mark.parametrize("folder", ["tiny_folder", "sd3_folder"])
def test_activations_are_what_autograd_keeps(folder, request):
    folder, kept = request.getfixturevalue(folder), {}
    found = blueprint(str(folder), Options())
    counted = reckon(found, "full", 16, micro_batch=3, checkpointing=False, half=False).activations
    model = families.load(folder)
    own = {p.untyped_storage().data_ptr() for p in model.network.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    model.network.requires_grad_(True)
    shapes = model.latent_shape, *model.spec.conditioning_shapes(model.network.config)
    x_t, *conditioning = (torch.randn(3, *shape) for shape in shapes)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = model.spec.call(model.network, x_t, torch.zeros(3), conditioning, found.setting)
    assert answer.requires_grad
    assert counted == pytest.approx(sum(s.nbytes() for s in kept.values()), rel=0.1)


def test_scores_of_attention_are_not_kept(sd3_folder):
    def activations(half):  # on a CPU bfloat16 is computed without the fused kernels
        return reckon(blueprint(str(sd3_folder), Options()), "lora", 2, micro_batch=4, checkpointing=False, half=half)

    assert activations(True).activations > activations(False).activations


@pytest.mark.parametrize(("large", "room", "again"), [
    (False, 0, False), (True, 0, True), (True, 2**40, False), (True, 2**20, True),
])  # fmt: skip
def test_a_large_model_computes_blocks_again_where_memory_is_short(sd3_folder, monkeypatch, large, room, again):
    monkeypatch.setattr(computing, "LARGE", 1 if large else 10**12)
    monkeypatch.setattr(computing.devices, "memory", lambda name: room)
    asked = {"model": str(sd3_folder), "target": "t.png", "output": "x.patch"}
    network = families.load(sd3_folder).network
    assert computing.compute_of(UnlearnConfig(**asked), network).gradient_checkpointing is again
    for said in (True, False):
        config = UnlearnConfig(**asked, gradient_checkpointing=said)
        assert computing.compute_of(config, network).gradient_checkpointing is said


def test_an_adapter_needs_no_second_copy_and_checkpointing_keeps_less(sd3_folder):
    def plan(**changes):
        options = {"micro_batch": 4, "checkpointing": False, "half": False, **changes}
        return reckon(blueprint(str(sd3_folder), Options()), "lora", 2, **options)

    plain = plan()
    assert plain.base == 0
    assert 0 < plain.gradients < plain.weights
    assert plan(checkpointing=True).activations < plain.activations
    assert plan(micro_batch=8).activations == pytest.approx(2 * plain.activations, rel=0.1)


def test_it_is_part_of_a_dry_run(tiny_folder, picture, cli):
    shown = cli("unlearn", "--model", tiny_folder, "--target", picture, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.output
    plan = json.loads(shown.stdout)["memory_gib"]
    assert plan["peak"] == pytest.approx(sum(v for k, v in plan.items() if k not in ("peak", "embedding")), abs=0.01)


@pytest.mark.parametrize("command", ["edit-surrogate", "unlearn", "verify"])
def test_a_dry_run_checks_what_the_run_checks_and_leaves_nothing(tiny_folder, picture, cli, monkeypatch, command):
    before = sorted(picture.parent.iterdir())
    own = ["--candidate", tiny_folder, "--level", "quick"] if command == "verify" else []
    second = "--donor" if command == "edit-surrogate" else "--surrogate"
    fails = {"unlearn": ["--use-8bit-adam"], "verify": ["--similarity", "face=no"]}
    args = [command, "--model", tiny_folder, *own, "--dry-run", "--target"]
    shown = cli(*args, picture)
    assert shown.exit_code == 0, shown.output
    assert "It would run" in shown.stdout and "in all" in shown.stdout
    for given, code, sentence in (
        ([PLANTED / "0.png"], 2, "the model's images are 16x16"),
        ([tiny_folder / "model_index.json"], 2, "not an image"),
        ([picture, second, PLANTED / "0.png"], 2, "the model's images are 16x16"),
        ([picture, "--prompt", "a face"], 2, "takes no prompts"),
        *([([picture, *fails[command]], 3, "")] if command in fails else []),
    ):  # fmt: skip
        said = cli(*args, *given)
        assert said.exit_code == code and sentence in said.stderr, said.output
        assert not said.stdout
    monkeypatch.setattr(computing.devices, "room", lambda name: (2**20, 2**20))
    said = cli(*args, picture, "--json")
    assert said.exit_code == 3 and json.loads(said.stdout)["would_run"] is False
    assert "It would not run" in cli(*args, picture).stdout
    assert sorted(picture.parent.iterdir()) == before


def test_text_encoders_are_counted_for_while_they_embed(sd3_folder):
    def plan(device, **changes):
        found = blueprint(str(sd3_folder), Options(device=device, **changes))
        return reckon(found, "lora", 2, micro_batch=1, checkpointing=True, half=False)

    pipeline = families.load(sd3_folder).pipeline
    encoders = (getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2"))
    size = sum(4 * p.numel() for encoder in encoders for p in encoder.parameters())
    here, card, parts = plan("cpu"), plan("meta"), plan("meta", cpu_offload=True)
    beside = blueprint(str(sd3_folder), Options()).beside
    assert card.embedding == parts.embedding == size + beside
    assert here.embedding > card.embedding, "where there is no card the network is beside them"
    assert parts.weights < card.weights
