"""What an objective may consult besides the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from unforget.core.schedule import Schedule
    from unforget.core.types import Instance, Pool, Predict


@dataclass(frozen=True)
class Context:
    """The base, the targets, and the images to retain.

    Attributes:
        schedule: The noise schedule of both networks.
        base: The frozen network.
        instances: What is to be forgotten, as the network works on it.
        retain: What the base draws that is to be retained.
        prior_counts: How many near-copies of each target the base drew under each prompt, at least 1 where the
            target is to be forgotten, 0 where it is not, (len(instances), prompts).
    """

    schedule: Schedule
    base: Predict
    instances: tuple[Instance, ...]
    retain: Pool
    prior_counts: Tensor
