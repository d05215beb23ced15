"""What a format is: how large, how written, and how opened again by the loader that everybody has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from unforget.core.types import Family
from unforget.errors import CannotRun
from unforget.exports.manifest import ExportManifest
from unforget.exports.merging import Merge, MergeStats
from unforget.exports.model_spec import ModelSpec, kept
from unforget.exports.rounding import NAMES
from unforget.families import Options, weights
from unforget.families.spec import FamilySpec
from unforget.families.weights import Source
from unforget.files.patch import Stack
from unforget.files.storage import Digested, Lazy

Advance = Callable[..., Any]


@dataclass(frozen=True)
class Job:
    """A base that was opened, and what is to be written of it.

    Attributes:
        ref: What the user called the base.
        options: How it was opened.
        family: The row of its family.
        origin: Where its weights lie.
        config: Of its network.
        spec: What it is, for headers.
        merge: The tensors to write.
        compute: The precision in which the family computes.
        max_shard_size: Largest file of a folder, such as 10GB.
    """

    ref: str
    options: Options
    family: FamilySpec
    origin: Source
    config: Mapping[str, Any]
    spec: ModelSpec
    merge: Merge
    compute: torch.dtype
    max_shard_size: str

    @property
    def numbers(self) -> int:
        """How many the network has."""
        return sum(math.prod(lazy.shape) for lazy in self.merge.base.values())


class Format(ABC):
    """A form of export. These defaults are of one that holds the network's weights with the patches on.

    Args:
        stack: The patches.
        dtype: The precision that was asked for.
    """

    kind: ClassVar[str]
    """What `--format` calls it."""
    is_folder: ClassVar[bool] = False
    """Folders get a model card; else it is one file."""
    is_adapter: ClassVar[bool] = False
    """Whether it is nothing without the base."""
    keeps_rest: ClassVar[bool] = False
    """Whether `reopen` needs the base's other parts."""
    usage: ClassVar[str] = ""
    """Python that opens a folder, for the card, to be formatted with `base`, `network` and `options`."""

    def __init__(self, stack: Stack, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def precision(self, own: torch.dtype, compute: torch.dtype) -> torch.dtype:
        """Of the merged tensors, given that of the base's file and that of the computation."""
        return self.dtype or own

    def said(self, job: Job, stats: MergeStats) -> tuple[str, str]:
        """Name of the precision and digest of what is to be written, for the manifest."""
        return NAMES[job.merge.dtype], stats.written

    def size(self, job: Job) -> int:
        """Bytes that it takes on the disk, about."""
        return sum(lazy.size for lazy in job.merge.tensors().values())

    @abstractmethod
    def write(self, job: Job, manifest: ExportManifest, out: Path, advance: Advance) -> None:
        """Write it; CannotRun if its tensors are not those that the manifest tells of."""

    @abstractmethod
    def load(self, job: Job, out: Path, rest: Family | None) -> Family:
        """It as the stock loader opens it; `rest` is the base without a network, for formats that keep it."""

    def reopen(self, job: Job, manifest: ExportManifest, out: Path, rest: Family | None) -> Family:
        """Loaded and compared, ready to draw; CannotRun if what was read is not what was written."""
        found, opened, dtype = Digested(), self.load(job, out, rest), job.merge.dtype
        for name, tensor in opened.network.state_dict().items():  # widened ones are taken for what they were
            found.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if found.hexdigest() != manifest.digest:
            raise CannotRun("the export does not read back as it was written", "Nothing was kept; check the disk.")
        weights.converted(opened, out, job.family.network, job.config, job.compute)
        opened.set_network(opened.network)
        return opened


def header(job: Job, manifest: ExportManifest) -> dict[str, str]:
    """Of a file with the network's weights: what the base's own said, and where this one came from."""
    return {**kept(job.origin.metadata), "format": "pt", **manifest.header()}


def check_written(digested: Digested, manifest: ExportManifest) -> None:
    """CannotRun unless the tensors that were written are those that were checked."""
    if digested.hexdigest() != manifest.digest:
        raise CannotRun("the base changed on the disk while it was read", "Export again.")


def watched(tensors: Mapping[str, Lazy], advance: Advance) -> dict[str, Lazy]:
    """The same tensors, telling when one is made."""

    def one(lazy: Lazy) -> Lazy:
        def make() -> Any:
            advance(1)
            return lazy.make()

        return Lazy(lazy.dtype, lazy.shape, make)

    return {name: one(lazy) for name, lazy in tensors.items()}
