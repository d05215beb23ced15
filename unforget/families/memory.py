"""How much memory a run will take, reckoned before any weight is loaded; and giving freed memory back.

The network is built on torch's meta device, where tensors have sizes and no content, and one pass with gradients is
run there: what autograd would keep is counted, not guessed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from unforget import families
from unforget.core.schedule import Schedule
from unforget.core.types import LARGE, Scope
from unforget.errors import UsageError
from unforget.families import offload
from unforget.families.spec import Setting

if TYPE_CHECKING:
    from unforget.families.loading import Options
    from unforget.families.spec import FamilySpec

RUNTIME = 0.5 * 2**30
"""Bytes of the interpreter with torch, diffusers and transformers imported, and allocators that keep what was freed."""


def trim_memory(numbers: int) -> None:
    """Give freed memory back, after what was done with a network of so many numbers, if they are many.

    glibc keeps what lies between pieces in use, which can be gigabytes: SD3's table of positions takes 1.3 GiB while it
    is computed, in float64.
    """
    if numbers > LARGE:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True)
class Plan:
    """Bytes of a run, by what they are for."""

    runtime: int
    weights: int  # the network with its adapter, and the autoencoder where there is one
    base: int  # a frozen second copy, unless an adapter is trained
    gradients: int  # of both losses and their combination
    optimizer: int  # two moments of every trained weight
    activations: int  # what autograd keeps of the largest pass
    embedding: int = 0  # while prompts are embedded, before all that is trained: text encoders, and what is beside them
    preconditioner: int = 0  # its matrices, which wait on the host: none on a card

    @property
    def peak(self) -> int:
        """All together, for they meet in the backward pass, or what embedding takes if that is more."""
        trained = self.weights + self.base + self.gradients + self.optimizer + self.activations + self.preconditioner
        return self.runtime + max(trained, self.embedding)

    def gib(self) -> dict[str, float]:
        """Every figure in GiB, with their sum as `peak`."""
        return {name: round(value / 2**30, 3) for name, value in {**vars(self), "peak": self.peak}.items()}


@dataclass(frozen=True)
class Blueprint:
    """A model without content, which says what a run costs: a `passes.Outline`.

    Its network lies on the meta device; `source` is the folder or hub id of its configuration, which lies in `folder`,
    `ref` what the user called it, `beside` the bytes of its autoencoder, `encoders` those of its text encoders.
    """

    spec: FamilySpec
    network: Any
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    beside: int
    encoders: int
    ref: str
    source: str
    folder: Path
    options: Options
    prompts: list[str] = field(default_factory=lambda: [""])

    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """The row that each prompt would have; UsageError if the model takes none."""
        for prompt in (p for p in dict.fromkeys(prompts) if p not in self.prompts):
            if not self.spec.prompted:
                raise UsageError(f"'{self.ref}' takes no prompts", "Leave --prompt out.")
            self.prompts.append(prompt)
        return torch.tensor([self.prompts.index(p) for p in prompts], dtype=torch.long)

    @property
    def device(self) -> torch.device:
        """Where the model would work."""
        return torch.device(self.options.device)

    def held(self, *, parts: bool) -> int:
        """Bytes of the network's weights that lie on the device at a time; `parts` if no graph holds them all."""
        stay, come = offload.resident(self.network)
        waits = offload.wanted(self.options.cpu_offload, self.device, self.options.networks * (stay + come))
        return stay + come // (self.spec.blocks(self.network.config) if waits and parts else 1)

    def embedding(self) -> int:
        """Bytes while prompts are embedded, or none: on a card the network leaves meanwhile."""
        kept = weights_of(self.network) if self.device.type == "cpu" else 0
        return self.encoders and self.encoders + self.beside + kept

    @property
    def batch_size(self) -> int | None:
        """Images in one pass without gradients, if the user says how many."""
        return self.options.batch_size

    @cached_property
    def _drawing(self) -> tuple[float | None, tuple[str, ...]]:
        from unforget.families.loading import hints
        from unforget.families.model import drawing

        return drawing(self.spec, self.options, hints(Path(self.source)))

    @property
    def guidance(self) -> float | None:
        """As a loaded model has it."""
        return self._drawing[0]

    @property
    def guided(self) -> bool:
        """As a loaded model has it."""
        return families.is_guided(self.spec, self.guidance)

    @property
    def setting(self) -> Setting:
        """As a loaded model has it."""
        return Setting(self.image_shape[1:], self.guidance)

    @property
    def retain_prompts(self) -> tuple[str, ...]:
        """As a loaded model has them."""
        return self._drawing[1]

    @cached_property
    def scheduler(self) -> Any:
        """The diffusers scheduler."""
        import diffusers

        from unforget.families.loading import opening

        flat = not (self.folder / "scheduler").is_dir()
        with opening(self.ref, self.source):
            config = diffusers.DDPMScheduler.load_config(self.folder, subfolder=None if flat else "scheduler")
            return getattr(diffusers, config["_class_name"]).from_config(config)

    @cached_property
    def schedule(self) -> Schedule:
        """As a loaded model has it."""
        from unforget.families.loading import asking

        with asking(self.ref):
            return Schedule.from_diffusers(self.scheduler)

    def sampling_timesteps(self, steps: int) -> list[float]:
        """As of a loaded model."""
        from unforget.families.samplers import sampler

        return [float(t) for t in sampler(self.spec, self.scheduler.config, steps, self.latent_shape).timesteps]


def blueprint(ref: str, options: Options) -> Blueprint:
    """The network of a model on the meta device, from its configuration alone, which is looked at before."""
    import diffusers

    from unforget.families.loading import opening, planned
    from unforget.families.model import pixels_wide, shapes
    from unforget.families.pipelines import dtype_of, network_class, network_config

    source, spec, folder = planned(ref, options)
    with opening(ref, source):
        config, factor, beside = network_config(spec, folder), 1, 0
        dtype = dtype_of(spec, config)
        with torch.device("meta"):
            network = network_class(spec).from_config(config).to(dtype)
            if spec.autoencoder:
                parts = diffusers.AutoencoderKL.load_config(folder, subfolder=spec.autoencoder)
                vae = getattr(diffusers, parts.get("_class_name", "AutoencoderKL")).from_config(parts)
                vae = vae.to(getattr(torch, spec.vae_dtype) if spec.vae_dtype else dtype)
                factor, beside = pixels_wide(spec, vae.config), _bytes(vae.parameters())
        made = shapes(spec, network.config, factor, ref, options.resolution)
        encoders = sum(
            _encoder(n, spec, folder, dtype) for n in spec.text_encoders if options.t5 or n not in spec.optional
        )
        return Blueprint(spec, network, *made, beside, encoders, ref, source, folder, options)


def _encoder(name: str, spec: FamilySpec, folder: Path, dtype: torch.dtype) -> int:
    """Bytes of a text encoder; none where there is no configuration of it."""
    import transformers

    if not (folder / name / "config.json").is_file():
        return 0  # transformers would take a default one
    kind = getattr(transformers, spec.text_encoders[name])
    with torch.device("meta"):
        return _bytes(kind(kind.config_class.from_pretrained(folder, subfolder=name)).to(dtype).parameters())


def weights_of(network: Any) -> int:
    """Bytes of a network's weights."""
    return _bytes(network.parameters())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def reckon(found: Blueprint, scope: Scope, rank: int, *, micro_batch: int, checkpointing: bool, half: bool) -> Plan:
    """What a run of a scope takes, with `micro_batch` images in one pass, which `half` computes in 16 bits.

    What is trained is float32, whatever the network is; CannotRun if the network's own weights would have to be. With
    `checkpointing` blocks are computed again instead of kept.
    """
    from unforget.families.scopes import trainable

    network, weights = found.network, found.held(parts=checkpointing)
    trained = trainable(found.spec, network, scope, rank=rank, alpha=1, seed=0)
    mine = _bytes(trained)
    network.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)
    # What `compute.mixed` asks of attention.
    plain = half and not checkpointing and found.device.type == "cpu"
    with contextlib.nullcontext() if plain else FusedAttention():
        kept = _kept(found, micro_batch)
        if checkpointing:
            network.enable_gradient_checkpointing()
            # The inputs of all blocks, and one block's inside while it is computed again.
            kept = _kept(found, micro_batch) + kept // found.spec.blocks(network.config)
    if half and next(network.parameters()).dtype == torch.float32:
        kept //= 2
    adapter, base = (mine, 0) if scope == "lora" else (0, weights)
    weights += adapter + found.beside
    return Plan(int(RUNTIME), weights, base, 3 * mine, 2 * mine, kept, found.embedding())


class FusedAttention(TorchFunctionMode):
    """Attention as fused kernels do it, which torch has no meta tensors for: scores are computed again, not kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            given = [*args, *((kwargs or {}).get(name) for name in ("query", "key", "value")[len(args) :])][:3]
            return _Attention.apply(*given)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, answer)
        return answer


def _kept(found: Blueprint, n: int) -> int:
    """Bytes that autograd keeps of one pass over n images, weights not counted, each storage once."""
    network = found.network
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    seen: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in own:
            seen[t.untyped_storage()._cdata] = t.untyped_storage()  # held, so that no address is used twice
        return t

    shapes = found.latent_shape, *found.spec.conditioning_shapes(network.config)
    x_t, *conditioning = (torch.empty(n, *s, device="meta", dtype=network.dtype) for s in shapes)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = found.spec.call(network, x_t, torch.zeros(n, device="meta"), conditioning, found.setting)
    del answer
    return sum(storage.nbytes() for storage in seen.values())
