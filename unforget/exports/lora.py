"""The factors of a LoRA in the two layouts that people have: diffusers' and PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unforget.errors import CannotRun, UsageError
from unforget.exports.headers import HASH, Model, of_lora
from unforget.exports.manifest import Made
from unforget.files.patch import Stack, side_by_side
from unforget.files.storage import digest, write_json, write_tensors

DIFFUSERS = "pytorch_lora_weights.safetensors"
PEFT = "adapter_model.safetensors"


@dataclass(frozen=True)
class Factors:
    """One LoRA.

    Attributes:
        tensors: By the network's names, `MODULE.lora_A.weight` (rank, in) and `MODULE.lora_B.weight` (out, rank).
        rank, alpha: The product counts alpha / rank times.
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: int

    @classmethod
    def of(cls, stack: Stack, dtype: torch.dtype | None) -> Factors:
        """Several patches, each with its scale, as one; a single one in full is as it was trained.

        Raises:
            UsageError: If one holds anything else than factors.
            CannotRun: If a factor does not fit into float16.
        """
        if any(p.provenance.adapter is None for p in stack.patches):
            raise UsageError(
                "the patch holds whole weights, not a LoRA", "Unlearn with --train lora, or export diffusers."
            )
        pairs = stack.pairs()
        (patch, scale), *more = pairs
        if not more and scale == 1:
            adapter = patch.provenance.adapter or {}
            tensors, rank, alpha = patch.tensors, adapter["rank"], adapter["alpha"]
        else:
            tensors, rank = side_by_side(pairs)
            alpha = rank
        found = {n: t.to(dtype or t.dtype) for n, t in tensors.items()}
        if not all(bool(t.isfinite().all()) for t in found.values()):
            raise CannotRun("a factor does not fit into float16, which ends at 65504", "Give --dtype bfloat16.")
        return cls(found, rank, alpha)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return next(iter(self.tensors.values())).dtype

    @property
    def digest(self) -> str:
        """Of the factors by the network's names, the same in both layouts."""
        return digest(self.tensors)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(t.numel() * t.itemsize for t in self.tensors.values())

    def config(self, base: str | None) -> dict[str, Any]:
        """PEFT's configuration. `base` is the name of the base, never a path."""
        from peft import LoraConfig

        config: dict[str, Any] = LoraConfig(r=self.rank, lora_alpha=self.alpha, inference_mode=True).to_dict()  # type: ignore[no-untyped-call]
        layers = sorted({name.rsplit(".lora_", 1)[0] for name in self.tensors})
        return {**config, "target_modules": layers, "base_model_name_or_path": base}

    def save(self, folder: Path, made: Made, model: Model) -> None:
        """What `pipeline.load_lora_weights` opens, or for the format peft what `PeftModel.from_pretrained` does."""
        folder.mkdir()
        if made.format == "lora":
            header = of_lora(made, model, self.config(None))
            write_tensors(self._named("transformer."), header, folder / DIFFUSERS, hash_key=HASH)
            return
        write_tensors(self._named("base_model.model."), of_lora(made, model, None), folder / PEFT, hash_key=HASH)
        write_json(self.config(made.base), folder / "adapter_config.json")

    def _named(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in self.tensors.items()}

    def same(self, read: Mapping[str, Tensor]) -> bool:
        """Whether a loader read these factors, in whatever precision it holds them."""
        return set(read) == set(self.tensors) and all(
            torch.equal(read[n].cpu(), t.to(read[n].dtype)) for n, t in self.tensors.items()
        )
