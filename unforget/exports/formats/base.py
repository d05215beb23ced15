"""What a format is: how large, how written, and how opened again by the loader that everybody has."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from unforget.core.types import Family
from unforget.errors import CannotRun
from unforget.exports.manifest import HEADER, PATH, ExportManifest
from unforget.exports.merging import Merge, MergeStats
from unforget.families import Options, weights
from unforget.families.spec import FamilySpec
from unforget.families.weights import Source
from unforget.files.patch import HEADER as PATCH
from unforget.files.patch import Stack
from unforget.files.storage import SEAL, Digested

HASH = "modelspec.hash_sha256"
"""Written by `storage.write_tensors`: of the tensors alone."""
DIFFUSERS = "https://github.com/huggingface/diffusers"
PREDICTIONS = {"v_prediction": "v"}
"""ModelSpec's words, where they are not diffusers'."""
OPEN = """\
from diffusers import {pipeline}

here = "."  # this folder, or the id of this repository
pipe = {pipeline}.from_pretrained("""


@dataclass(frozen=True)
class Job:
    """A base that was opened, and what is to be written of it."""

    ref: str
    """What the user called the base."""
    options: Options
    family: FamilySpec
    origin: Source
    config: Mapping[str, Any]
    """Of the network."""
    resolution: tuple[int, int]
    """Width and height of its images."""
    prediction: str
    """What its network predicts, as its scheduler is configured."""
    merge: Merge
    compute: torch.dtype
    """The precision in which the family computes."""
    max_shard_size: str

    @property
    def numbers(self) -> int:
        """How many the network has."""
        return sum(math.prod(lazy.shape) for lazy in self.merge.base.values())


class Format(ABC):
    """A form of export, in a precision (None: that of the base's own file).

    These defaults are of one that holds the network's weights with the patches on.
    """

    kind: ClassVar[str]
    """What `--format` calls it."""
    is_folder: ClassVar[bool] = False
    """Folders get a model card; else it is one file."""
    is_adapter: ClassVar[bool] = False
    """Whether it is nothing without the base."""
    usage: ClassVar[str] = ""
    """Python that opens a folder, for the card; its fields are `pipeline`, `network`, `base` and `options`."""

    def __init__(self, stack: Stack, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def digest(self, stats: MergeStats) -> str:
        """Of what is to be written, for the manifest."""
        return stats.written

    def size(self, job: Job) -> int:
        """Bytes that it takes on the disk, about."""
        return sum(lazy.size for lazy in job.merge.tensors().values())

    @abstractmethod
    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        """Write it; CannotRun if its tensors are not those that the manifest tells of."""

    @abstractmethod
    def load(self, job: Job, out: Path) -> Family:
        """It as the stock loader opens it."""

    def reopen(self, job: Job, manifest: ExportManifest, out: Path) -> Family:
        """Loaded and compared, ready to draw; CannotRun if what was read is not what was written."""
        found, opened, dtype = Digested(), self.load(job, out), job.merge.dtype
        for name, tensor in opened.network.state_dict().items():  # widened ones are taken for what they were
            found.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if found.hexdigest() != manifest.digest:
            raise CannotRun("the export does not read back as it was written", "Nothing was kept; check the disk.")
        weights.converted(opened, out, job.family.network, job.config, job.compute)
        opened.set_network(opened.network)
        return opened


def check_written(written: Digested, manifest: ExportManifest) -> None:
    """CannotRun unless the tensors that were written are those that were checked."""
    if written.hexdigest() != manifest.digest:
        raise CannotRun("the base changed on the disk while it was read", "Export again.")


def header(job: Job, manifest: ExportManifest) -> dict[str, str]:
    """Of a file with the network's weights: what the base's own said that is still true and no place on a disk."""
    gone = (HEADER, PATCH, HASH, SEAL, "modelspec.date")
    kept = {k: v for k, v in job.origin.metadata.items() if k not in gone and not PATH.fullmatch(v)}
    return {**kept, "format": "pt", **manifest.header()}


def model_spec(job: Job, manifest: ExportManifest, implementation: str = DIFFUSERS) -> dict[str, str]:
    """What a file says to tools that read ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec).

    `implementation` is the code that reads its layout. Equal exports have equal headers: no date, no path.
    """
    targets = len(manifest.targets)
    what = f"{targets} picture{'s' * (targets != 1)} unlearned"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": job.family.architecture(job.config),
        "modelspec.implementation": implementation,
        "modelspec.title": f"{manifest.base}, {what}",
        "modelspec.resolution": "{}x{}".format(*job.resolution),
        "modelspec.prediction_type": PREDICTIONS.get(job.prediction, job.prediction),
        "modelspec.description": f"{manifest.base} with {what} by unforget {manifest.versions['unforget']}.",
        "modelspec.tags": "unlearned",
    }
