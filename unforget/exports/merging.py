"""Base and patches as the tensors of an export, one at a time: the network is never in memory twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unforget.errors import CannotRun
from unforget.exports.rounding import NAMES, Meter
from unforget.files.patch import Patch, bits, check_on
from unforget.files.storage import Digested, Lazy


class Change(Protocol):
    """What becomes of a network's tensors; `patch.Stack` is one."""

    def names(self) -> list[str]:
        """The tensors that change."""
        ...

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """One of them afterwards, in its own precision."""
        ...

    def added(self, name: str, weight: Tensor, onto: Tensor) -> Tensor:
        """One of them afterwards in float32, from what it is in the file (`onto`) and where it is computed with."""
        ...

    def check(self, network: nn.Module, name: str) -> None:
        """Refuse a network that it is not for.

        Raises:
            CannotRun: If it is another one.
        """
        ...


@dataclass(frozen=True)
class TakenOff:
    """A delta, taken off the model that it made: what comes out is the base, exactly."""

    patch: Patch

    def names(self) -> list[str]:
        """The tensors that it changed."""
        return self.patch.names()

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The base's."""
        return self.patch.after(name, weight)

    def added(self, name: str, weight: Tensor, onto: Tensor) -> Tensor:
        """The base's: a difference to it would round."""
        return self.patch.after(name, weight).float()

    def check(self, network: nn.Module, name: str) -> None:
        """Refuse what the delta did not make.

        Raises:
            UsageError: If the patch holds no bits.
            CannotRun: If the network is another one.
        """
        check_on(self.patch, network, name)


@dataclass
class Known:
    """What one pass over base and patches found.

    Attributes:
        patched: Digest of the network with the patches on, in the precision in which it is computed with.
        written: Digest of what is to be written.
        delta: Digest of what tells the two networks' bits apart.
        changed: Tensors of which some do.
        meter: What rounding does.
    """

    patched: str = ""
    written: str = ""
    delta: str = ""
    changed: list[str] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class Merge:
    """The tensors of an export.

    Attributes:
        change: The patches.
        base: Tensors of the network as they lie on disk.
        computed: The precision in which each is computed with.
        dtype: The precision that floating-point tensors are to be written in.
    """

    change: Change
    base: Mapping[str, Lazy]
    computed: Mapping[str, torch.dtype]
    dtype: torch.dtype

    @property
    def names(self) -> set[str]:
        """The tensors that change."""
        return set(self.change.names())

    def tensors(self) -> dict[str, Lazy]:
        """What is to be written."""
        names = self.names
        return {n: Lazy(self._wanted(b), b.shape, partial(self._tensor, n, n in names)) for n, b in self.base.items()}

    def bits(self, changed: list[str]) -> dict[str, Lazy]:
        """What tells the bits of the base from those of the network with the patches on."""
        found = {}
        for name in changed:
            shown = bits(*[torch.empty(0, dtype=self.computed[name])] * 2)
            found[name] = Lazy(shown.dtype, self.base[name].shape, partial(self._bits, name))
        return found

    def _wanted(self, base: Lazy) -> torch.dtype:
        return self.dtype if base.dtype.is_floating_point else base.dtype

    def _tensor(self, name: str, changes: bool) -> Tensor:
        before = self.base[name].make()
        weight = before.to(self.computed[name])
        return self._written(name, before, weight, self._after(name, before, weight) if changes else None)

    def _after(self, name: str, before: Tensor, weight: Tensor) -> Tensor:
        """With the patches on: to the bit what is computed with, where that is written and lost nothing of the file;
        else the sum in float32, for it is rounded once."""
        if _holds(weight.dtype, before.dtype) and weight.dtype == self._wanted(self.base[name]):
            return self.change.merged(name, weight)
        return self.change.added(name, weight, before)

    def _written(self, name: str, before: Tensor, weight: Tensor, after: Tensor | None) -> Tensor:
        found = (before if after is None else after).to(self._wanted(self.base[name]))
        if found.dtype == torch.float16 and found.numel() and not all(bool(e.isfinite()) for e in found.aminmax()):
            most = max(float(e.abs()) for e in (before if after is None else after).aminmax())
            raise CannotRun(f"'{name}' holds {most:.3g}, float16 ends at 65504", "Give --dtype bfloat16 or float32.")
        return found

    def _bits(self, name: str) -> Tensor:
        weight = self.base[name].make().to(self.computed[name])
        return bits(weight, self.change.merged(name, weight))

    @torch.no_grad()
    def put_on(self, network: nn.Module, advance: Callable[..., Any]) -> Known:
        """Make the network what a reader of the export will compute with, in place, and learn all that is to be said.

        Args:
            network: The base, which `change` was checked against.
            advance: Called after every tensor.

        Raises:
            CannotRun: If the file holds other numbers than the loader read, or one does not fit into float16.
        """
        known, names = Known(), self.names
        patched, written, delta = Digested(), Digested(), Digested()
        for name, there in network.state_dict().items():
            if there.is_floating_point():
                known.meter.largest = max(known.meter.largest, *(float(e.abs()) for e in there.aminmax()))
            if name not in names and self.base[name].dtype == there.dtype == self._wanted(self.base[name]):
                # As it is, everywhere: what is written later is digested on its way from the disk.
                patched.add(name, there)
                written.add(name, there)
                advance(1)
                continue
            before = self.base[name].make()
            weight = before.to(there.dtype)
            if not torch.equal(weight, there.cpu()):
                raise CannotRun(f"'{name}' was read otherwise than it lies on disk", "Get the model again.")
            merged = self.change.merged(name, weight) if name in names else weight
            patched.add(name, merged)
            after = self._after(name, before, weight) if name in names else None
            found = self._written(name, before, weight, after)
            written.add(name, found)
            if after is not None:
                if bool((difference := bits(weight, merged)).any()):
                    known.changed.append(name)
                    delta.add(name, difference)
                if before.dtype.is_floating_point:
                    total = after if after.dtype == torch.float32 else self.change.added(name, weight, before)
                    known.meter.add(before, total, found)
            there.copy_(found)
            advance(1)
        known.patched, known.written, known.delta = (d.hexdigest() for d in (patched, written, delta))
        return known


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of one type is one of another, too; torch promotes no float8, which all others hold."""
    return narrow.itemsize == 1 or torch.promote_types(wide, narrow) == wide


def precision(base: Mapping[str, Lazy], computed: Mapping[str, torch.dtype]) -> torch.dtype:
    """The precision of a base's own file: that of most of its numbers; the computed one where it is not for export."""
    sizes: dict[torch.dtype, int] = {}
    for name, lazy in base.items():
        if lazy.dtype.is_floating_point:
            own = lazy.dtype if lazy.dtype in NAMES else computed[name]
            sizes[own] = sizes.get(own, 0) + lazy.size // lazy.dtype.itemsize
    return max(sizes, key=lambda d: sizes[d])
