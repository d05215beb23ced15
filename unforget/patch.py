"""The artefact of a run: the trained weights in one safetensors file whose header says where they came from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from unforget.data import write_bytes
from unforget.errors import CannotRun, UsageError

HEADER = "unforget"


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, in order of name: of the content, not the file."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


class Provenance(BaseModel):
    """Where a patch came from. It holds no picture, no path and no date: equal runs write equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    base: str
    """What the user called the base."""
    base_digest: str
    targets: list[str]
    """Ids of the targets: digests of their pixels."""
    surrogates: list[str]
    prompts: list[str] = []
    """Prompts under which they were forgotten, beside the empty one."""
    adapter: dict[str, int] | None = None
    """Rank and alpha of a LoRA, whose factors the tensors then are; None where they are whole weights."""
    recipe: dict[str, Any]
    seed: int
    steps: int
    """Updates that were made."""
    versions: dict[str, str]


@dataclass(frozen=True)
class Patch:
    """The trained tensors, as they are after the run (or the factors of a LoRA), and their provenance."""

    tensors: dict[str, Tensor]
    provenance: Provenance

    @classmethod
    def between(cls, base: nn.Module, patched: nn.Module, provenance: Provenance) -> Patch:
        """The tensors of `patched` that differ from `base`; the adapter, if one network serves as both."""
        if base is patched:
            from peft import get_peft_model_state_dict

            factors = get_peft_model_state_dict(patched, adapter_name="default")
            return cls({n: t.detach().cpu().contiguous() for n, t in factors.items()}, provenance)
        before, after = base.state_dict(), patched.state_dict()
        changed = {n: t.detach().cpu().contiguous() for n, t in after.items() if not torch.equal(t, before[n])}
        return cls(changed, provenance)

    def save(self, path: Path) -> None:
        """Write the file, complete or not at all; equal content is equal bytes."""
        header = {HEADER: json.dumps(self.provenance.model_dump(), sort_keys=True)}
        write_bytes(save({n: self.tensors[n] for n in sorted(self.tensors)}, header), path)

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a patch.

        Raises:
            UsageError: If the file is missing or is no patch.
        """
        if not path.is_file():
            raise UsageError(f"there is no patch '{path}'", "Make one with `unforget unlearn`.")
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = (file.metadata() or {})[HEADER]
            return cls(load_file(path), Provenance.model_validate_json(header))
        except (KeyError, ValidationError, safetensors.SafetensorError, ValueError):
            raise UsageError(f"'{path}' is not a patch", "Give the file that `unforget unlearn` wrote.") from None

    def apply(self, network: nn.Module, *, name: str = "the model") -> None:
        """Put the patch on its base, in place.

        Raises:
            CannotRun: If `network` is not the base that the patch was made for.
        """
        found = digest(network.state_dict())
        if found != self.provenance.base_digest:
            raise CannotRun(
                f"the patch was made for {self.provenance.base} ({self.provenance.base_digest[:12]}), "
                f"{name} is {found[:12]}",
                "Give the base that the patch names, or unlearn again on this one.",
            )
        network.load_state_dict({**network.state_dict(), **self.weights(network)})

    def weights(self, network: nn.Module) -> dict[str, Tensor]:
        """The patched weights by name, in the network's precision; a LoRA is merged: W + alpha / rank B A, in float32.

        Raises:
            CannotRun: If a tensor has no place in the network.
        """
        state = network.state_dict()
        found = self.tensors
        if self.provenance.adapter is not None:
            scale = self.provenance.adapter["alpha"] / self.provenance.adapter["rank"]
            modules = sorted({name.rsplit(".lora_", 1)[0] for name in self.tensors})
            missing = [m for m in modules if f"{m}.weight" not in state]
            if missing:
                raise CannotRun(f"the network has no '{missing[0]}'", "The patch is for another architecture.")
            found = {}
            for module in modules:
                down, up = (self.tensors[f"{module}.lora_{side}.weight"].float() for side in "AB")
                weight = state[f"{module}.weight"]
                found[f"{module}.weight"] = (weight.float() + scale * (up @ down).to(weight.device)).to(weight.dtype)
        return found
