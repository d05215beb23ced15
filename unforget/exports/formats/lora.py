"""The factors of a LoRA in the layouts that people have: diffusers', PEFT's and kohya's."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch

from unforget.core.types import Family
from unforget.errors import CannotRun, UsageError
from unforget.exports.formats.base import HASH, OPEN, Format, Job, model_spec
from unforget.exports.manifest import ExportManifest
from unforget.exports.merging import MergeStats
from unforget.families import weights
from unforget.files.patch import Stack, side_by_side
from unforget.files.storage import digest, write_json, write_tensors


class Lora(Format):
    """What `pipeline.load_lora_weights` opens: several patches, each with its scale, as one; one in full as trained.

    Raises:
        UsageError: If a patch holds anything else than factors.
        CannotRun: If a factor does not fit into float16.
    """

    kind = "lora"
    is_folder = True
    is_adapter = True
    file: ClassVar[str] = "pytorch_lora_weights.safetensors"
    put_on = staticmethod(weights.with_lora)
    """Puts the factors beside the base's weights; returns them as the stock loader read them."""
    usage = f'{OPEN}{{base}})\npipe.load_lora_weights(here, weight_name="{file}")'

    def __init__(self, stack: Stack, dtype: torch.dtype | None) -> None:
        if any(p.provenance.adapter is None for p in stack.patches):
            hint = "Unlearn with --train lora, or export diffusers."
            raise UsageError("the patch holds whole weights, not a LoRA", hint)
        (patch, scale), *more = pairs = stack.pairs()
        if not more and scale == 1:
            adapter = patch.provenance.adapter or {}
            tensors, self.rank, self.alpha = patch.tensors, adapter["rank"], adapter["alpha"]
        else:
            tensors, self.rank = side_by_side(pairs)
            self.alpha = self.rank
        self.factors = {n: t.to(dtype or t.dtype) for n, t in tensors.items()}
        if not all(bool(t.isfinite().all()) for t in self.factors.values()):
            raise CannotRun("a factor does not fit into float16, which ends at 65504", "Give --dtype bfloat16.")
        super().__init__(stack, next(iter(self.factors.values())).dtype)

    def digest(self, stats: MergeStats) -> str:
        """Of the factors by the network's names, the same in both layouts."""
        return digest(self.factors)

    def size(self, job: Job) -> int:
        return sum(t.numel() * t.itemsize for t in self.factors.values())

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        said = {f"{job.family.network}.{k}": v for k, v in self._config(None).items()}
        more = {"lora_adapter_metadata": json.dumps(said, indent=2, sort_keys=True)}
        self._write(job, manifest, out, f"{job.family.network}.", more)

    def _write(self, job: Job, manifest: ExportManifest, out: Path, prefix: str, more: dict[str, str]) -> None:
        out.mkdir()
        header = {"format": "pt", **manifest.header(), **model_spec(job, manifest), **more}
        header["modelspec.architecture"] += "/lora"
        write_tensors(self._named(prefix), header, out / self.file, hash_key=HASH)

    def _named(self, prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}{name}": factor for name, factor in self.factors.items()}

    def _config(self, base: str | None) -> dict[str, Any]:
        """PEFT's configuration; `base` is the name of the base, never a path."""
        from peft import LoraConfig

        config: dict[str, Any] = LoraConfig(r=self.rank, lora_alpha=self.alpha, inference_mode=True).to_dict()  # type: ignore[no-untyped-call]
        layers = sorted({name.rsplit(".lora_", 1)[0] for name in self.factors})
        return {**config, "target_modules": layers, "base_model_name_or_path": base}

    def load(self, job: Job, out: Path) -> Family:
        return weights.load(job.ref, job.options)

    def reopen(self, job: Job, manifest: ExportManifest, out: Path) -> Family:
        """The base with the factors on, compared in whatever precision the loader holds them."""
        base = self.load(job, out)
        read = self.put_on(base, out)
        same = (torch.equal(t.cpu(), self.factors[n].to(t.dtype)) for n, t in read.items() if n in self.factors)
        if set(read) != set(self.factors) or not all(same):
            raise CannotRun("the LoRA does not read back as it was written", "Nothing was kept; check the disk.")
        return base


class Kohya(Lora):
    """What AUTOMATIC1111, ComfyUI and kohya's scripts open, and `load_lora_weights` too; for networks named unet."""

    kind = "kohya"

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        said = {"module": "networks.lora", "dim": str(self.rank), "alpha": str(self.alpha)}
        self._write(job, manifest, out, "", {f"ss_network_{name}": value for name, value in said.items()})

    def _named(self, prefix: str) -> dict[str, torch.Tensor]:
        found = {}
        for name, factor in self.factors.items():
            layer, side = name.split(".lora_")
            layer = f"lora_unet_{layer.replace('.', '_')}"
            found[f"{layer}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = factor
            found[f"{layer}.alpha"] = torch.tensor(self.alpha, dtype=factor.dtype)
        return found


class Peft(Lora):
    """What `PeftModel.from_pretrained` opens."""

    kind = "peft"
    file = "adapter_model.safetensors"
    put_on = staticmethod(weights.with_peft)
    usage = (
        f"from peft import PeftModel\n{OPEN}{{base}})\n"
        "pipe.{network} = PeftModel.from_pretrained(pipe.{network}, here)"
    )

    def write(self, job: Job, manifest: ExportManifest, out: Path) -> None:
        self._write(job, manifest, out, "base_model.model.", {})
        write_json(self._config(manifest.base), out / "adapter_config.json")
