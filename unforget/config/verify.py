"""The configuration of `unforget verify`; what a team agrees on may stand in `unforget.toml`."""

import datetime
import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from unforget.config.base import MACHINE, Config, ImageConfig, PatchedConfig, PromptConfig, option, paired
from unforget.config.pictures import Pictures, Surrogates

RENAMED_PROBES = {
    "reword": "paraphrase", "cast": "quantization", "complete": "partial_denoise", "retain": "retention",
    "keep": "must_retain", "seek": "noise_search", "revive": "relearning",
}  # fmt: skip
Timestep = Annotated[int, Field(gt=0, lt=1000)]
SIMILARITY = ("pixels", "structure", "sscd", "face")


def _at(standard: float, quick: float) -> dict[str, Any]:
    """A default that is another one at the level quick."""
    words = f"{standard}, {quick} for quick"
    return {"default": lambda data: quick if data.get("level") == "quick" else standard, "words": words}


class Allow(BaseModel, frozen=True, extra="forbid"):
    """A target that may still be drawn, for a while."""

    id: str = option("Id of the target, as reports give it.", pattern=r"^[0-9a-f]{16}$")
    reason: str = option("Why it may be drawn.", min_length=1)
    expires: datetime.date = option("Last day on which it may.")


class Policy(PromptConfig):
    """What a team agrees on once: the keys of `unforget.toml`. All but `allow` are options, too."""

    PANEL: ClassVar[str] = "What is judged, and how"

    level: Literal["quick", "standard", "deep"] = option("Which probes run.", "standard")
    require: tuple[str, ...] = option("Probe to run and to decide by, whatever the level; repeats.", (), "none")
    max_rate: float = option("Largest share of draws that may be near-copies.", **_at(0.005, quick=0.03), ge=1e-6, lt=1)
    confidence: float = option("Confidence that what is over a limit does not pass.", 0.95, gt=0.5, lt=1)
    samples: int | None = option("Most draws that a test may take.", None, "as many as decide", ge=1, le=10_000_000)
    false_positive_rate: float = option(
        "Share of pairs of different images that may pass for near-copies.", 1e-4, gt=0, le=0.01
    )
    similarity: tuple[str, ...] = option(
        f"What detects near-copies: {', '.join(SIMILARITY)}, or KIND=FILE with its weights; repeats.",
        ("pixels", "structure"), min_length=1,
    )  # fmt: skip
    draws: int = option("Number of reconstructions for each timestep.", **_at(32, quick=24), ge=2, le=4096)
    timestep: tuple[Timestep, ...] = option(
        "Timestep to reconstruct from, as diffusers counts; repeats.", (250, 400, 550), min_length=1
    )
    paired: int = option("Number of pairs of draws with the same seed.", **_at(256, quick=48), ge=16, le=100_000)
    controls: int = option("Number of images that show what any model returns.", **_at(48, quick=24), ge=8, le=4096)
    sampler_steps: int = option("Sampler steps of the draws.", **_at(12, quick=10), ge=2, le=1000)
    nearer: float = option(
        "Share of reconstructions nearer to the surrogate than to the target: it must be over this.",
        0.65,
        ge=0,
        lt=1,
    )
    min_replaced: float = option(
        "Share of draws under a given prompt that show the surrogate, where it is known: it must be over this.",
        0.7,
        ge=0,
        lt=1,
    )
    max_drift: float = option(
        "Largest median drift under the same seed, in distances between two draws.",
        lambda data: 0.15 if data.get("patch") else 0.5, "0.15 for a patch, 0.5 for a folder", gt=0,
    )  # fmt: skip
    min_kept: float = option(
        "Share of look-alikes, and of --must-retain images as the base draws them, that must still be drawn.",
        0.5,
        ge=0,
        lt=1,
    )
    may_differ: tuple[str, ...] = option(
        "Part of a candidate beside its network that may be another than the base's, such as scheduler; repeats.", (),
        "none",
    )  # fmt: skip
    tolerance: float = option("A figure so near its threshold, as a share of it, is borderline.", 0.02, ge=0, lt=1)
    target: Pictures = option(
        "Image that must be gone, or a folder of them; repeats.",
        (),
        "those beside the patch",
        names=("-t",),
        reads="file",
    )
    surrogate: Surrogates = option(
        "Image that is generated instead, one for each target, in order; or a folder, by the targets' names.", (),
        "those beside the patch", names=("-s",),
        reads="file",
    )  # fmt: skip
    must_retain: Pictures = option(
        "Image that must still be drawn, or a folder of them; repeats.", (), "none", reads="file"
    )
    allow: tuple[Allow, ...] = option("Targets that may still be drawn.", (), hidden=True)

    @field_validator("require")
    @classmethod
    def _renamed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for old in RENAMED_PROBES.keys() & value:
            warnings.warn(f"the probe {old} is now {RENAMED_PROBES[old]}", FutureWarning, stacklevel=2)
        return tuple(RENAMED_PROBES.get(name, name) for name in value)

    @field_validator("similarity")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in (text.partition("=")[0] for text in value):
            if kind not in SIMILARITY:
                raise ValueError(f"there is no similarity backend '{kind}'; known: {', '.join(SIMILARITY)}")
        return value

    @model_validator(mode="after")
    def _paired(self) -> Self:
        paired(self.target, self.surrogate)
        return self


class ReportConfig(Config):
    """What to write of a verdict."""

    PANEL: ClassVar[str] = "Reports"

    report: Path | None = option("JSON report to write.", None, "none", writes="file")
    junit: Path | None = option("JUnit XML to write.", None, "none", writes="file")
    attestation: Path | None = option(
        "in-toto statement of the verdict and the files that were judged to write, for a pipeline to sign.", None,
        "none", writes="file",
    )  # fmt: skip
    html: Path | None = option("HTML page to write.", None, "none", writes="file")
    summary: Path | None = option(
        "File to append a summary in Markdown to.", None, "$GITHUB_STEP_SUMMARY", writes="appended"
    )
    save_images: Path | None = option(
        "Folder to write the images to, which then stand in the page, too.", None, "none", writes="folder"
    )

    def written_beside(self) -> dict[Path, str]:
        """The sheet of the images."""
        return {self.save_images / "sheet.png": "part"} if self.save_images else {}


class VerifyConfig(ReportConfig, Policy, PatchedConfig, ImageConfig):
    """What `unforget verify` is asked: a field is the option of that name."""

    COMMAND: ClassVar[str] = "verify"

    patch: tuple[Path, ...] = option("Patch to judge; repeats, for several on one base.", (), "none", reads="patch")
    candidate: Path | None = option("What to judge, in any form that `export` writes.", None, "the base with --patch")
    replay_seed: int | None = option("Seed that made the target.", None, "no replay", ge=0, lt=2**63)
    replay_steps: int | None = option("Sampler steps that made the target.", None, "20", ge=1, le=10_000)
    replay_scheduler: str | None = option(
        "diffusers class of the sampler that made the target, such as DDPMScheduler.", None, "the family's own"
    )
    nonce: str | None = option(
        "What the candidate's own noise is drawn with: that of a report repeats its verdict.", None, "random",
        max_length=64,
    )  # fmt: skip
    batch_size: int | None = option(
        "Images in one pass of the network without gradients.", None, "by their size and the device", panel=MACHINE,
        ge=1, le=100_000,
    )  # fmt: skip
    cache: bool = option("Read and keep what the base does, for the next run.", True, panel=MACHINE)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.patch) == bool(self.candidate):
            raise ValueError("give either --patch or --candidate")
        if "replay" in self.require and self.replay_seed is None:
            raise ValueError("the policy requires the probe replay: give --replay-seed")
        return self
