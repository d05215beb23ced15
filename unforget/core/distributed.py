"""Several processes that run one program in step, as `accelerate launch` or `torchrun` starts them.

Each holds the whole model and makes the same choices. What is heavy is shared: a batch of draws belongs to one process,
a batch of training is split by rows, and what each found is added up before anybody uses it. The first process alone
writes and speaks. Without a launcher there is one process, nothing here does anything, and accelerate is not imported.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

from unforget.core.devices import chosen
from unforget.errors import UsageError, launched

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this one writes and speaks."""
    return rank() == 0


def start(device: str) -> str:
    """Meet the other processes, where a launcher started several; returns this one's device. No sharded weights.

    UsageError if torch has no such device here.
    """
    if _sharded():
        raise UsageError(
            "this tool does not train sharded weights: the surgery needs whole gradients",
            "Launch it data parallel: see examples/accelerate.",
        )
    device = chosen(device)
    if launched()[1] > 1:
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        if device == "cpu":  # threads of a group that is left as it is may end the process with an abort
            atexit.unregister(_part)
            atexit.register(_part)
        return f"cuda:{state.local_process_index}" if device == "cuda" else device
    return device


def _part() -> None:
    """Leave the other processes."""
    if world_size() > 1:
        distributed.destroy_process_group()


def _sharded() -> bool:
    """Whether `accelerate launch` was told to use FSDP or DeepSpeed for more than data parallelism."""
    said = os.environ.get
    fsdp = said("ACCELERATE_USE_FSDP") == "true" and said("FSDP_SHARDING_STRATEGY") not in ("NO_SHARD", "3")
    zero = said("ACCELERATE_USE_DEEPSPEED") == "true" and said("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") != "0"
    return fsdp or zero


def barrier() -> None:
    """Wait until all are here."""
    if world_size() > 1:
        distributed.barrier()


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor, on the device of this process, by its sum over the processes."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


def gather(values: list[T]) -> list[T]:
    """The values of every process, in the order of the processes."""
    if world_size() == 1:
        return values
    from accelerate.utils import gather_object

    return gather_object(values)  # type: ignore[no-any-return]


def broadcast(value: T) -> T:
    """What the first process says."""
    return gather([value])[0]


def any_process(value: bool) -> bool:
    """Whether any process says so."""
    return any(gather([value]))


def all_gather(parts: Sequence[T], make: Callable[[T], Tensor]) -> Tensor:
    """`torch.cat` of what `make` gives for every part (rows of one shape, on the CPU), made by the processes in turn.

    The parts are those of a single process, so that what is found does not depend on how many there are.
    """
    own = [(i, make(part)) for i, part in enumerate(parts) if i % world_size() == rank()]
    return torch.cat([rows for _, rows in sorted(gather(own), key=lambda found: found[0])])
