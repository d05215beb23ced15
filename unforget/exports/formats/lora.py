"""The factors of a LoRA in the layouts that people have: diffusers', PEFT's and kohya's."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional

from unforget.core.types import Family
from unforget.errors import CannotRun, UsageError
from unforget.exports.formats.base import HASH, OPEN, Format, Job, model_spec
from unforget.exports.manifest import ExportManifest, file_digest
from unforget.exports.merging import MergeStats
from unforget.exports.rounding import NAMES
from unforget.families import parts, weights
from unforget.families.layouts import Layout, grouped, to_original
from unforget.files.patch import Stack, side_by_side
from unforget.files.storage import digest, write_json, write_tensors

_ATTENTION = re.compile(r"(.+\.attn\d)\.(to_q|to_k|to_v|to_out)(?:\.0)?\.lora_([AB])\.weight")


def _older(name: re.Match[str]) -> str:
    layer, projection, side = name.groups()
    return f"{layer}.processor.{projection}_lora.{'down' if side == 'A' else 'up'}.weight"


class Lora(Format):
    """What `pipeline.load_lora_weights` opens: several patches, each with its scale, as one.

    Alpha is the rank, for ComfyUI and others read no alpha from such a file; FLUX's stock reader multiplies a factor by
    their share, and may round it. One patch in full has the factors as trained, unless its alpha is another.

    Raises:
        UsageError: If a patch holds anything else than factors.
        CannotRun: If a factor does not fit into float16.
    """

    kind = "lora"
    is_folder = True
    is_adapter = True
    file: ClassVar[str] = parts.LORA
    put_on = staticmethod(weights.with_lora)
    """Puts the factors beside the base's weights; returns them as the stock loader read them."""
    usage = f'{OPEN}{{base}})\npipe.load_lora_weights(here, weight_name="{file}")'

    def __init__(self, stack: Stack, dtype: torch.dtype | None) -> None:
        if any(p.provenance.adapter is None for p in stack.patches):
            hint = "Unlearn with --train lora, or export diffusers."
            raise UsageError("the patch holds whole weights, not a LoRA", hint)
        (patch, scale), *more = pairs = stack.pairs()
        adapter = patch.provenance.adapter or {}
        if not more and scale == 1 and adapter["rank"] == adapter["alpha"]:
            tensors, self.rank = patch.tensors, adapter["rank"]
        else:
            tensors, self.rank = side_by_side(pairs)
        self.factors = {n: t.to(dtype or (t.dtype if t.dtype in NAMES else torch.float32)) for n, t in tensors.items()}
        if not all(bool(t.isfinite().all()) for t in self.factors.values()):
            raise CannotRun("a factor does not fit into float16, which ends at 65504", "Give --dtype bfloat16.")
        super().__init__(stack, next(iter(self.factors.values())).dtype)

    def digest(self, stats: MergeStats) -> str:
        """Of the factors by the network's names, whatever the layout calls them."""
        return digest(self.factors)

    def size(self, job: Job) -> int:
        return sum(t.numel() * t.itemsize for t in self._named(job, "").values())

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        said = {f"{job.family.network}.{k}": v for k, v in self._config().items()}
        more = {"lora_adapter_metadata": json.dumps(said, indent=2, sort_keys=True)}
        self._write(job, manifest, out, f"{job.family.network}.", more)

    def _write(self, job: Job, manifest: ExportManifest, out: Path, prefix: str, more: dict[str, str]) -> None:
        out.mkdir(exist_ok=True)
        header = {"format": "pt", **manifest.header(), **model_spec(job, manifest), **more}
        header["modelspec.architecture"] += "/lora"
        write_tensors(self._named(job, prefix), header, out / self.file, hash_key=HASH, sealed=True)

    def _named(self, job: Job, prefix: str) -> dict[str, torch.Tensor]:
        """A UNet's under the names that diffusers had before PEFT's: it reads both, and ComfyUI, of a UNet, no others.

        They are for attention alone.
        """
        if prefix == "unet." and all(map(_ATTENTION.fullmatch, self.factors)):
            return {prefix + _ATTENTION.sub(_older, name): factor for name, factor in self.factors.items()}
        return {f"{prefix}{name}": factor for name, factor in self.factors.items()}

    def _config(self) -> dict[str, Any]:
        """What PEFT must know, and no more: an older version refuses the fields that a newer one has."""
        layers = sorted({name.rsplit(".lora_", 1)[0] for name in self.factors})
        return {"r": self.rank, "lora_alpha": self.rank, "target_modules": layers}

    def load(self, job: Job, out: Path) -> Family:
        return weights.load(job.ref, job.options)

    def reopen(self, job: Job, manifest: ExportManifest, out: Path) -> Family:
        """The base with the factors on, compared in whatever precision the loader holds them; more may be zeros."""
        base = self.load(job, out)
        read = self.put_on(base, out)
        meant = {n: self.factors.get(n, torch.zeros(1)).to(t.dtype).expand(t.shape) for n, t in read.items()}
        if not set(read) >= set(self.factors) or not all(torch.equal(t.cpu(), meant[n]) for n, t in read.items()):
            raise CannotRun("the LoRA does not read back as it was written", "Nothing was kept; check the disk.")
        return base


class Kohya(Lora):
    """What AUTOMATIC1111, ComfyUI and kohya's scripts open, and `load_lora_weights` too.

    UNets keep diffusers' names, transformers have the original's, under which several layers may be one.
    """

    kind = "kohya"

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        module = job.family.layout.kohya if job.family.layout is not None else ""
        said = {"module": module or "networks.lora", "dim": str(self.rank), "alpha": str(self.rank)}
        self._write(job, manifest, out, "", {f"ss_network_{name}": value for name, value in said.items()})

    def _named(self, job: Job, prefix: str) -> dict[str, torch.Tensor]:
        layout, found = job.family.layout, {}
        fused = layout is not None and layout.kohya
        for layer, (down, up) in (self._fused(job, layout) if layout and fused else self._pairs()).items():
            name = f"{prefix}lora_unet_{layer.replace('.', '_')}"
            found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down, up
            found[f"{name}.alpha"] = torch.tensor(float(len(down)))  # bfloat16 lacks some whole numbers
        return found

    def _pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Both factors of each layer, (r, in) and (out, r)."""
        layers = {name.rsplit(".lora_", 1)[0] for name in self.factors}
        return {n: (self.factors[f"{n}.lora_A.weight"], self.factors[f"{n}.lora_B.weight"]) for n in sorted(layers)}

    def _fused(self, job: Job, layout: Layout) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Those of the original's layers: of n that are one there, (n r, in) and, with zeros between, (out, n r).

        One that the LoRA leaves as it is takes part with zeros, as in kohya's own: so stock readers tell them apart.
        """
        base, found = job.merge.base, {}
        layout.check("network", base)
        pieces, pairs = layout.network(base), self._pairs()
        for original, names in grouped(pieces).items():
            layers = [name.removesuffix(".weight") for name in names]
            if not pairs.keys() & {*layers}:
                continue
            kind = next(pairs[layer][0] for layer in layers if layer in pairs)
            downs, ups = [], []
            for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
                rows, columns = base[name].shape
                down, up = pairs.get(layer) or (kind.new_zeros(self.rank, columns), kind.new_zeros(rows, self.rank))
                downs.append(down)
                between = self.rank * i, self.rank * (len(names) - i - 1)
                ups.append((pieces[name], functional.pad(up, between)))
            layer = original.removeprefix(layout.prefix).removesuffix(".weight")
            found[layer] = torch.cat(downs), to_original(ups)
        return found


class Peft(Lora):
    """What `PeftModel.from_pretrained` opens."""

    kind = "peft"
    file = parts.PEFT
    put_on = staticmethod(weights.with_peft)
    usage = (
        f"from peft import PeftModel\n{OPEN}{{base}})\n"
        "pipe.{network} = PeftModel.from_pretrained(pipe.{network}, here)"
    )

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        out.mkdir()
        said = {"peft_type": "LORA", "base_model_name_or_path": manifest.base, "inference_mode": True}
        write_json({**said, **self._config()}, out / parts.PEFT_CONFIG)
        files = {parts.PEFT_CONFIG: file_digest(out / parts.PEFT_CONFIG)}
        self._write(job, manifest.model_copy(update={"files": files}), out, "base_model.model.", {})
