"""A ten-line loop is the oracle."""

import copy
import math

import pytest
import torch

from unforget.core import engine
from unforget.core.engine import Optimization
from unforget.core.surgery import Project, Sum, Weights
from unforget.core.types import Noised


def batch(seed: int, size: int = 4) -> Noised:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, size, 3, generator=g)
    return Noised(x, y, torch.zeros(size, dtype=torch.long), x, y, torch.zeros(size, dtype=torch.long))


def mean_square(network):
    return lambda b: (network(b.x_0) - b.noise).square().mean()


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def pairs(n):
    return [(batch(2 * i), batch(2 * i + 1)) for i in range(n)]


def adam(network, **options):
    return Optimization(torch.optim.Adam(network.parameters(), lr=1e-2), **options)


def run(network, n=4, surgery=None, **options):
    loss = mean_square(network)
    return list(engine.run(pairs(n), loss, loss, surgery=surgery or Sum(), optimization=adam(network, **options)))


def test_summed_gradients_are_an_ordinary_training_loop(network):
    plain = copy.deepcopy(network)
    run(network, max_grad_norm=math.inf)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for forget, retain in pairs(4):
        (mean_square(plain)(forget) + mean_square(plain)(retain)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_step_is_what_the_surgery_answers(network):
    """The surgery's weights, not just its name: a rule of odd numbers, and projection where the gradients conflict."""
    plain = copy.deepcopy(network)
    sgd = Optimization(torch.optim.SGD(network.parameters(), lr=0.1), max_grad_norm=math.inf)
    loss = mean_square(network)
    rule = lambda gram: Weights(0.5, -2.0)  # noqa: E731
    list(engine.run(pairs(1), loss, loss, surgery=rule, optimization=sgd))
    forget, retain = pairs(1)[0]
    (0.5 * mean_square(plain)(forget) - 2 * mean_square(plain)(retain)).backward()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_a_projected_step_never_raises_the_retain_loss_to_first_order(network):
    """Opposed goals: without surgery the sum would move nothing, with it the retain loss still falls."""
    x, up = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3)
    pair = [
        (
            Noised(x, 9 * up, torch.zeros(4).long(), x, x, torch.zeros(4).long()),
            Noised(x, -up, torch.zeros(4).long(), x, x, torch.zeros(4).long()),
        )
    ]
    loss, sgd = mean_square(network), torch.optim.SGD(network.parameters(), lr=1e-3)
    before = float(loss(pair[0][1]).detach())
    (step,) = engine.run(pair, loss, loss, surgery=Project(), optimization=Optimization(sgd, None, math.inf))
    assert step.gram.fr < -step.gram.rr  # the plain sum would have gone against the retain gradient
    assert float(loss(pair[0][1]).detach()) < before


def test_micro_batches_give_the_gradient_of_the_whole(network):
    other = copy.deepcopy(network)
    whole, parts = run(network, surgery=Project()), run(other, surgery=Project(), micro_batch=1)
    assert [s.forget for s in parts] == pytest.approx([s.forget for s in whole])
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_gram_matrix_is_that_of_autograd(network):
    parameters = list(network.parameters())
    forget, retain = pairs(1)[0]
    f, r = (
        torch.cat([g.flatten() for g in torch.autograd.grad(mean_square(network)(b), parameters)])
        for b in (forget, retain)
    )
    gram = run(network, 1)[0].gram
    assert gram == pytest.approx((float(f @ f), float(f @ r), float(r @ r)), rel=1e-5)


def test_clipping_bounds_the_combined_gradient(network):
    seen = []
    sgd = Optimization(torch.optim.SGD(network.parameters(), lr=1.0), max_grad_norm=0.01)
    before = [p.detach().clone() for p in network.parameters()]
    loss = mean_square(network)
    for step in engine.run(pairs(1), loss, loss, surgery=Sum(), optimization=sgd):
        seen.append(step.norm)
    moved = math.sqrt(
        sum(float((a.detach() - b).square().sum()) for a, b in zip(network.parameters(), before, strict=True))
    )
    assert seen[0] > 0.01
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_is_not_finite_is_not_applied(network):
    before = copy.deepcopy(network.state_dict())
    loss = mean_square(network)
    nan = lambda b: loss(b) * math.nan  # noqa: E731
    steps = list(engine.run(pairs(1), nan, loss, surgery=Project(), optimization=adam(network)))
    assert not steps[0].finite
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_it_is_lazy(network):
    loss = mean_square(network)
    endless = (pair for _ in iter(int, 1) for pair in pairs(1))
    loop = engine.run(endless, loss, loss, surgery=Sum(), optimization=adam(network))
    assert [next(loop).number for _ in range(3)] == [1, 2, 3]


def test_the_learning_rate_is_stepped_after_an_update_and_steps_count_on(network):
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loss, rates = mean_square(network), []
    for step in engine.run(
        pairs(3), loss, loss, surgery=Sum(), optimization=Optimization(optimizer, scheduler), done=7
    ):
        rates.append((step.number, scheduler.get_last_lr()[0]))
    assert rates == [(8, 0.5), (9, 0.25), (10, 0.125)]
