"""What is to be learnt: two losses, forget and retain, both minimised; one objective a file.

An objective regresses the network at a noised image to a goal that is affine in what the model says now. It has two
methods, `forget(patched, batch, context)` and `retain(patched, batch, context)`, which return a scalar each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from unforget.core.objectives.posterior_swap import PosteriorSwap
from unforget.core.objectives.surrogate import Surrogate
from unforget.core.objectives.weighting import CleanSpace, Linear, Uniform, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.schedule import Schedule
    from unforget.core.types import Instance, Pool, Predict

Objective = Annotated[Surrogate | PosteriorSwap, Field(discriminator="kind")]

__all__ = ["CleanSpace", "Context", "Linear", "Objective", "PosteriorSwap", "Surrogate", "Uniform", "Weighting"]


@dataclass(frozen=True)
class Context:
    """What an objective may consult besides the batch.

    `prior_counts` says how many near-copies of each target the base drew under each prompt, at least 1 where the target
    is to be forgotten, 0 where it is not, (len(instances), prompts).
    """

    schedule: Schedule
    base: Predict
    instances: tuple[Instance, ...]  # to be forgotten, as the network works on them
    retain: Pool  # what the base draws that is to be retained
    prior_counts: Tensor
    surrogates: bool = False  # whether batches hold noised surrogates, too
