"""What a configuration is made of, without torch: it must be there before a command knows that it needs torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Scope = Literal["bottleneck", "full", "lora"]
"""Which weights are trained: `bottleneck`, those that tell one image from another; `full`, all; `lora`, a low-rank
adapter on the attention projections beside frozen weights."""


class Strategy(BaseModel):
    """A choice that is its own configuration: fields with bounds, a docstring that is its help, and `__call__`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
