"""Several processes that run one program in step, as `accelerate launch` or `torchrun` starts them.

Each holds the whole model and makes the same choices. What is heavy is shared: a batch of draws belongs to one process,
a batch of training is split by rows, and what each found is added up before anybody uses it. The first process alone
writes and speaks. Without a launcher there is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unforget.errors import UsageError

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if _started() else 0


def is_main() -> bool:
    """Whether this one writes and speaks."""
    return rank() == 0


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def start(device: str) -> str:
    """Meet the other processes, where a launcher started several, and say which device is this one's.

    Args:
        device: What the user named: cpu, or cuda for one card a process.

    Raises:
        UsageError: If the launcher is to shard the weights.
    """
    if _sharded():
        raise UsageError(
            "this tool does not train sharded weights: the surgery needs whole gradients",
            "Launch it data parallel: see examples/accelerate.",
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")
        if device == "cuda":
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def _sharded() -> bool:
    """Whether `accelerate launch` was told to use FSDP or DeepSpeed for more than data parallelism."""
    said = os.environ.get
    fsdp = said("ACCELERATE_USE_FSDP") == "true" and said("FSDP_SHARDING_STRATEGY") not in ("NO_SHARD", "3")
    zero = said("ACCELERATE_USE_DEEPSPEED") == "true" and said("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") != "0"
    return fsdp or zero


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if world_size() > 1:
        for tensor in tensors:
            part = tensor.cuda() if dist.get_backend() == "nccl" else tensor
            dist.all_reduce(part)
            if part is not tensor:
                tensor.copy_(part)


def broadcast(value: bool) -> bool:
    """What the first process says."""
    found = torch.tensor([int(value and is_main())])
    all_reduce([found])
    return bool(found) if world_size() > 1 else value


def any_process(value: bool) -> bool:
    """Whether any process says so."""
    found = torch.tensor([int(value)])
    all_reduce([found])
    return bool(found)


def barrier() -> None:
    """Wait until all are here."""
    if world_size() > 1:
        dist.barrier()


def all_gather(parts: Sequence[T], sizes: Sequence[int], make: Callable[[T], Tensor]) -> Tensor:
    """`torch.cat` of what `make` gives for every part, made by the processes in turn.

    The parts are those of a single process, so that what is found does not depend on how many there are.

    Args:
        parts: What to make it of.
        sizes: Rows that each gives.
        make: Gives rows of one shape, float32, on the CPU.
    """
    if world_size() == 1:
        return torch.cat([make(part) for part in parts])
    own = {i: make(part) for i, part in enumerate(parts) if i % world_size() == rank()}
    shape = torch.zeros(8, dtype=torch.long)
    if is_main():
        row = own[0].shape[1:]
        shape[: 1 + len(row)] = torch.tensor([len(row), *row])
    all_reduce([shape])
    whole = torch.zeros(sum(sizes), *shape[1 : 1 + int(shape[0])].tolist())
    for i, rows in enumerate(torch.split(whole, list(sizes))):
        if i in own:
            rows.copy_(own[i])
    all_reduce([whole])
    return whole
