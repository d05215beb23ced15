"""What writing in fewer bits does to the change that patches make."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unforget.errors import CannotRun
from unforget.exports.manifest import ExportManifest, Rounding

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TOLD = 0.999
"""Cosine between the change as written and as meant below which the user is told."""
LOST = 0.95
"""Cosine below which an export is refused.

Share of a patch's effect on the worst margin of reconstructions that rounding to bfloat16 (or to fewer bits still)
leaves, for a patch of the bottleneck and one of all weights of `faces` (`examples/benchmark/export.py --rounding`):

| cosine | 0.99 | 0.98 | 0.97 | 0.93 | 0.91 | 0.83 | 0.78 | 0.73 | 0.66 | 0.61 | 0.44 | 0.26 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
| bottleneck | 100 % | 100 % | | 99 % | 94 % | 77 to 95 % | | | 55 % | | 22 % (0.40) | |
| all weights | 98 % | | 95 % | 85 % | 88 % | | 70 % | 49 % | | 27 to 37 % | 18 % | 7 % |
"""
EXACT = 1e-6
"""Relative error up to which only the last digits of float32 differ."""
CHUNK = 2**18
"""Numbers that are compared at a time: float64 copies of a whole tensor would be seen in the peak of memory."""


@dataclass
class Sums:
    """Sums over the numbers that patches change, in float64, a tensor at a time."""

    changed: int = 0
    still: int = 0
    both: float = 0.0
    meant: float = 0.0
    written: float = 0.0
    error: float = 0.0

    def add(self, meant: Tensor, written: Tensor) -> None:
        """Take one tensor's change into account, as meant and as written, both of any shape and in float32."""
        moved = meant != 0
        self.changed += int(moved.sum())
        self.still += int((moved & (written == 0)).sum())
        m, w = meant.flatten().double(), written.flatten().double()
        self.both += float(m @ w)
        self.meant += float(m @ m)
        self.written += float(w @ w)
        self.error += float((w - m).square().sum())

    def rounding(self, dtype: str) -> Rounding:
        """The figures; a change that vanished has nothing in common with what was meant."""
        length = (self.meant * self.written) ** 0.5
        return Rounding(
            dtype=dtype, still=self.still / max(self.changed, 1),
            cosine=self.both / length if length else float(not self.meant),
            error=(self.error / self.meant) ** 0.5 if self.meant else 0.0,
        )  # fmt: skip


@dataclass
class Meter:
    """What every precision would do to the change, found in one pass."""

    sums: dict[str, Sums] = field(default_factory=lambda: {name: Sums() for name in DTYPES})
    largest: float = 0.0
    """Of the numbers of the whole network."""

    def add(self, before: Tensor, after: Tensor, written: Tensor) -> None:
        """Take a changed tensor into account: as the base's file has it, patched in float32, and as written of that."""
        parts = (torch.split(t.flatten(), CHUNK) for t in (before, after, written))
        for b, a, w in zip(*parts, strict=True):
            meant = a - b.float()
            for name, dtype in DTYPES.items():
                rounded = w if w.dtype == dtype else a.to(dtype)
                self.sums[name].add(meant, rounded.float() - b.to(dtype).float())

    def remedies(self, dtype: str) -> Mapping[str, float]:
        """The other precisions that keep the change, with the cosine that was measured."""
        fit = ("float32",) if self.largest > torch.finfo(torch.float16).max else ("float16", "float32")
        found = {n: self.sums[n].rounding(n).cosine for n in fit if n != dtype}
        return {n: cosine for n, cosine in found.items() if cosine >= TOLD}


def judge(
    meter: Meter, manifest: ExportManifest, *, lora: bool, force: bool, note: Callable[[str], Any]
) -> Rounding | None:
    """What rounding did, if it did anything; `note` is told where some of the change is lost.

    CannotRun if all of it is, unless these very bits were verified, or the user forces it. `lora` is whether it could
    be written as a LoRA instead.
    """
    found, verified = meter.sums[manifest.dtype].rounding(manifest.dtype), manifest.verified
    if found.error < EXACT:
        return None
    if found.cosine >= TOLD:
        return found
    sentence = (
        f"rounded to {manifest.dtype}, the change has cosine {found.cosine:.3f} with what was meant, "
        f"and {found.still:.0%} of its numbers come out as they were"
    )
    forgotten = verified is not None and verified.verdict in ("forgotten", "allowed")
    proven = forgotten and manifest.digest == manifest.patched_digest
    if found.cosine < LOST and not force and not proven:
        ways = [f"--dtype {name} (cosine {cosine:.4f})" for name, cosine in meter.remedies(manifest.dtype).items()]
        ways += ["--format lora, which leaves the base's weights alone"] if lora else []
        raise CannotRun(sentence, f"Give {', or '.join(ways)}." if ways else "Say --force-rounding to write it.")
    note(sentence)
    return found
