"""The second moments against what they are for: how far a change of a layer moves its answers."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from unforget import UnlearnConfig
from unforget.api import computing
from unforget.core import engine, surgery
from unforget.core.types import Pool
from unforget.errors import CannotRun
from unforget.unlearning import preconditioner
from unforget.unlearning.compute import Compute
from unforget.unlearning.preconditioner import WIDEST, init_lora, preconditioners, shown

LAYERS = {
    "linear": nn.Linear(5, 4),
    "3x3": nn.Conv2d(3, 4, 3, padding=1),
    "stride": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "dilation": nn.Conv2d(3, 4, (3, 2), dilation=2, padding=(0, 3)),
    "1x1": nn.Conv2d(3, 4, 1, bias=False),
}


def seen(layer: nn.Module) -> torch.Tensor:
    return torch.randn(7, 6, 5) if isinstance(layer, nn.Linear) else torch.randn(7, 3, 8, 8)


@pytest.mark.parametrize("name", LAYERS)
def test_the_moment_says_how_far_a_change_moves_the_answers(name):
    """tr(D C D^T), summed over images and places, is the square of what D adds to the answers: by the layer itself."""
    torch.manual_seed(0)
    layer, width = LAYERS[name], LAYERS[name].weight[0].numel()
    x, moment, change = seen(layer), torch.zeros(width, width), torch.randn_like(layer.weight)
    with torch.no_grad():
        hook = layer.register_forward_pre_hook(preconditioner._adding(moment))
        before = layer(x)
        hook.remove()
        layer.weight += change
        moved = (layer(x) - before).square().sum()
        layer.weight -= change
    flat = change.flatten(1)
    torch.testing.assert_close((flat @ moment @ flat.T).trace(), moved, rtol=1e-4, atol=0)


def test_the_inverse_ends_at_the_identity():
    """In units of the mean eigenvalue; without content it is the identity up to a number, which Adam does not see."""
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    moment = root @ root.T
    scaled = moment / (moment.trace() / 6)
    found = preconditioner._inverse(moment, 0.1)
    torch.testing.assert_close(found @ (scaled + 0.1 * torch.eye(6)), 1.1 * torch.eye(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(preconditioner._inverse(1000 * moment, 0.1), found, atol=1e-4, rtol=0)
    torch.testing.assert_close(preconditioner._inverse(moment, 1e6), torch.eye(6), atol=1e-4, rtol=0)
    unseen = preconditioner._inverse(torch.zeros(6, 6), 0.1)
    torch.testing.assert_close(unseen, 11 * torch.eye(6), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("value", "damping"), [(math.nan, 0.1), (math.inf, 0.1), (1.0, 1e-12)])
def test_what_cannot_be_inverted_is_said(value, damping):
    """A model that answers no numbers; one direction alone, with next to no damping."""
    with pytest.raises(CannotRun, match="cannot be inverted"):
        preconditioner._inverse(torch.full((300, 300), value), damping)


class Odd(nn.Module):
    """A layer of each kind that is no matrix over its inputs, one too wide, one never asked, one plain."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 4)
        self.groups = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.named = nn.Conv2d(4, 4, 3, padding="same")
        self.wide = nn.Linear(WIDEST + 1, 1)
        self.idle = nn.Linear(2, 2)
        self.plain = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        self.wide(x.new_zeros(1, WIDEST + 1))
        return self.plain(self.named(self.groups(self.norm(x))))


def test_what_is_no_matrix_is_left_as_it_is(tiny):
    """Norms, biases, grouped convolutions, padding by name, wide layers; nor is one that nothing passes through."""
    network = Odd()
    weights = list(network.parameters())
    retain = Pool.of(torch.randn(3, 4, 8, 8))
    batch = shown(retain, tiny.schedule, (50, 650), seed=0)
    found = preconditioners(network, lambda x_t, *_: network(x_t), weights, batch, 0.1, micro_batch=50)
    matrices = {name for (name, _), m in zip(network.named_parameters(), found, strict=True) if m is not None}
    assert matrices == {"plain.weight", "idle.weight"}
    assert preconditioner.memory(network) == 4 * (4**2 + 2**2)
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_passes_are_split_and_repeat(tiny):
    """However many images go through at once, and whenever: a run that goes on finds the same matrices."""
    weights, retain = tiny.trainable("bottleneck"), Pool.of(torch.rand(5, *tiny.latent_shape) * 2 - 1)

    def found(seed: int, micro_batch: int):
        batch = shown(retain, tiny.schedule, (50, 650), seed=seed)
        made = preconditioners(tiny.network, tiny.predict, weights, batch, 0.1, micro_batch=micro_batch)
        return [m for m in made if m is not None]

    whole, again, split, other = found(0, 192), found(0, 192), found(0, 5), found(1, 192)
    assert whole and all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(whole, other, strict=True))


def test_a_lora_begins_where_retain_images_hardly_look():
    """Two of eight directions of inputs are large: A hardly answers them, keeps its size, and no answer moves."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="gaussian")
    network = inject_adapter_in_model(config, nn.Sequential(nn.Linear(8, 4)))
    large = torch.tensor([30.0, 30, 1, 1, 1, 1, 1, 1])
    x = torch.randn(60, 8) * large
    a, b = (getattr(network[0], f"lora_{k}")["default"].weight for k in "AB")
    plain, seen, answer = a.detach().clone(), (x[:, None] @ a.T).norm(), network(x)
    batch = engine.Noised(x, x, torch.zeros(60).long(), x, x, torch.zeros(60).long())
    found = preconditioners(network, lambda x_t, *_: network(x_t), [a, b], batch, 0.1, micro_batch=7)
    assert all(m is not None and m.device.type == "cpu" for m in found)
    init_lora(network, [a, b], found)
    direction = plain @ found[0]
    torch.testing.assert_close(a.detach(), direction * (plain.norm() / direction.norm()))
    assert (x[:, None] @ a.T).norm() < seen / 10
    assert not b.any()
    assert torch.equal(network(x), answer)


def test_the_engine_multiplies_what_the_surgery_answers():
    """From the right, after the clip, and what a mask holds still stays still."""
    layer = nn.Linear(3, 2)
    before, inverse = layer.weight.detach().clone(), torch.tensor([[2.0, 1, 0], [1, 3, 0], [0, 0, 0.5]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    x, up = torch.randn(4, 3), torch.randn(4, 2)
    batch = engine.Noised(x, up, torch.zeros(4).long(), x, x, torch.zeros(4).long())

    def loss(b: engine.Noised) -> torch.Tensor:
        return (layer(b.x_0) - b.noise).square().mean()

    gradient = torch.autograd.grad(loss(batch), layer.weight)[0] * mask
    sgd = torch.optim.SGD([layer.weight], lr=0.1)
    how = engine.Optimization(sgd, max_grad_norm=1e9, masks=[mask], preconditioners=[inverse])
    list(engine.run([(batch, batch)], loss, loss, surgery=surgery.ForgetOnly(), optimization=how))
    torch.testing.assert_close(layer.weight, before - 0.1 * (gradient @ inverse) * mask)


def test_the_memory_plan_counts_the_matrices(monkeypatch):
    """Of `faces` they are 40 MiB; they wait on the host, so on a card they are none."""

    def plan(**given):
        config = UnlearnConfig(model="faces", target=("a.png",), output="x.patch", device="cpu", **given)
        return computing._reckoned(config, Compute())

    without, given, own = plan(recipe="paper"), plan(recipe="paper", train="bottleneck", damping=0.1), plan()
    assert without.preconditioner == 0
    assert given.preconditioner == own.preconditioner == pytest.approx(40.1 * 2**20, rel=0.02)
    assert own.peak - replace(own, preconditioner=0).peak == own.preconditioner
    blueprint = computing.blueprint
    monkeypatch.setattr(computing, "blueprint", lambda name, how: blueprint(name, replace(how, device="cuda")))
    assert plan(cpu_offload=False).preconditioner == 0
