"""What is to be learnt: two losses, forget and retain, both minimised; one objective a file.

An objective regresses the network at a noised image to a goal that is affine in what the model says now. It has two
methods, `forget(patched, batch, context)` and `retain(patched, batch, context)`, which return a scalar each.
"""

from typing import Annotated

from pydantic import Field

from unforget.core.objectives.context import Context
from unforget.core.objectives.posterior_swap import PosteriorSwap
from unforget.core.objectives.surrogate import Surrogate
from unforget.core.objectives.weighting import CleanSpace, Linear, Uniform, Weighting

Objective = Annotated[Surrogate | PosteriorSwap, Field(discriminator="kind")]

__all__ = ["CleanSpace", "Context", "Linear", "Objective", "PosteriorSwap", "Surrogate", "Uniform", "Weighting"]
