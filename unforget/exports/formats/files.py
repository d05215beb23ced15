"""One file: the network under diffusers' names, or a checkpoint in the family's original layout."""

from __future__ import annotations

from pathlib import Path

from unforget.core.types import Family
from unforget.exports.formats.base import Advance, Format, Job, check_written, header, watched
from unforget.exports.manifest import ExportManifest
from unforget.exports.model_spec import DIFFUSERS, HASH
from unforget.families import weights
from unforget.files.storage import Digested, Lazy, write_tensors


class Transformer(Format):
    """The network's file, which ComfyUI's diffusion model loader reads, too."""

    kind = "transformer"
    keeps_rest = True

    def write(self, job: Job, manifest: ExportManifest, out: Path, advance: Advance) -> None:
        """Merged tensors in one file."""
        digested = _write(job, manifest, job.merge.tensors(), DIFFUSERS, out, advance)
        check_written(digested, manifest)

    def load(self, job: Job, out: Path, rest: Family | None) -> Family:
        """By `from_single_file` of the network's class, into the other parts of the base."""
        assert rest is not None
        rest.network = weights.network_file(out, job.family.name, job.config, job.merge.dtype)
        return rest


class SingleFile(Format):
    """A whole checkpoint, with autoencoder and text encoders as they lie in the base."""

    kind = "single-file"

    def _tensors(self, job: Job) -> dict[str, Lazy]:
        return weights.checkpoint(job.origin, job.merge.tensors(), job.config)

    def size(self, job: Job) -> int:
        """Of all parts."""
        return sum(lazy.size for lazy in self._tensors(job).values())

    def write(self, job: Job, manifest: ExportManifest, out: Path, advance: Advance) -> None:
        """Merged tensors under the original's names; the digest is compared when it is opened again."""
        _write(job, manifest, self._tensors(job), job.family.reference, out, advance)

    def load(self, job: Job, out: Path, rest: Family | None) -> Family:
        """By the pipeline's `from_single_file`."""
        return weights.single_file(out, job.options, job.origin.home, job.merge.dtype, job.compute)


def _write(
    job: Job, manifest: ExportManifest, tensors: dict[str, Lazy], implementation: str, out: Path, advance: Advance
) -> Digested:
    """With a header in ModelSpec's words, in which the base's own are kept."""
    own, digested = header(job, manifest), Digested()
    said = job.spec.header(manifest, implementation)
    more = {
        "modelspec.merged_from": own.get("modelspec.merged_from", manifest.base),
        "modelspec.tags": ", ".join(filter(None, [own.get("modelspec.tags"), said["modelspec.tags"]])),
    }
    write_tensors(watched(tensors, advance), {**said, **own, **more}, out, digested=digested, hash_key=HASH)
    return digested
