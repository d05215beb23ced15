"""Samplers by the name of their diffusers class."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from unforget.errors import UsageError


def named(name: str, config: Any) -> Any:
    """A diffusers scheduler with a model's configuration.

    Raises:
        UsageError: If diffusers has no such class, or it takes no such configuration.
    """
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UsageError(f"diffusers has no scheduler '{name}'", "Give a class name, such as DDIMScheduler.")
    try:
        return kind.from_config(config)  # type: ignore[attr-defined]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"the scheduler '{name}' does not fit this model: {error}", "Give another.") from None


def step(sampler: Any, answer: Tensor, t: Tensor, x_t: Tensor, generator: torch.Generator) -> Tensor:
    """One step, with the generator where the sampler draws noise of its own."""
    draws = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    stepped: Tensor = sampler.step(answer, t, x_t, **draws).prev_sample
    return stepped
