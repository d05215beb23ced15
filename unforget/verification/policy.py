"""What `verify` asks for: thresholds, probes, targets and exceptions, from `unforget.toml` and the command line."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from unforget.config import Config, PatchedConfig, read, sentence, stated
from unforget.errors import UsageError
from unforget.verification.probes import KINDS, chosen
from unforget.verification.similarity import Backend, Pixels, Structure, backend

Level = Literal["quick", "standard", "deep"]
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"max_rate": 0.03, "draws": 16, "paired": 48, "controls": 24, "sampler_steps": 15},
    "standard": {},
    "deep": {},
}
"""What a level changes beside its probes."""


class Allow(Config):
    """A target that may still be drawn, for a while."""

    id: str = Field(pattern=r"^[0-9a-f]{16}$", description="the target's id, as reports give it")
    reason: str = Field(min_length=1, description="why")
    expires: datetime.date = Field(description="last day on which it holds")


class Policy(Config):
    """What a team agrees on once. Every key can be given on the command line too, but for `allow`."""

    level: Level = Field("standard", description="which probes run")
    require: tuple[str, ...] = Field((), description="probes to run and to decide by, whatever the level")
    max_rate: float = Field(0.005, gt=0, lt=1, description="largest share of draws that may be near-copies")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of that")
    samples: int | None = Field(None, ge=1, le=10_000_000, description="most draws a test may take")
    false_positive_rate: float = Field(
        1e-4, gt=0, le=0.01, description="share of different pictures that may pass for copies"
    )
    similarity: tuple[Annotated[Backend, BeforeValidator(lambda v: backend(v) if isinstance(v, str) else v)], ...] = (
        Field((Pixels(), Structure()), min_length=1, description="backends that see near-copies")
    )
    draws: int = Field(32, ge=2, le=4096, description="reconstructions a noise level")
    timestep: tuple[int, ...] = Field((250, 400, 550), min_length=1, description="timesteps to reconstruct from")
    paired: int = Field(256, ge=16, le=100_000, description="same-seed pairs of draws")
    controls: int = Field(48, ge=8, le=4096, description="pictures that show what any model returns")
    sampler_steps: int = Field(20, ge=2, le=1000, description="sampler steps of the draws")
    nearer: float = Field(0.8, ge=0, le=1, description="least share of reconstructions nearer to the surrogate")
    max_drift: float = Field(
        0.5, gt=0, description="largest median same-seed drift, in distances between draws; 0.15 for a patch"
    )
    min_kept: float = Field(
        0.6, ge=0, le=1, description="least share of look-alikes and --must-retain pictures still drawn"
    )
    tolerance: float = Field(0.02, ge=0, lt=1, description="a figure so near its threshold counts as failed")
    target: tuple[Path, ...] = Field((), description="picture that must be gone; found beside the patch if not given")
    surrogate: tuple[Path, ...] = Field((), description="its surrogate, in the same order")
    must_retain: tuple[Path, ...] = Field((), description="picture that must still be drawn; repeats")
    prompt: tuple[str, ...] = Field((), description="prompts to look under; the patch's own if not given")
    retain_prompts: Path | None = Field(None, description="text file, one prompt a line, for what must stay")
    allow: tuple[Allow, ...] = Field((), description="targets that may still be drawn")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """What the level sets, unless it is said otherwise."""
        return {**PRESETS.get(str(values.get("level")), {}), **values} if isinstance(values, dict) else values

    @field_validator("require")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for kind in value:
            if kind not in KINDS:
                raise ValueError(f"there is no probe '{kind}'; known: {', '.join(KINDS)}")
        return value

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.surrogate and len(self.surrogate) != len(self.target):
            raise ValueError(f"{len(self.target)} target(s) but {len(self.surrogate)} surrogate(s)")
        if any(not 0 < t < 1000 for t in self.timestep):
            raise ValueError("timesteps lie between 1 and 999")
        return self

    @property
    def probes(self) -> tuple[str, ...]:
        """Kinds of the probes that run, in order."""
        return chosen(self.level, self.require)


class VerifyConfig(PatchedConfig, Policy):
    """`unforget verify`."""

    patch: tuple[Path, ...] = Field((), description="patch to judge; repeats, for several on one base")
    candidate: Path | None = Field(None, description="or a diffusers folder to judge")
    replay_seed: int | None = Field(None, ge=0, lt=2**63, description="seed that made the picture")
    replay_steps: int | None = Field(None, ge=1, le=10_000, description="sampler steps that made it")
    replay_scheduler: str | None = Field(None, description="diffusers class of the sampler that made it")
    report: Path | None = Field(None, description="write the JSON report here")
    junit: Path | None = Field(None, description="write JUnit XML here")
    summary: Path | None = Field(None, description="append Markdown here; $GITHUB_STEP_SUMMARY if not given")
    html: Path | None = Field(None, description="write a page to look at here")
    save_images: Path | None = Field(None, description="folder for pictures, which then stand in the page, too")
    cache: bool = Field(True, description="keep what the base does for the next run")

    @model_validator(mode="before")
    @classmethod
    def _patched(cls, values: Any) -> Any:
        """A patch is to leave seeds alone; a folder may hold a model that was trained again, which cannot."""
        patched = isinstance(values, dict) and values.get("patch")
        return {"max_drift": 0.15, **values} if patched else values

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.patch) == bool(self.candidate):
            raise ValueError("give either --patch or --candidate")
        if "replay" in self.require and self.replay_seed is None:
            raise ValueError("the policy requires the probe replay: give --replay-seed")
        return self


PATHS = ("target", "surrogate", "must_retain", "retain_prompts")


def resolve(given: Mapping[str, Any], file: Path | None = None, policy: Path | None = None) -> VerifyConfig:
    """Options beat the configuration file, which beats the policy, which beats the level's presets.

    Args:
        given: Options by name; None for those not given.
        file: Configuration, TOML with the same names.
        policy: `unforget.toml`, or a `pyproject.toml` with `[tool.unforget]`; the one in this folder if None.

    Raises:
        UsageError: One clause for every field that is wrong.
    """
    agreed = read_policy(policy)
    values = {**agreed, **read(file), **stated(dict(given))}
    if "target" in stated(dict(given)) and "surrogate" not in stated(dict(given)):
        values.pop("surrogate", None)  # the policy's belong to its own targets
    try:
        return VerifyConfig.model_validate(values)
    except ValidationError as error:
        raise UsageError(sentence(error), "See `unforget verify --help`.") from None


def read_policy(path: Path | None) -> dict[str, Any]:
    """The keys that a policy sets, its paths made relative to its own folder.

    Raises:
        UsageError: If the file is missing, or holds what no policy may.
    """
    found = path or next((p for p in (Path("unforget.toml"), Path("pyproject.toml")) if _holds(p)), None)
    if found is None:
        return {}
    table = read(found)
    table = table.get("tool", {}).get("unforget", {}) if found.name == "pyproject.toml" else table
    keys: dict[str, Any] = table.get("verify", {})
    unknown = [*(set(table) - {"verify"}), *([] if isinstance(keys, dict) else ["verify"])]
    if unknown:
        raise UsageError(f"the policy '{found}' has no use for '{unknown[0]}'", "Its one table is [verify].")
    try:
        Policy.model_validate(keys)
    except ValidationError as error:
        raise UsageError(f"the policy '{found}' is wrong: {sentence(error)}", "See docs/verify.md.") from None
    home = found.parent
    for name in PATHS:
        if name in keys:
            keys[name] = [home / p for p in keys[name]] if isinstance(keys[name], list) else home / keys[name]
    return keys


def _holds(path: Path) -> bool:
    return path.is_file() and (path.name != "pyproject.toml" or "unforget" in read(path).get("tool", {}))
