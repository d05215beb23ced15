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
    recipe: dict[str, Any]
    seed: int
    steps: int
    """Updates that were made."""
    versions: dict[str, str]


@dataclass(frozen=True)
class Patch:
    """The trained tensors, as they are after the run, and their provenance."""

    tensors: dict[str, Tensor]
    provenance: Provenance

    @classmethod
    def between(cls, base: nn.Module, patched: nn.Module, provenance: Provenance) -> Patch:
        """The tensors of `patched` that differ from `base`."""
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
        network.load_state_dict({**network.state_dict(), **self.tensors})
