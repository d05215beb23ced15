"""Rules are tested with numbers; TorchJD is the oracle of PCGrad."""

import math
import typing

import pytest
import torch
from torchjd.aggregation import PCGradWeighting

from unforget.core.surgery import EraseDiff, FixedNorm, ForgetOnly, Gram, PCGrad, Project, Sum, Surgery

RULES = [kind() for kind in typing.get_args(typing.get_args(Surgery)[0])]


def gradients(seed: int) -> tuple[torch.Tensor, torch.Tensor, Gram]:
    f, r = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return f, r, Gram(float(f @ f), float(f @ r), float(r @ r))


def step(rule, f, r, gram):
    w = rule(gram)
    return w.forget * f + w.retain * r


@pytest.mark.parametrize("seed", range(20))
def test_pcgrad_is_that_of_torchjd(seed):
    f, r, gram = gradients(seed)
    j = torch.stack([f, r])
    assert PCGrad()(gram) == pytest.approx(PCGradWeighting()(j @ j.T).tolist(), rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_project_takes_out_just_what_opposes_the_retain_gradient(seed):
    f, r, gram = gradients(seed)
    by_hand = r + (f - (f @ r) / (r @ r) * r if f @ r < 0 else f)
    torch.testing.assert_close(step(Project(), f, r, gram), by_hand)


@pytest.mark.parametrize("rule", [Project(), PCGrad()], ids=repr)
@pytest.mark.parametrize("seed", range(20))
def test_the_step_never_opposes_the_retain_gradient(rule, seed):
    f, r, gram = gradients(seed)
    assert step(rule, f, r, gram) @ r >= -1e-9


@pytest.mark.parametrize("seed", range(5))
def test_erasediff_keeps_eta_of_the_forget_direction(seed):
    f, r, gram = gradients(seed)
    assert step(EraseDiff(eta=0.3), f, r, gram) @ f >= 0.3 * gram.ff - 1e-9


def test_fixed_norm_is_a_share_of_the_retain_norm():
    f, r, gram = gradients(3)
    w = FixedNorm(share=0.1)(gram)
    assert w.forget * f.norm() == pytest.approx(0.1 * r.norm())


def test_sum_and_forget_only():
    assert Sum()(Gram(1, 2, 3)) == (1, 1)
    assert ForgetOnly()(Gram(1, 2, 3)) == (1, 0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("gram", [Gram(0, 0, 1), Gram(1, 0, 0), Gram(0, 0, 0)], ids=repr)
def test_a_vanishing_gradient_has_a_defined_outcome(rule, gram):
    assert all(math.isfinite(w) for w in rule(gram))


def test_cosine():
    assert Gram(4, -2, 1).cosine == -1
    assert Gram(0, 0, 1).cosine == 0
