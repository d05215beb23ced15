"""How much memory a run will take, reckoned before any weight is loaded.

The network is built on torch's meta device, where tensors have sizes and no content, and one pass with gradients is
run there: what autograd would keep is counted, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unforget import families
from unforget.core.types import Scope

RUNTIME = 0.5 * 2**30
"""Bytes of the interpreter with torch, diffusers and transformers imported, and allocators that keep what was freed."""


@dataclass(frozen=True)
class Plan:
    """Bytes of a run, by what they are for.

    Attributes:
        runtime: Interpreter and libraries (on the CPU).
        weights: The network, and the autoencoder where there is one.
        base: A frozen second copy, unless an adapter is trained.
        gradients: Of both losses and their combination.
        optimizer: Two moments of every trained weight.
        activations: What autograd keeps of the largest pass.
    """

    runtime: int
    weights: int
    base: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def peak(self) -> int:
        """All together: they meet in the backward pass."""
        return sum(vars(self).values())

    def gib(self) -> dict[str, float]:
        """Every figure in GiB, with their sum as `peak`."""
        return {name: round(value / 2**30, 3) for name, value in {**vars(self), "peak": self.peak}.items()}


@dataclass(frozen=True)
class Blueprint:
    """A network without content.

    Attributes:
        network: The module.
        trainable: The weights of a scope, at a rank.
        forward: One pass over so many images.
        blocks: What checkpointing splits it into.
        picture: (C, H, W) of a picture.
        beside: Bytes of what is loaded beside it.
    """

    network: nn.Module
    trainable: Callable[[Scope, int], list[nn.Parameter]]
    forward: Callable[[int], Tensor]
    blocks: int
    image_shape: tuple[int, int, int]
    beside: int


def blueprint(ref: str, options: families.Options) -> Blueprint:
    """The network of a model on the meta device, from its configuration alone."""
    source = families._source(ref)
    if Path(source).is_file():
        families._check_single(Path(source), options.pipeline_config)
    build = {"ddpm": _ddpm, "sd3": _sd3}[families.kind(ref)]
    found: Blueprint = families._opening(ref, source, lambda: build(source, options))
    return found


def _ddpm(source: str, options: families.Options) -> Blueprint:
    from diffusers import UNet2DModel

    from unforget.families.ddpm import trainable

    where: dict[str, Any] = families._where(source)
    if not Path(source).is_dir() or (Path(source) / "unet").is_dir():
        where["subfolder"] = "unet"
    config = UNet2DModel.load_config(**where)
    with torch.device("meta"):
        network = UNet2DModel.from_config(config)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = (config["in_channels"], height, width)

    def forward(n: int) -> Tensor:
        answer: Tensor = network(torch.empty(n, *shape, device="meta"), torch.zeros(n, device="meta")).sample
        return answer

    return Blueprint(network, lambda scope, rank: trainable(network, scope), forward, 1, shape, 0)


def _sd3(source: str, options: families.Options) -> Blueprint:
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from unforget.families.pipelines import dtype_of
    from unforget.families.sd3 import trainable

    home = str(options.pipeline_config) if Path(source).is_file() else source
    where = families._where(home)
    config = SD3Transformer2DModel.load_config(**where, subfolder="transformer")
    shape = AutoencoderKL.load_config(**where, subfolder="vae")
    dtype = dtype_of(config)
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(config).to(dtype)
        vae = AutoencoderKL.from_config(shape).to(dtype)
    factor = 2 ** (len(shape["block_out_channels"]) - 1)
    side = (options.resolution or config["sample_size"] * factor) // factor

    def forward(n: int) -> Tensor:
        empty = torch.empty(0, device="meta", dtype=dtype)
        answer: Tensor = network(
            empty.new_empty(n, config["in_channels"], side, side),
            empty.new_empty(n, 77 + 256, config["joint_attention_dim"]),
            empty.new_empty(n, config["pooled_projection_dim"]),
            torch.zeros(n, device="meta"),
        ).sample
        return answer

    beside = sum(p.numel() * p.element_size() for p in vae.parameters())
    return Blueprint(
        network, lambda scope, rank: trainable(network, scope, rank=rank, alpha=1, seed=0), forward,
        config["num_layers"], (3, side * factor, side * factor), beside,
    )  # fmt: skip


def reckon(found: Blueprint, scope: Scope, rank: int, *, micro_batch: int, checkpointing: bool, half: bool) -> Plan:
    """What a run of a scope takes.

    Args:
        found: The network.
        scope: What is trained.
        rank: Of the adapter, where it is one.
        micro_batch: Images in one pass.
        checkpointing: Whether blocks are computed again instead of kept.
        half: Whether passes are computed in 16 bits.
    """
    weights = sum(p.numel() * p.element_size() for p in found.network.parameters())
    trained = found.trainable(scope, rank)
    mine = sum(p.numel() * p.element_size() for p in trained)
    found.network.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    kept = _kept(found, micro_batch)
    if checkpointing:
        found.network.enable_gradient_checkpointing()  # type: ignore[operator]
        # The inputs of all blocks, and one block's inside while it is computed again.
        kept = _kept(found, micro_batch) + kept // found.blocks
    narrow = half and next(found.network.parameters()).dtype == torch.float32
    return Plan(
        int(RUNTIME), weights + found.beside, 0 if scope == "lora" else weights, 3 * mine, 2 * mine,
        kept // 2 if narrow else kept,
    )  # fmt: skip


def _kept(found: Blueprint, n: int) -> int:
    """Bytes that autograd keeps of one pass, weights not counted, each storage once."""
    own = {p.untyped_storage()._cdata for p in found.network.parameters()}
    seen: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in own:
            seen[t.untyped_storage()._cdata] = t.untyped_storage()  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = found.forward(n)
    del answer
    return sum(storage.nbytes() for storage in seen.values())
