"""A diffusers folder: the network anew, in shards, and every other part copied as it is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from unforget import families
from unforget.core.types import Family
from unforget.exports.formats.base import OPEN, Format, Job, check_written, header
from unforget.exports.manifest import PATH, ExportManifest, file_digest
from unforget.exports.rounding import DTYPES
from unforget.families import weights
from unforget.families.parts import HINTS, INDEX, classes, is_own, listed
from unforget.families.spec import FamilySpec, is_inside
from unforget.files.storage import BadFile, Digested, open_tensors, write_json, write_tensors

STEM = "diffusion_pytorch_model"
CONTENT = ("vocab.json", "tokenizer.json")
"""Large files of words, in which a slash is a word."""
LICENCES = re.compile(r"(LICEN[CS]E|NOTICE)[\w-]*(\.(md|txt))?", re.IGNORECASE)
NAMES = ("_name_or_path", "name_or_path")


class DiffusersFolder(Format):
    """What the stock pipeline's `from_pretrained` opens."""

    kind = "diffusers"
    is_folder = True
    usage = f"{OPEN}here{{options}})"

    def size(self, job: Job) -> int:
        files = copies(job.origin.home, job.family)[0] if job.origin.home else {}
        return super().size(job) + sum(f.stat().st_size for f in files.values())

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        network, home, missing = job.family.network, job.origin.home, list[str]()
        (out / network).mkdir(parents=True)
        if home is not None:
            files, missing = copies(home, job.family)
            own = _own_parts(job)
            missing = [*dict.fromkeys([*missing, *own])]
            for to, start in files.items():
                if to.parts[0] in own and to.name != "config.json":
                    continue
                (out / to).parent.mkdir(exist_ok=True)
                shutil.copyfile(start, out / to)  # follows links, of which the hub's cache is made
        if home is None or missing:
            # Pickled or inside a single file: read by the loader, and written in the precision in which it lies there.
            opened: Any = families.load(job.ref, replace(job.options, t5=True, rest_dtype=_rest_dtype(job)))
            opened.set_network(None)
            weights.save_parts(opened, out, missing or [n for n in opened.pipeline.components if n != network])
            write_json(dict(job.config), out / network / "config.json")
        _clean_all(out)
        _write_shards(job, manifest, out / network)
        hints = families.hints(home) if home is not None else families.Hints()
        said = hints.model_dump(mode="json", exclude={"made"})
        value = {k: v for k, v in said.items() if v not in (None, [])}
        write_json(value, out / HINTS)
        digests = {p.relative_to(out).as_posix(): file_digest(p) for p in sorted(out.rglob("*")) if p.is_file()}
        write_json({**value, "made": manifest.model_copy(update={"files": digests}).said()}, out / HINTS)

    def load(self, job: Job, out: Path) -> Family:
        return weights.folder(out, job.options, job.merge.dtype, job.compute)


def _own_parts(job: Job) -> list[str]:
    """The parts that a single file brings, or files beside it do, whatever the folder of its configuration has."""
    if job.origin.file is None:
        return []
    held, family = open_tensors(job.origin.file).tensors, job.family
    found = [name for name in (family.autoencoder, *family.text_encoders) if is_inside(family, name, held)]
    return found + [name for name in family.text_encoders if job.options.text_encoder and name not in found]


def copies(home: Path, family: FamilySpec) -> tuple[dict[Path, Path], list[str]]:
    """What of a base's folder goes into the new one, but for the weights of the network, by its place there.

    The files that loaders read, weights under the one name that is read, and licences. And the parts whose weights are
    in no form that can be copied.
    """
    said = [f for f in home.iterdir() if f.name == INDEX or (LICENCES.fullmatch(f.name) and is_own(f, home))]
    found, missing = {Path(f.name): f for f in said}, []
    for part in listed(home, classes(family)):
        found |= {Path(part.name, f.name): f for f in part.files()}
        if part.name == family.network or part.kind != "model":
            continue
        weights = part.weights()
        found |= {Path(part.name, name): file for name, file in weights.items()}
        if not weights:
            missing.append(part.name)
    return found, missing


def _clean_all(folder: Path) -> None:
    """Take what names a place on a disk out of every JSON file; the others stay to the byte."""
    for path in folder.rglob("*.json"):
        if path.name not in CONTENT and ".index." not in path.name:
            try:
                value = json.loads(path.read_text())
            except ValueError:
                raise BadFile(f"'{path.relative_to(folder)}' is not JSON") from None
            if (cleaned := _clean(value)) != value:
                path.write_text(json.dumps(cleaned, indent=2) + "\n")


def _clean(value: Any) -> Any:
    """JSON without the entries that say where something lay."""
    if isinstance(value, dict):
        lies = {k for k, v in value.items() if k in NAMES or (isinstance(v, str) and PATH.fullmatch(v) and len(v) > 2)}
        return {k: _clean(v) for k, v in value.items() if k not in lies}
    return [_clean(v) for v in value] if isinstance(value, list) else value


def _rest_dtype(job: Job) -> torch.dtype | None:
    """The precision of a single file's other parts; None for a base of another kind."""
    file, layout = job.origin.file, job.origin.layout
    if file is None or layout is None:
        return None
    parts = (layout.vae_prefix, *layout.text_encoders.values())
    found = {t.dtype for n, t in open_tensors(file).tensors.items() if n.startswith(parts)}
    return max(found & {*DTYPES.values()}, key=str, default=None)


def _write_shards(job: Job, manifest: ExportManifest, folder: Path) -> None:
    """The network's weights as diffusers lays them out: one file, or shards and their index."""
    tensors, written = job.merge.tensors(), Digested()
    split = split_state_dict_into_shards_factory(
        dict[str, Any](tensors), get_storage_size=lambda lazy: lazy.size, max_shard_size=job.max_shard_size,
        filename_pattern=f"{STEM}{{suffix}}.safetensors",
    )  # fmt: skip
    for name, members in split.filename_to_tensors.items():
        mine, said = {n: tensors[n] for n in members}, header(job, manifest)
        write_tensors(mine, said, folder / name, digested=written, sealed=True)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(index, folder / f"{STEM}.safetensors.index.json")
    check_written(written, manifest)
