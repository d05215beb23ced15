"""What `verify` says: the versioned record that every format is drawn from. Holds ids, never images or paths."""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from unforget.errors import ExitCode, printable
from unforget.files.storage import checksummed, write_bytes

Verdict = Literal["forgotten", "failed", "inconclusive", "allowed"]
Outcome = Literal["passed", "failed", "inconclusive", "informational"]
Rule = Literal["at least", "at most"]
Figure = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]
"""Six digits: beyond them, the order in which a machine adds up shows."""

FIGURES = {
    "apart": "difference from the base's part",
    "as_sharp": "share as sharp as other draws",
    "checks": "checks that decide",
    "hits": "draws that show the target",
    "iterations": "iterations until the target came back",
    "kept": "share of neighbours kept",
    "kid": "distance from the base's distribution",
    "median": "change of a typical draw",
    "near_copies": "share of near-copies",
    "nearer_in_region": "share nearer to the surrogate, where the two differ",
    "nearer_surrogate": "share nearer to the surrogate",
    "rate": "share of draws",
    "recall": "share that comes back as the target",
    "sharpness": "sharpness, the base's being 1",
    "similarity": "cosine between what both make of it",
    "surrogate": "share that shows the surrogate",
    "unlike": "distance between what both make of it",
}
"""Figures that are judged, for readers who do not know their names."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Place(_Record):
    """Where a figure was found."""

    probe: str
    """The kind of the probe: reconstruct, sample, ..."""
    target: str | None
    """The target's id; null where the whole model is judged."""
    timestep: Figure | None = None
    """Noise level, as diffusers counts timesteps."""
    prompt: str = ""
    """Empty for the empty prompt."""
    variant: str = ""
    """What else tells two uses of a probe apart: flip, bf16, ..."""

    @property
    def name(self) -> str:
        """The place without the target, as people read it."""
        timestep = "" if self.timestep is None else f"@{self.timestep:g}"
        variant = f" {self.variant}" if self.variant else ""
        return f"{self.probe}{timestep}{variant}" + (f" '{self.prompt}'" if self.prompt else "")


class Seen(Place):
    """All figures of one probe in one place, by name."""

    base: dict[str, Figure]
    candidate: dict[str, Figure]


class Check(Place):
    """One figure against its threshold."""

    figure: str
    base: Figure | None
    candidate: Figure
    low: Figure | None = None
    """Exact one-sided lower bound, where the figure is a rate."""
    high: Figure | None = None
    rule: Rule
    threshold: Figure
    outcome: Outcome
    """informational: for the reader, decides nothing."""
    borderline: bool = False
    """So near the threshold that it counts as failed."""
    note: str = ""

    @property
    def meaning(self) -> str:
        """The figure in words."""
        return FIGURES.get(self.figure, self.figure)


class Calibration(_Record):
    """The threshold under which an image counts as a target, and where it comes from."""

    target: str
    backend: str
    """The similarity backend, by name and version."""
    threshold: Figure
    """Distance under which an image counts as the target."""
    false_positive_rate: Figure
    """Share of pairs of different images that lie under the uncapped threshold."""
    pairs: int
    """How many pairs of images known to differ it comes from."""
    capped: bool
    """Whether the surrogate is so near that the threshold was lowered to half way to it."""


class Target(_Record):
    """What became of one target."""

    id: str
    """Salted digest of its pixels."""
    verdict: Verdict
    reason: str
    """The worst that was found, in words."""
    rate: str = ""
    """How often it is drawn, in a sentence; empty where no rate was taken."""


class Robustness(_Record):
    """What an adversary needed to bring a target back. Decides nothing unless the policy requires the probe."""

    probe: str
    target: str
    sentence: str


class Allowed(_Record):
    """An entry of the policy's allow-list."""

    id: str
    reason: str
    expires: str
    state: Literal["active", "expired", "unused"]


class Report(_Record):
    """What `unforget verify` says, and everything it said it from."""

    schema_version: Literal[3] = 3
    verdict: Verdict
    exit_code: int = Field(ge=0, le=255)
    summary: str
    level: str
    """quick, standard or deep."""
    targets: list[Target]
    checks: list[Check]
    robustness: list[Robustness]
    calibrations: list[Calibration]
    allowed: list[Allowed]
    findings: list[Seen]
    settings: dict[str, object]
    """Thresholds and counts of the policy that was applied."""
    backends: list[str]
    """Similarity backends, by name and version."""
    model: str = ""
    """What the base is called: an alias, a hub id, or the last part of a path."""
    patches: list[str] = []
    """Digests of the patches that make the candidate; empty where it is a folder or a file."""
    date: str = ""
    """When it was judged, UTC."""
    base_digest: str
    candidate_digest: str
    nonce: str = ""
    """What the candidate's own noise was drawn with, beside its digest: `--nonce` repeats the verdict."""
    versions: dict[str, str]
    seconds: dict[str, float]
    """Time a probe took; with date and checksum all that differs between two runs of one command and nonce."""
    checksum: str = ""
    """SHA-256 of the rest, as it is written: tells damage, not malice."""

    @property
    def passed(self) -> bool:
        """Whether every target is forgotten and the rest is retained."""
        return self.exit_code == ExitCode.OK

    def text(self) -> str:
        """The JSON, with its checksum."""
        return printable(json.dumps(checksummed(json.loads(self.model_dump_json())), indent=2))

    def save(self, path: Path) -> None:
        """Write the JSON, complete or not at all."""
        write_bytes((self.text() + "\n").encode(), path)
