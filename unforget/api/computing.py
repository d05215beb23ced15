"""How a run of `unlearn` computes, and the memory that this takes."""

from dataclasses import replace

from torch import nn

from unforget.api.common import options, recipe_of
from unforget.config import UnlearnConfig
from unforget.core import devices
from unforget.core.types import LARGE
from unforget.families.memory import Plan, blueprint, reckon
from unforget.unlearning import preconditioner
from unforget.unlearning.compute import Compute

SPARE = 1.1
"""Times the memory foretold that must be there before a large model keeps its activations."""


def compute_of(config: UnlearnConfig, network: nn.Module) -> Compute:
    """How a run on a network computes; the network may lie on the meta device.

    Unless the user decides, a large one computes its blocks again, but not on a card that has room for all.
    """
    again = config.gradient_checkpointing
    if again is None:
        room = devices.memory(options(config).device)
        large = sum(p.numel() for p in network.parameters()) >= LARGE
        again = large and (not room or SPARE * _reckoned(config, _compute(config, again=False)).peak > room)
    return _compute(config, again=again)


def memory_plan(config: UnlearnConfig) -> dict[str, float]:
    """GiB that a run will take, by what they are for, from the model's configuration alone."""
    network = blueprint(config.model, options(config)).network
    return _reckoned(config, compute_of(config, network)).gib()


def _compute(config: UnlearnConfig, *, again: bool) -> Compute:
    return Compute(config.micro_batch, config.mixed_precision, config.use_8bit_adam, again)


def _reckoned(config: UnlearnConfig, compute: Compute) -> Plan:
    """On a blueprint of its own, for it puts an adapter on the network."""
    recipe, found = recipe_of(config), blueprint(config.model, options(config))
    micro = min(max(recipe.forget_batch_size, recipe.retain_batch_size), compute.in_one_pass(found.image_shape))
    plan = reckon(
        found, recipe.train, recipe.rank, micro_batch=micro, checkpointing=compute.gradient_checkpointing,
        half=compute.half(found.device),
    )  # fmt: skip
    here = recipe.damping is not None and found.device.type == "cpu"
    return replace(plan, preconditioner=preconditioner.memory(found.network) if here else 0)
