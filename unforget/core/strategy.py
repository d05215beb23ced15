"""What a configuration is made of, without torch: it must be there before a command knows that it needs torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

Scope = Literal["bottleneck", "full", "lora"]
"""Which weights are trained: `bottleneck`, those that tell one image from another; `full`, all; `lora`, a low-rank
adapter on the attention projections beside frozen weights."""


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if not 0 < span[0] < span[1]:
        raise ValueError("give two timesteps, 0 < low < high")
    return span


Span = Annotated[tuple[float, float], AfterValidator(_ordered)]  # timesteps from `low` to `high`


class Strategy(BaseModel):
    """A choice that is its own configuration: fields with bounds, a docstring that is its help, and `__call__`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
