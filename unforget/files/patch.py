"""The artefact of a run: the changed weights in one safetensors file whose header says where they came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor, nn

from unforget.errors import CannotRun, UsageError
from unforget.files.storage import (
    BadFile,
    Digested,
    Opened,
    atomic_output,
    checksummed,
    digest,
    open_tensors,
    undamaged,
    write_tensors,
)

HEADER = "unforget"
"""Key of our entry in the header of a safetensors file."""
WRITTEN = "Give the file that `unforget unlearn` wrote."


class LedgerEntry(BaseModel):
    """A patch that another one begins with, and holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    targets: list[str]
    surrogates: list[str]
    prompts: list[str]


class Provenance(BaseModel):
    """Where a patch came from. It holds no picture, no path and no date: equal runs write equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2, 3] = 3
    """From 3 on the header has a checksum."""
    holds: Literal["weights", "lora"] = "weights"
    """Whole weights as they are afterwards, or the factors of a LoRA."""
    base: str
    """What the user called the base."""
    base_digest: str
    patched_digest: str = ""
    """Of the network with the patch on."""
    digest: str = ""
    """Of the tensors of this file."""
    targets: list[str]
    """Ids of the targets: salted digests of their pixels."""
    surrogates: list[str]
    prompts: list[str] = []
    """Prompts under which they were forgotten, beside the empty one."""
    earlier: list[LedgerEntry] = []
    """The ledger: patches that this one began with and holds, oldest first. Their targets are not in `targets`."""
    adapter: dict[str, int] | None = None
    """Rank and alpha of a LoRA."""
    recipe: dict[str, Any]
    seed: int
    steps: int
    """Updates that were made."""
    versions: dict[str, str]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.adapter is None) == (self.holds == "lora"):
            raise ValueError("a LoRA, and nothing else, has an adapter")
        if self.adapter is not None and (set(self.adapter) != {"rank", "alpha"} or min(self.adapter.values()) < 1):
            raise ValueError("an adapter has a rank and an alpha")
        return self

    @property
    def all_targets(self) -> list[str]:
        """Ids of all targets so far, the oldest first."""
        return list(dict.fromkeys([t for e in self.earlier for t in e.targets] + self.targets))

    @property
    def all_prompts(self) -> list[str]:
        """All prompts so far, the oldest first."""
        return list(dict.fromkeys([p for e in self.earlier for p in e.prompts] + self.prompts))


def provenance(path: Path) -> Provenance:
    """What the header of a patch says, without its tensors; UsageError if the file is missing or is no patch."""
    return _opened(path)[0]


def _opened(path: Path) -> tuple[Provenance, Opened]:
    if not path.is_file():
        raise UsageError(f"there is no patch '{path}'", "Make one with `unforget unlearn`.")
    try:
        opened = open_tensors(path)
        said = json.loads(opened.metadata[HEADER])
        new = not isinstance(said, dict) or said.get("format") == 3
        return Provenance.model_validate(undamaged(said, always=new)), opened
    except KeyError:
        raise UsageError(f"'{path}' is not a patch: its header does not say so", WRITTEN) from None
    except ValidationError as error:
        where = ".".join(str(p) for p in error.errors()[0]["loc"]) or "its header"
        raise UsageError(f"'{path}' is not a patch of this version: {where}", WRITTEN) from None
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, BadFile) else "its header is no JSON"
        raise UsageError(f"'{path}' is not a patch: {reason}", WRITTEN) from None


def _factors(name: str) -> list[str]:
    """What a LoRA calls the factors of a tensor of the network, (rank, in) and (out, rank)."""
    return [f"{name.removesuffix('.weight')}.lora_{side}.weight" for side in "AB"]


@dataclass(frozen=True)
class Patch:
    """The changed tensors of a network and their provenance."""

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

    @property
    def digest(self) -> str:
        """Of the tensors."""
        return self.provenance.digest or digest(self.tensors)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; equal content is equal bytes."""
        made = self.provenance.model_copy(update={"format": 3, "digest": digest(self.tensors)})
        with atomic_output(path) as beside:
            header = json.dumps(checksummed(made.model_dump()), sort_keys=True)
            write_tensors(self.tensors, {HEADER: header}, beside)

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a patch; UsageError if the file is missing, is no patch, or is damaged."""
        made, opened = _opened(path)
        tensors = opened.load()
        if digest(tensors) != made.digest:
            raise UsageError(f"'{path}' is damaged: its tensors are not those it was written with", "Copy it again.")
        return cls(tensors, made)

    def names(self) -> list[str]:
        """The tensors of the network that it changes."""
        if self.provenance.holds != "lora":
            return sorted(self.tensors)
        return sorted({f"{name.rsplit('.lora_', 1)[0]}.weight" for name in self.tensors})

    def changes(self, name: str) -> bool:
        """Whether it changes a tensor of the network."""
        return (_factors(name)[0] if self.provenance.holds == "lora" else name) in self.tensors

    def difference(self, name: str, weight: Tensor) -> Tensor:
        """What it adds to one of the base's tensors, in float32."""
        if adapter := self.provenance.adapter:
            down, up = (self.tensors[factor].float() for factor in _factors(name))
            return (adapter["alpha"] / adapter["rank"] * (up @ down)).to(weight.device)
        return self.after(name, weight).float() - weight.float()

    def after(self, name: str, weight: Tensor) -> Tensor:
        """One of the base's tensors with this patch on, in its own precision; a LoRA is added in float32."""
        if self.provenance.holds == "weights":
            return self.tensors[name].to(weight)
        return (weight.float() + self.difference(name, weight)).to(weight.dtype)

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a network that has no place for it, or numbers that are none: CannotRun names the first tensor."""
        rank = (self.provenance.adapter or {}).get("rank", 0)
        for name in self.names():
            fits = name in shapes
            if fits and rank:
                out, *rest = shapes[name] or [0]
                pair = [self.tensors.get(factor) for factor in _factors(name)]
                fits = [t is not None and list(t.shape) for t in pair] == [[rank, *rest], [out, rank]]
            elif fits:
                fits = list(self.tensors[name].shape) == list(shapes[name])
            if not fits:
                raise CannotRun(f"the network has no place for '{name}'", "The patch is for another architecture.")
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):  # torch has none of 8 bits
                raise CannotRun(f"the patch holds NaN or infinite numbers in '{name}'", "Unlearn again.")


@dataclass(frozen=True)
class Stack:
    """Patches of one base, in the order in which they are put on, and the share of each that is.

    Their differences to the base add up: W + sum of scale_i (P_i - W), in float32. One alone, in full, is exact.
    """

    patches: tuple[Patch, ...]
    scales: tuple[float, ...] = ()

    @classmethod
    def load(cls, paths: Sequence[Path], scales: Sequence[float] = ()) -> Stack:
        """Read patches; UsageError if one is no patch, or holds another one already."""
        found = cls(tuple(Patch.load(p) for p in paths), tuple(scales))
        held = {e.digest for p in found.patches for e in p.provenance.earlier}
        digests = [p.digest for p in found.patches]
        for path, one in zip(paths, digests, strict=True):
            if one in held or digests.count(one) > 1:
                raise UsageError(f"the patch '{path}' would be put on twice", "Leave it out: another one holds it.")
        return found

    def pairs(self) -> list[tuple[Patch, float]]:
        """Patches with their scales; 1 where none was given."""
        return list(zip(self.patches, self.scales or [1.0] * len(self.patches), strict=True))

    def names(self) -> list[str]:
        """The tensors of the network that change."""
        return sorted({n for p in self.patches for n in p.names()})

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """One of the base's tensors with all patches on, in its own precision; CannotRun if that is no number."""
        parts = [(p, scale) for p, scale in self.pairs() if p.changes(name)]
        if [scale for _, scale in parts] == [1.0]:
            return parts[0][0].after(name, weight)
        found = self.added(name, weight, weight).to(weight.dtype)
        if not bool(found.float().isfinite().all()):  # torch has no isfinite of 8 bits
            raise CannotRun(f"with the patches on, '{name}' holds NaN or infinite numbers", "Give a smaller --scale.")
        return found

    def added(self, name: str, weight: Tensor, onto: Tensor) -> Tensor:
        """What the patches add to one of the base's tensors, onto that tensor in another precision, in float32."""
        total = onto.float().clone()
        for patch, scale in self.pairs():
            if patch.changes(name):
                total += scale * patch.difference(name, weight)
        return total

    def digest(self, state: Mapping[str, Tensor]) -> str:
        """Of the base with all patches on, from its tensors without."""
        found = Digested()
        for name, tensor in state.items():
            changed = any(p.changes(name) for p in self.patches)
            found.add(name, self.merged(name, tensor) if changed else tensor)
        return found.hexdigest()

    @torch.no_grad()
    def check(self, network: nn.Module, name: str, note: Callable[[str], object] = lambda sentence: None) -> None:
        """CannotRun unless the network is the one that the patches were made for, each has a place in it, and makes
        of it what it made where it was written; for a LoRA, whose sums another machine may round otherwise, a note.
        """
        state, digested = network.state_dict(), Digested()
        for tensor_name, tensor in state.items():
            digested.add(tensor_name, tensor)
        found = digested.hexdigest()
        for patch in self.patches:
            made = patch.provenance
            if found != made.base_digest:
                raise CannotRun(
                    f"the patch was made for {made.base} ({made.base_digest[:12]}), {name} is {found[:12]}",
                    "Give the base that the patch names, or unlearn again on this one.",
                )
            patch.check({n: t.shape for n, t in state.items()})
            after = Digested(digested)
            for changed in patch.names():
                after.add(changed, patch.after(changed, state[changed]))
            if after.hexdigest() == made.patched_digest or not made.patched_digest:
                continue
            sentence = f"with the patch on, {name} is {after.hexdigest()[:12]}, and was {made.patched_digest[:12]}"
            if made.holds == "weights":
                raise CannotRun(f"{sentence} where it was made", "Get the patch again, or unlearn again.")
            note(f"{sentence} where it was made: sums of its factors are rounded otherwise here")
        for changed in self.names() if self.scales or len(self.patches) > 1 else ():
            self.merged(changed, state[changed])  # what they add up to may be no number

    def apply(
        self, network: nn.Module, *, name: str = "the model", note: Callable[[str], object] = lambda sentence: None
    ) -> None:
        """Put the patches on their base, in place, a tensor at a time; what `check` refuses stays as it is."""
        self.check(network, name, note)
        state = network.state_dict()
        for changed in self.names():
            with torch.no_grad():
                state[changed].copy_(self.merged(changed, state[changed]))

    def before(self, network: nn.Module) -> dict[str, Tensor]:
        """Copies of the tensors that change, as far as the network has them: `check` says what it lacks."""
        state = network.state_dict()
        return {n: state[n].clone() for n in self.names() if n in state}


def plain(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network under the names they have without an adapter, and as they are without it."""
    state = network.state_dict()
    return {n.replace(".base_layer.", "."): t.detach() for n, t in state.items() if ".lora_" not in n}


def joined(stack: Stack, patch: Patch, state: Mapping[str, Tensor]) -> Patch:
    """A patch that was trained upon a stack, as one of the base, with the ledger of those it began with.

    LoRAs lie side by side: rank and factors are those of all together. Anything else becomes whole weights. `state` is
    the network's tensors with the stack on.
    """
    if not stack.patches:
        return patch
    ledger = [e for p in stack.patches for e in p.provenance.earlier]
    for p in stack.patches:
        said = p.provenance.model_dump(include={"targets", "surrogates", "prompts"})
        ledger.append(LedgerEntry(digest=p.digest, **said))
    parts, changes = [*stack.pairs(), (patch, 1.0)], dict[str, Any](earlier=ledger)
    if all(p.provenance.holds == "lora" for p, _ in parts):
        tensors, rank = side_by_side(parts)
        changes |= {"holds": "lora", "adapter": {"rank": rank, "alpha": rank}}
    else:
        after = {n: patch.after(n, state[n]) if patch.changes(n) else state[n] for p, _ in parts for n in p.names()}
        tensors = {n: t.detach().cpu().contiguous() for n, t in after.items()}
        changes |= {"holds": "weights", "adapter": None}
    return Patch(tensors, patch.provenance.model_copy(update=changes))


def side_by_side(parts: Sequence[tuple[Patch, float]]) -> tuple[dict[str, Tensor], int]:
    """The factors of several LoRAs as those of one whose alpha is its rank, in float32, and that rank."""
    tensors, total = {}, sum((p.provenance.adapter or {})["rank"] for p, _ in parts)
    for name in sorted({n for p, _ in parts for n in p.tensors}):
        dim = 0 if name.endswith(".lora_A.weight") else 1
        shown = next(p.tensors[name] for p, _ in parts if name in p.tensors)
        size, pieces = list(shown.shape), []
        for patch, scale in parts:
            adapter = patch.provenance.adapter or {}
            size[dim] = adapter["rank"]
            factor = patch.tensors.get(name, torch.zeros(size)).float()
            pieces.append(factor if dim == 0 else factor * (scale * adapter["alpha"] / adapter["rank"]))
        tensors[name] = torch.cat(pieces, dim).contiguous()
    return tensors, total
