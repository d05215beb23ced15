"""One frozen configuration a command. `Recipe` is what is computed and goes into the patch; the rest is how."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from unforget.core.recipe import Recipe
from unforget.errors import UsageError
from unforget.families import FAMILIES
from unforget.files.storage import MAX_JSON
from unforget.surrogate.editors import Editor, SDEdit


class Config(BaseModel):
    """Frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


RECIPES = {spec.name: spec.recipes for spec in FAMILIES}
"""Named recipes by family."""


class RecipeOverride(Config):
    """A named recipe and what to change in it, before it is known what kind of model it is for; see `recipe`."""

    name: str = "default"
    changes: dict[str, Any] = {}


class ModelConfig(Config):
    """What every command asks about the model and the machine."""

    model: str = Field(
        description="alias (faces, flags, sd3, ...), diffusers folder, .safetensors file, or owner/name[@revision]"
    )
    pipeline_config: Path | None = Field(None, description="diffusers folder that says what a single file holds")
    t5: bool = Field(True, description="load the third text encoder, where the model has one")
    resolution: int | None = Field(None, ge=8, description="width and height of pictures; the model's own if not given")
    guidance: float | None = Field(None, ge=1, le=100, description="classifier-free guidance of every draw")
    allow_pickle: bool = Field(False, description="also open pickled .bin weights; only from sources you trust")
    device: str = Field("cpu", description="where to compute: cpu, cuda, cuda:1, mps")
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores unless given")
    force: bool = Field(False, description="overwrite what exists")
    seed: int = Field(0, ge=0, lt=2**31, description="of every random draw")
    resize: bool = Field(False, description="crop and scale pictures to the model's size")


class PatchedConfig(ModelConfig):
    """What commands ask that take patches."""

    patch: tuple[Path, ...] = Field((), description="patch to put on the base; repeats, in order")
    scale: tuple[float, ...] = Field((), description="share of each patch, in the same order; 1 if not given")

    @field_validator("patch", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value or ()

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if self.scale and len(self.scale) != len(self.patch):
            raise ValueError(f"{len(self.patch)} patch(es) but {len(self.scale)} scale(s)")
        if not all(0 < abs(s) <= 100 for s in self.scale):
            raise ValueError("a scale is a number other than 0, between -100 and 100")
        return self


class DrawConfig(ModelConfig):
    """What both commands that make surrogates ask about the pictures that the base draws."""

    prompt: tuple[str, ...] = Field((), description="prompt under which the model draws the target; repeats")
    retain_prompts: Path | None = Field(None, description="text file, one prompt a line, for the pictures to keep")
    retain_count: int | None = Field(None, ge=8, le=100_000, description="pictures to draw for the retain set")
    sampler_steps: int = Field(20, ge=2, le=1000, description="sampler steps for them")
    near_copy: float = Field(0.16, gt=0, lt=2, description="RMS under which two pictures are the same one")
    min_distance: float = Field(0.2, gt=0, lt=2, description="least RMS of a made surrogate to its target")


class EditConfig(DrawConfig):
    """`unforget edit-surrogate`."""

    target: Path = Field(description="the picture to replace")
    output: Path = Field(description="where to write the surrogate (PNG)")
    editor: Editor = SDEdit()
    mask: Path | None = Field(None, description="where to edit: white in this picture")
    box: tuple[int, int, int, int] | None = Field(None, description="where to edit: x,y,width,height in pixels")
    donor: Path | None = Field(None, description="picture to take the masked pixels from")
    pick: int | None = Field(None, ge=1, description="take this candidate of the sheet instead of the best")


class UnlearnConfig(DrawConfig, PatchedConfig):
    """`unforget unlearn`."""

    target: tuple[Path, ...] = Field(min_length=1, description="picture to forget; repeats")
    surrogate: tuple[Path, ...] = Field((), description="what to say instead, one a target; made when not given")
    output: Path = Field(description="where to write the patch")
    retain: Path | None = Field(None, description="folder of pictures to keep; drawn from the base when not given")
    micro_batch: int | None = Field(None, ge=1, description="pictures in one pass; by their size if not given")
    mixed_precision: Literal["auto", "no", "bf16"] = Field("auto", description="auto: bf16 where the machine has it")
    num_validation_images: int = Field(
        8, ge=1, le=256, description="reconstructions a level, and seeds, to show at the end"
    )
    gradient_checkpointing: bool | None = Field(None, description="less memory, more time; on for large models")
    use_8bit_adam: bool = Field(False, description="optimiser state in 8 bits (needs bitsandbytes)")
    resume: bool = Field(False, description="go on with the run beside the patch from its last checkpoint")
    checkpointing_steps: int | None = Field(
        None, ge=1, description="updates between two checkpoints; as often as costs under 5 % of the time if not given"
    )
    recipe: Recipe | RecipeOverride = RecipeOverride()

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if self.surrogate and len(self.surrogate) != len(self.target):
            raise ValueError(f"{len(self.target)} target(s) but {len(self.surrogate)} surrogate(s)")
        return self


class ExportConfig(PatchedConfig):
    """`unforget export`."""

    patch: tuple[Path, ...] = Field(min_length=1, description="patch to put on the base; repeats, in order")
    output: Path = Field(description="folder to write, or file for transformer, single-file and delta")
    format: Literal["diffusers", "lora", "peft", "transformer", "single-file", "delta"] = Field(
        "diffusers", description="layout of the export"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="precision of the network's weights; that of the base's own file if not given"
    )
    max_shard_size: str = Field(
        "10GB", pattern=r"^[1-9]\d*([KMGT]B)?$", description="largest file with weights, of the format diffusers"
    )
    take_off: bool = Field(False, description="take a delta off the model that it made")
    report: Path | None = Field(None, description="JSON report of `unforget verify`; the one beside the patch")
    force_rounding: bool = Field(False, description="write it although rounding loses the change")
    card: bool = Field(True, description="write a model card into folders")
    card_images: Path | None = Field(None, description="folder of pictures for the card")
    push_to_hub: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="repository owner/name to upload to"
    )
    private: bool = Field(True, description="make that repository private")

    @field_validator("dtype", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(str(value), value)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.take_off and self.format in ("lora", "peft", "delta"):
            raise ValueError(f"take_off goes with diffusers, transformer and single-file, not with {self.format}")
        if self.take_off and (len(self.patch) != 1 or self.scale not in ((), (1.0,))):
            raise ValueError("take_off takes one delta, whole")
        if self.format in ("transformer", "single-file") and self.output.suffix != ".safetensors":
            raise ValueError(f"output is a file that ends in .safetensors, found '{self.output}'")
        if self.format == "delta" and self.dtype is not None:
            raise ValueError("a delta holds bits, which have no other dtype")
        return self


C = TypeVar("C", bound=Config)


def build(kind: type[C], given: dict[str, Any], file: Path | None = None) -> C:
    """A checked configuration: what was given beats the TOML file, which beats the defaults.

    Raises:
        UsageError: One clause for every field that is wrong.
    """
    values = {**read(file), **stated(given)}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(sentence(error), f"See `unforget {COMMANDS.get(kind.__name__, '')} --help`.") from None


COMMANDS = {
    "EditConfig": "edit-surrogate",
    "UnlearnConfig": "unlearn",
    "ExportConfig": "export",
}


def recipe(name: str, kind: str = "ddpm", /, **changes: Any) -> Recipe:
    """A named recipe with some fields changed.

    Args:
        name: A recipe of that kind of family.
        kind: A key of `RECIPES`.
        changes: Fields of `Recipe`; `surgery` may be a kind, `weighting` a kind and `retain_weight` a number,
            which reach into the objective. None means unchanged.

    Raises:
        UsageError: If the name is unknown or a value is out of bounds.
    """
    known = RECIPES[kind]
    if name not in known:
        raise UsageError(f"there is no recipe '{name}'", f"Known: {', '.join(known)}.")
    values = known[name].model_dump()
    given = {k: v for k, v in changes.items() if v is not None}
    if "objective" in given:
        values["objective"] = {"kind": given.pop("objective")}
    if "surgery" in given:
        values["surgery"] = {"kind": given.pop("surgery")}
    if "weighting" in given:
        values["objective"]["weighting"] = {"kind": given.pop("weighting")}
    if "retain_weight" in given:
        values["objective"].setdefault("weighting", {"kind": "clean-space"})["retain"] = given.pop("retain_weight")
    try:
        return Recipe.model_validate({**values, **given})
    except ValidationError as error:
        raise UsageError(sentence(error), "See `unforget unlearn --help`.") from None


def stated(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {k: v for k, v in given.items() if v is not None and v != []}


def read(file: Path | None) -> dict[str, Any]:
    """A TOML file as a table; empty for none."""
    if file is None:
        return {}
    try:
        if file.stat().st_size > MAX_JSON:
            raise ValueError("too large")
        return tomllib.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"cannot read the configuration '{file}': {reason}", "Give a TOML file.") from None


def sentence(error: ValidationError) -> str:
    """One clause for every field that is wrong."""
    parts = []
    for problem in error.errors():
        where = ".".join(str(p) for p in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {text[0].lower()}{text[1:]}" if where else text)
        if where and problem["type"] not in ("missing", "extra_forbidden"):
            parts[-1] += f", found {problem['input']!r}"
    return "; ".join(parts)
