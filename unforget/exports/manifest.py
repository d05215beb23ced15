"""What an exported file or folder says of itself."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from unforget.errors import UsageError
from unforget.families import HUB_ALIASES
from unforget.families.parts import HINTS, is_own
from unforget.files.patch import Provenance
from unforget.files.storage import BadFile, checksummed, read_json, undamaged
from unforget.verification.report import Report, Verdict

MAX_REPORT = 2**24
"""Largest report that is read, bytes."""
HEADER = "unforget.made"
"""Key of an `ExportManifest` in the header of a safetensors file."""
PATH = re.compile(r"(/|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\|file:).*", re.DOTALL)
"""Texts that name a place on somebody's disk."""


def called(ref: str) -> str:
    """A base as the world may know it: an alias or a hub id as it is, of a local path the last part.

    A folder that bears an alias's name is not that model: `./sdxl`.
    """
    if ref in HUB_ALIASES or not (Path(ref).exists() or PATH.fullmatch(ref)):
        return ref
    name = re.split(r"[\\/]", ref.rstrip("\\/"))[-1]
    return f"./{name}" if name in HUB_ALIASES else name


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class AppliedPatch(_Record):
    """A patch that is in an export, and the share of it that is."""

    scale: float
    provenance: Provenance


class Rounding(_Record):
    """What writing in another precision does to the change that the patches make, over all tensors they change."""

    dtype: str
    """Precision that was written: float32, bfloat16 or float16."""
    still: float
    """Share of the numbers that the patches change and that came out as they were."""
    cosine: float
    """Cosine between the change as written and as meant, in [-1, 1]; 1 is all of it."""
    error: float
    """RMS of their difference, as a share of the RMS of the change."""


class Verified(_Record):
    """The verdict of the last `unforget verify` of these very weights."""

    verdict: Verdict
    level: str
    summary: str
    targets: dict[str, str]
    """Verdict by target."""
    report_digest: str
    """SHA-256 of the JSON report."""
    candidate_digest: str
    versions: dict[str, str]

    @classmethod
    def of(cls, path: Path) -> Self:
        """From a JSON report; UsageError if the file is none."""
        try:
            found = Report.model_validate(undamaged(read_json(path, most=MAX_REPORT)))
            content = path.read_bytes()
        except (OSError, ValidationError, ValueError) as error:
            reason = f": {error}" if type(error) is BadFile else ""
            raise UsageError(
                f"'{path}' is not a report of `unforget verify`{reason}", "Give what --report wrote, or verify again."
            ) from None
        return cls(
            **found.model_dump(include={"verdict", "level", "summary", "candidate_digest", "versions"}),
            targets={t.id: t.verdict for t in found.targets}, report_digest=hashlib.sha256(content).hexdigest(),
        )  # fmt: skip


class ExportManifest(_Record):
    """Where an export came from. It holds no picture, no path and no date: equal exports are equal bytes."""

    format: str
    dtype: str
    """Precision of the network's floating-point tensors: float32, bfloat16 or float16."""
    base: str
    """What the user called the base."""
    base_digest: str
    patched_digest: str
    """Of the network with the patches on, in the precision in which this tool computes with it."""
    digest: str
    """Of the network's tensors, or the factors, as they were written."""
    patches: list[AppliedPatch]
    rounding: Rounding | None = None
    """None where nothing is rounded."""
    verified: Verified | None = None
    versions: dict[str, str]
    sealed: bool = False
    """Whether damage of what holds this can be told: a file has a seal, a folder `files`."""
    files: dict[str, str] = {}
    """SHA-256 of the files beside this, by their places; of `unforget.json` of what it says besides."""

    @property
    def targets(self) -> list[str]:
        """Ids of all targets of all patches, in order."""
        return list(dict.fromkeys(t for part in self.patches for t in part.provenance.all_targets))

    def said(self) -> dict[str, Any]:
        """As JSON, with a checksum."""
        return checksummed(self.model_dump(mode="json"))

    def header(self) -> dict[str, str]:
        """As an entry in the header of a safetensors file."""
        return {HEADER: json.dumps(self.said(), sort_keys=True)}

    def check_files(self, folder: Path) -> None:
        """BadFile unless the files beside this are there, and are those that were written, bit for bit."""
        for place, written in self.files.items():
            if not is_own(folder / place, folder):
                raise BadFile(f"'{place[:80]}' is missing")
            if file_digest(folder / place) != written:
                raise BadFile(f"'{place[:80]}' is damaged: it is not what was written")


def file_digest(path: Path) -> str:
    """SHA-256 of a file; of `unforget.json` of all but where its folder came from."""
    if path.name != HINTS:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    rest = {k: v for k, v in read_json(path).items() if k != "made"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
