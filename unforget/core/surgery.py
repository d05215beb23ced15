"""How two gradients become one step: every rule sees three numbers, never a network.

All rules answer with the weights of the forget gradient f and the retain gradient r, given their Gram matrix over all
trained tensors. Where a rule divides by a squared norm that is zero, that gradient has nothing to say and the term
is zero.
"""

import math
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field

from unforget.core.strategy import Strategy


class Gram(NamedTuple):
    """Inner products of the two gradients: <f, f>, <f, r>, <r, r>."""

    ff: float
    fr: float
    rr: float

    @property
    def cosine(self) -> float:
        """cos of the angle between the gradients, in [-1, 1]; 0 if either vanishes."""
        norm = math.sqrt(self.ff * self.rr)
        return self.fr / norm if norm > 0 else 0.0


class Weights(NamedTuple):
    """The step is forget * g_f + retain * g_r."""

    forget: float
    retain: float


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else 0.0


class Rule(Strategy):
    """What all rules share."""

    uses: ClassVar[tuple[str, ...]] = ("forget", "retain")  # the losses whose gradients are taken


class Sum(Rule):
    """Add both gradients."""

    kind: Literal["sum"] = "sum"

    def __call__(self, gram: Gram) -> Weights:
        return Weights(1.0, 1.0)


class Project(Rule):
    """Take out of the forget gradient what opposes the retain gradient (arXiv:2603.10445)."""

    kind: Literal["project"] = "project"

    def __call__(self, gram: Gram) -> Weights:
        return Weights(1.0, 1.0 - _ratio(min(gram.fr, 0.0), gram.rr))


class PCGrad(Rule):
    """Project each gradient off the other where they conflict (arXiv:2001.06782, algorithm 1)."""

    kind: Literal["pcgrad"] = "pcgrad"

    def __call__(self, gram: Gram) -> Weights:
        conflict = min(gram.fr, 0.0)
        return Weights(1.0 - _ratio(conflict, gram.ff), 1.0 - _ratio(conflict, gram.rr))


class EraseDiff(Rule):
    """Forget only as far as the retain gradient does not already (arXiv:2401.05779)."""

    kind: Literal["erasediff"] = "erasediff"
    eta: float = Field(1e-2, ge=0, description="least weight per unit of the forget gradient")

    def __call__(self, gram: Gram) -> Weights:
        return Weights(max(self.eta - _ratio(gram.fr, gram.ff), 0.0), 1.0)


class FixedNorm(Rule):
    """Scale the forget gradient to a share of the retain gradient's norm (SISS, arXiv:2503.01034)."""

    kind: Literal["fixed-norm"] = "fixed-norm"
    share: float = Field(0.1, gt=0, description="norm of the forget gradient as a share of the retain gradient's")

    def __call__(self, gram: Gram) -> Weights:
        return Weights(self.share * math.sqrt(_ratio(gram.rr, gram.ff)), 1.0)


class ForgetOnly(Rule):
    """Take no retain gradient: what NegGrad does, for comparison."""

    kind: Literal["forget-only"] = "forget-only"
    uses: ClassVar[tuple[str, ...]] = ("forget",)

    def __call__(self, gram: Gram) -> Weights:
        return Weights(1.0, 0.0)


class RetainOnly(Rule):
    """Take no forget gradient: what naive deletion does, for comparison."""

    kind: Literal["retain-only"] = "retain-only"
    uses: ClassVar[tuple[str, ...]] = ("retain",)

    def __call__(self, gram: Gram) -> Weights:
        return Weights(0.0, 1.0)


Surgery = Annotated[
    Sum | Project | PCGrad | EraseDiff | FixedNorm | ForgetOnly | RetainOnly, Field(discriminator="kind")
]
