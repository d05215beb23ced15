"""One file: the network under diffusers' names, or a checkpoint in the family's original layout."""

from collections.abc import Mapping
from pathlib import Path

from unforget import families
from unforget.core.types import Family
from unforget.exports.formats.base import DIFFUSERS, HASH, Format, Job, check_written, header, model_spec
from unforget.exports.manifest import ExportManifest
from unforget.families import weights
from unforget.files.storage import Digested, Lazy, write_tensors


class Transformer(Format):
    """The network, for `from_single_file` of its class and ComfyUI's diffusion model loader."""

    kind = "transformer"

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        check_written(_write(job, manifest, job.merge.tensors(), DIFFUSERS, out), manifest)

    def load(self, job: Job, out: Path) -> Family:
        rest = weights.load(job.ref, job.options)
        rest.set_network(None)
        families.trim_memory(job.numbers)
        rest.network = weights.network_file(out, job.family.name, job.config, job.merge.dtype)
        return rest


class SingleFile(Format):
    """A whole checkpoint for the pipeline's `from_single_file`, its other parts as they lie in the base."""

    kind = "single-file"

    def size(self, job: Job) -> int:
        return sum(lazy.size for lazy in self._tensors(job).values())

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        _write(job, manifest, self._tensors(job), job.family.reference, out)

    def load(self, job: Job, out: Path) -> Family:
        return weights.single_file(out, job.options, job.origin.home, job.merge.dtype, job.compute)

    def _tensors(self, job: Job) -> dict[str, Lazy]:
        return weights.checkpoint(job.origin, job.merge.tensors(), job.config)


def _write(job: Job, manifest: ExportManifest, tensors: Mapping[str, Lazy], implementation: str, out: Path) -> Digested:
    """With a header in ModelSpec's words, in which the base's own are kept."""
    own, said, written = header(job, manifest), model_spec(job, manifest, implementation), Digested()
    more = {
        "modelspec.merged_from": own.get("modelspec.merged_from", manifest.base),
        "modelspec.tags": ", ".join(filter(None, [own.get("modelspec.tags"), said["modelspec.tags"]])),
    }
    write_tensors(tensors, {**said, **own, **more}, out, digested=written, hash_key=HASH, sealed=True)
    return written
