"""Each format: what it needs, what is written, and how it is opened again by the loader that everybody has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unforget import families
from unforget.core.types import Family
from unforget.errors import CannotRun
from unforget.exports import folder
from unforget.exports.headers import HASH, Model, of_network
from unforget.exports.lora import Factors
from unforget.exports.manifest import Made
from unforget.exports.merging import Known, Merge
from unforget.families import Options, weights
from unforget.families.weights import PARTS, Source
from unforget.files.patch import HEADER, LedgerEntry, Patch, Provenance, Stack, take_off
from unforget.files.storage import Digested, Lazy, digest, write_tensors


@dataclass(frozen=True)
class Job:
    """All that a format needs to know.

    Attributes:
        ref: What the user called the base.
        options: How it was opened.
        origin: Where its weights lie.
        model: What it is, for headers.
        merge: The tensors to write.
        compute: The precision in which the family computes.
        stack: The patches.
        factors: Of the formats lora and peft.
        most: Largest shard.
    """

    ref: str
    options: Options
    origin: Source
    model: Model
    merge: Merge
    compute: torch.dtype
    stack: Stack
    factors: Factors | None
    most: str

    @property
    def numbers(self) -> int:
        """How many the network has."""
        return sum(math.prod(lazy.shape) for lazy in self.merge.base.values())

    def size(self, form: str) -> int:
        """Bytes that the format takes on the disk, about."""
        if self.factors is not None:
            return self.factors.size
        tensors = self.merge.tensors()
        if form == "delta":
            return sum(tensors[n].size for n in self.stack.names())
        if form == "single-file":
            tensors = weights.checkpoint(self.origin, tensors, self.model.config)
        found = sum(lazy.size for lazy in tensors.values())
        if form == "diffusers" and self.origin.home is not None:
            files, _ = folder.copies(self.origin.home, PARTS[self.model.kind])
            found += sum(f.start.stat().st_size for f in files)
        return found

    def write(self, made: Made, known: Known, out: Path, advance: Callable[..., Any]) -> None:
        """Write the export.

        Raises:
            CannotRun: If its tensors are not those that were checked.
        """
        if self.factors is not None:
            self.factors.save(out, made, self.model)
            return
        digested = Digested()
        if made.format == "delta":
            _delta(self, made, known, out, digested, advance)
        elif made.format == "diffusers":
            _folder(self, made, out, digested, advance)
        else:
            _file(self, made, out, digested, advance)
        if made.format != "single-file" and digested.hexdigest() != made.digest:
            raise CannotRun("the base changed on the disk while it was read", "Export again.")

    def again(self, made: Made, out: Path, rest: Family | None) -> Family:
        """The export opened by the stock loader, ready to draw.

        Args:
            made: What it says of itself.
            out: Where it is.
            rest: The base without a network, for the format transformer: prompts, autoencoder and schedule.

        Raises:
            CannotRun: If what was read is not what was written.
        """
        dtype = self.merge.dtype
        if self.factors is not None or made.format == "delta":
            return _beside_base(self, made, out)
        if made.format == "diffusers":
            opened = weights.folder(out, self.options, dtype, self.compute)
        elif made.format == "single-file":
            opened = weights.single_file(out, self.options, self.origin.home, dtype, self.compute)
        else:
            network = weights.network_file(out, self.model.kind, self.model.config, dtype)
            assert rest is not None
            opened, rest.network = rest, network
        _same(made, opened.network.state_dict(), dtype)
        weights.converted(opened, out, PARTS[self.model.kind], self.model.config, self.compute)
        opened.set_network(opened.network)
        return opened


def _same(made: Made, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse weights that are not those that were written; widened ones are taken for what they were."""
    found = Digested()
    for name, tensor in state.items():
        found.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if found.hexdigest() != made.digest:
        raise CannotRun("the export does not read back as it was written", "Nothing was kept; check the disk.")


def _beside_base(job: Job, made: Made, out: Path) -> Family:
    """The base opened anew, with a LoRA beside its weights or a delta on them."""
    base = weights.load(job.ref, job.options)
    if job.factors is not None:
        read = (weights.with_lora if made.format == "lora" else weights.with_peft)(base, out)
        if not job.factors.same(read):
            raise CannotRun("the LoRA does not read back as it was written", "Nothing was kept; check the disk.")
        return base
    delta = Stack.load((out,))
    delta.apply(base.network, name=job.ref)
    take_off(delta.patches[0], base.network, name=job.ref)
    if digest(base.network.state_dict()) != made.base_digest:
        raise CannotRun("the delta does not come off again", "Nothing was kept; check the disk.")
    delta.apply(base.network, name=job.ref)
    return base


def _folder(job: Job, made: Made, out: Path, digested: Digested, advance: Callable[..., Any]) -> None:
    part = PARTS[job.model.kind]
    home, missing = job.origin.home, list[str]()
    if home is not None:
        files, missing = folder.copies(home, part)
        folder.copy(files, out)
    if home is None or missing:
        # Pickled or inside a single file: read by the loader, and written in the precision in which it lies there.
        rest = max((t.dtype for n, t in _others(job).items()), key=str, default=None)
        opened: Any = families.load(job.ref, replace(job.options, t5=True, rest_dtype=rest))
        opened.set_network(None)
        parts = missing or [n for n in opened.pipeline.components if n != part]
        weights.save_parts(opened, out, parts)
        (out / part).mkdir(exist_ok=True)
        folder.write_config(out / part, job.model.config)
        folder.tidy(out)
    header = of_network(made, job.model, job.origin.metadata, spec=False)
    tensors = folder.watched(job.merge.tensors(), advance)
    folder.write_network(out / part, tensors, header, job.most, digested)
    folder.write_hints(home, out, made)


def _others(job: Job) -> dict[str, Lazy]:
    """The floating-point tensors of a single file that are not the network's; none of anything else."""
    from unforget.families.layouts import sd3 as sd3_layout
    from unforget.files.storage import open_tensors

    if job.origin.file is None:
        return {}
    heads = (sd3_layout.VAE, *sd3_layout.TEXT_ENCODERS.values())
    return {
        n: t
        for n, t in open_tensors(job.origin.file).tensors.items()
        if n.startswith(heads) and t.dtype in (torch.float32, torch.float16, torch.bfloat16)
    }


def _file(job: Job, made: Made, out: Path, digested: Digested, advance: Callable[..., Any]) -> None:
    tensors = job.merge.tensors()
    header = of_network(made, job.model, job.origin.metadata, spec=True)
    if made.format == "single-file":
        tensors = weights.checkpoint(job.origin, tensors, job.model.config)
    write_tensors(folder.watched(tensors, advance), header, out, digested=digested, hash_key=HASH)


def _delta(job: Job, made: Made, known: Known, out: Path, digested: Digested, advance: Callable[..., Any]) -> None:
    """A patch of bits, which says of itself what a patch does, and what an export does."""
    said = provenance(job.stack, made)
    header = {HEADER: json.dumps(said.model_dump(), sort_keys=True), **made.header()}
    tensors = folder.watched(job.merge.bits(known.changed), advance)
    write_tensors(tensors, header, out, digested=digested)


def provenance(stack: Stack, made: Made) -> Provenance:
    """Of all patches of a stack as one delta: the last one's, with the others in its ledger."""
    *before, last = stack.patches
    ledger = [e for p in stack.patches for e in p.provenance.earlier]
    ledger += [_entry(p) for p in before]
    once = list({e.digest: e for e in ledger}.values())
    changes: dict[str, Any] = {
        "holds": "bits", "adapter": None, "earlier": once, "digest": made.digest, "base": made.base,
        "base_digest": made.base_digest, "patched_digest": made.patched_digest,
    }  # fmt: skip
    return last.provenance.model_copy(update=changes)


def _entry(patch: Patch) -> LedgerEntry:
    said = patch.provenance
    return LedgerEntry(digest=patch.digest, targets=said.targets, surrogates=said.surrogates, prompts=said.prompts)
