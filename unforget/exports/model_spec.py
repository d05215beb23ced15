"""The headers of exported safetensors files, for us and for the tools that read ModelSpec 1.0.1.

ModelSpec: https://github.com/Stability-AI/ModelSpec. Equal exports have equal headers: no date, no path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unforget.exports.manifest import HEADER, PATH, ExportManifest
from unforget.files.patch import HEADER as PATCH

HASH = "modelspec.hash_sha256"
"""Written by `storage.write_tensors`: of the tensors alone."""
DATE = "modelspec.date"
DIFFUSERS = "https://github.com/huggingface/diffusers"
PREDICTIONS = {"v_prediction": "v"}
"""ModelSpec's words, where they are not diffusers'."""


@dataclass(frozen=True)
class ModelSpec:
    """What a header says of the model itself.

    Attributes:
        architecture: ModelSpec's name where it has one, from the family's row.
        resolution: Width and height of its images.
        prediction: What its network predicts, as its scheduler is configured.
    """

    architecture: str
    resolution: tuple[int, int]
    prediction: str

    def header(self, manifest: ExportManifest, implementation: str = DIFFUSERS) -> dict[str, str]:
        """In ModelSpec's words; `implementation` is the code that reads the file's layout."""
        targets = len({t for part in manifest.patches for t in part.provenance.all_targets})
        what = f"{targets} picture{'s' * (targets != 1)} unlearned"
        return {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": self.architecture,
            "modelspec.implementation": implementation,
            "modelspec.title": f"{manifest.base}, {what}",
            "modelspec.resolution": "{}x{}".format(*self.resolution),
            "modelspec.prediction_type": PREDICTIONS.get(self.prediction, self.prediction),
            "modelspec.description": f"{manifest.base} with {what} by unforget {manifest.versions['unforget']}.",
            "modelspec.tags": "unlearned",
        }


def kept(base: Mapping[str, str]) -> dict[str, str]:
    """Metadata of the base's own file, but for what is no longer true or names a place on a disk."""
    return {k: v for k, v in base.items() if k not in (HEADER, PATCH, HASH, DATE) and not PATH.fullmatch(v)}
