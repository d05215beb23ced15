"""What the header of an exported safetensors file says, for us and for the tools that read ModelSpec 1.0.1.

ModelSpec: https://github.com/Stability-AI/ModelSpec. Equal exports have equal headers: no date, no path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unforget.exports.manifest import HEADER, PATH, Made
from unforget.files.patch import HEADER as PATCH

HASH = "modelspec.hash_sha256"
"""Written by `storage.write_tensors`: of the tensors alone."""
DATE = "modelspec.date"
DIFFUSERS = "https://github.com/huggingface/diffusers"
REFERENCE = "https://github.com/Stability-AI/sd3-ref"


@dataclass(frozen=True)
class Model:
    """What a header says of the model itself.

    Attributes:
        kind: Of its family.
        config: The network's configuration.
        resolution: Width and height of its pictures.
        prediction: What its network predicts, as its scheduler is configured.
    """

    kind: str
    config: Mapping[str, Any]
    resolution: tuple[int, int]
    prediction: str

    @property
    def architecture(self) -> str:
        """ModelSpec's name where it has one."""
        if self.kind == "ddpm":
            return "ddpm-unet"
        if self.config.get("dual_attention_layers"):
            return "stable-diffusion-v3.5-medium"
        return "stable-diffusion-v3.5-large" if self.config.get("qk_norm") else "stable-diffusion-v3-medium"


def of_network(made: Made, model: Model, base: Mapping[str, str], *, spec: bool) -> dict[str, str]:
    """The header of a file with weights.

    Args:
        made: Where they come from.
        model: What they are.
        base: Metadata of the base's own file: kept, but for what is no longer true or names a place on a disk.
        spec: Whether to say it as ModelSpec does, too.
    """
    kept = {k: v for k, v in base.items() if k not in (HEADER, PATCH, HASH, DATE) and not PATH.fullmatch(v)}
    found = {**kept, "format": "pt", **made.header()}
    if not spec:
        return found
    original = made.format == "single-file"
    return {
        **_spec(made, model, REFERENCE if original else DIFFUSERS), **found,
        "modelspec.merged_from": kept.get("modelspec.merged_from", made.base),
        "modelspec.tags": ", ".join(filter(None, [kept.get("modelspec.tags"), "unlearned"])),
    }  # fmt: skip


def of_lora(made: Made, model: Model, adapter: Mapping[str, Any] | None) -> dict[str, str]:
    """The header of a file with the factors of a LoRA; `adapter` is PEFT's configuration, where diffusers reads it."""
    found = {"format": "pt", **made.header(), **_spec(made, model, DIFFUSERS)}
    found["modelspec.architecture"] = f"{model.architecture}/lora"
    found["modelspec.tags"] = "unlearned"
    if adapter is not None:
        said = {f"transformer.{k}": v for k, v in adapter.items()}
        found["lora_adapter_metadata"] = json.dumps(said, indent=2, sort_keys=True)
    return found


def _spec(made: Made, model: Model, implementation: str) -> dict[str, str]:
    targets = len({t for part in made.patches for t in part.provenance.all_targets})
    what = f"{targets} picture{'s' * (targets != 1)} unlearned"
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": model.architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": f"{made.base}, {what}",
        "modelspec.resolution": "{}x{}".format(*model.resolution),
        "modelspec.prediction_type": model.prediction,
        "modelspec.description": f"{made.base} with {what} by unforget {made.versions['unforget']}.",
    }
