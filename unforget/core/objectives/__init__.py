"""What is to be learnt: two losses, forget and retain, both minimised; one objective a file.

An objective regresses the network at noised images to a goal. It has two methods, `forget(patched, batch, context)` and
`retain(patched, batch, context)`, which return a scalar each; `BaseObjective` has what else may be said of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from unforget.core.objectives.base import BaseObjective, Regression
from unforget.core.objectives.concept_ablation import ConceptAblation
from unforget.core.objectives.erasediff import UniformNoise
from unforget.core.objectives.esd import ESD
from unforget.core.objectives.neggrad import NegGrad
from unforget.core.objectives.posterior_swap import PosteriorSwap
from unforget.core.objectives.random_surrogate import RandomSurrogate
from unforget.core.objectives.retrack import ReTrack
from unforget.core.objectives.siss import SISS
from unforget.core.objectives.surrogate import Surrogate
from unforget.core.objectives.weighting import CleanSpace, Linear, Uniform, Weighting

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.schedule import Schedule
    from unforget.core.types import Instance, Pool, Predict

Objective = Annotated[
    PosteriorSwap | Surrogate | RandomSurrogate | NegGrad | UniformNoise | SISS | ReTrack | ESD | ConceptAblation,
    Field(discriminator="kind"),
]

__all__ = [
    "ESD", "SISS", "BaseObjective", "CleanSpace", "ConceptAblation", "Context", "Linear", "NegGrad", "Objective",
    "PosteriorSwap", "RandomSurrogate", "ReTrack", "Regression", "Surrogate", "Uniform", "UniformNoise", "Weighting",
]  # fmt: skip


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
