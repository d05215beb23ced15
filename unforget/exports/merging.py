"""Base and patches as the tensors of an export, one at a time: the network is never in memory twice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unforget.errors import CannotRun
from unforget.exports.rounding import NAMES, Meter
from unforget.files.patch import Stack
from unforget.files.storage import Digested, Lazy


@dataclass
class MergeStats:
    """What one pass over base and patches found."""

    patched: str = ""
    """Digest of the network with the patches on, in the precision in which it is computed with."""
    written: str = ""
    """Digest of what is to be written."""
    meter: Meter = field(default_factory=Meter)


@dataclass(frozen=True)
class Merge:
    """The tensors of an export: those of the base as they lie on disk, with the patches on."""

    stack: Stack
    base: Mapping[str, Lazy]
    computed: Mapping[str, torch.dtype]
    """The precision in which each is computed with."""
    dtype: torch.dtype
    """The precision that floating-point tensors are to be written in."""
    advance: Callable[..., Any]
    """Called for every tensor that is merged, and again when it is written."""

    def tensors(self) -> dict[str, Lazy]:
        """What is to be written."""
        names = set(self.stack.names())
        return {n: Lazy(self._wanted(b), b.shape, partial(self._tensor, n, n in names)) for n, b in self.base.items()}

    def _wanted(self, base: Lazy) -> torch.dtype:
        return self.dtype if base.dtype.is_floating_point else base.dtype

    def _tensor(self, name: str, changes: bool) -> Tensor:
        self.advance(1)
        before = self.base[name].make()
        return self._written(name, self._after(name, before, before.to(self.computed[name])) if changes else before)

    def _after(self, name: str, before: Tensor, weight: Tensor) -> Tensor:
        """With the patches on: to the bit what is computed with, where that is written and lost nothing of the file;
        else the sum in float32, for it is rounded once."""
        if _holds(weight.dtype, before.dtype) and weight.dtype == self._wanted(self.base[name]):
            return self.stack.merged(name, weight)
        return self.stack.added(name, weight, before)

    def _written(self, name: str, after: Tensor) -> Tensor:
        found = after.to(self._wanted(self.base[name]))
        if found.dtype == torch.float16 and found.numel() and not all(bool(e.isfinite()) for e in found.aminmax()):
            most = max(float(e.abs()) for e in after.aminmax())
            raise CannotRun(f"'{name}' holds {most:.3g}, float16 ends at 65504", "Give --dtype bfloat16 or float32.")
        return found

    @torch.no_grad()
    def apply(self, network: nn.Module) -> MergeStats:
        """Make the base's network what a reader of the export will compute with, and learn all that is to be said.

        CannotRun if the file holds other numbers than the loader read, or one does not fit into float16.
        """
        stats, names = MergeStats(), set(self.stack.names())
        patched, written = Digested(), Digested()
        for name, there in network.state_dict().items():
            if there.is_floating_point():
                stats.meter.largest = max(stats.meter.largest, *(float(e.abs()) for e in there.aminmax()))
            self.advance(1)
            before = self.base[name].make()
            weight = before.to(there.dtype)
            if not torch.equal(weight, there.cpu()):
                raise CannotRun(f"'{name}' was read otherwise than it lies on disk", "Get the model again.")
            after = self._after(name, before, weight) if name in names else before
            found = self._written(name, after)
            patched.add(name, self.stack.merged(name, weight) if name in names else weight)
            written.add(name, found)
            if name in names and before.dtype.is_floating_point:
                total = after if after.dtype == torch.float32 else self.stack.added(name, weight, before)
                stats.meter.add(before, total, found)
            there.copy_(found)
        stats.patched, stats.written = patched.hexdigest(), written.hexdigest()
        return stats


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
