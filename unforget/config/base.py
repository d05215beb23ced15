"""What the configurations share: how a field says more of its option, and the fields of several commands."""

import difflib
import errno
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from unforget.errors import UsageError

MACHINE, DANGER = "This machine", "Dangerous options"
RENAMED = {
    "false_alarm": "false_positive_rate", "noise_level": "timestep", "noise_levels": "timestep",
    "preview": "num_validation_images", "keep": "must_retain", "required": "require",
    "forget_batch_size": "train_batch_size", "editor": "method", "public": "no_private", "take_off": "",
}  # fmt: skip
"""Names that earlier versions had, and what they are now; nothing for what is gone."""
NO_DELTA = "there are no deltas any more: a LoRA comes off by itself, for anything else keep the base"


@dataclass(frozen=True)
class Option:
    """What a field says of its option beside its name, type, bounds, default and description."""

    words: str = ""  # the default in words, where it is no value
    names: tuple[str, ...] = ()  # more spellings
    panel: str = ""  # heading of the help under which it stands; that of its class if empty
    of: tuple[str, ...] = ()  # the field that chooses a strategy, and the choices that have this option
    reads: str = ""  # what must lie at the path: file, folder, patch
    writes: str = ""  # what is written there: a file, a folder, either, or a file that is appended to
    hidden: bool = False  # whether only files and Python can say it


def option(description: str, default: Any = ..., words: str = "", **more: Any) -> Any:
    """A field and its `Option`: `more` are its attributes, and bounds for pydantic.

    A callable default is computed from the fields before it.
    """
    said: Any = Option(words, **{k: v for k, v in more.items() if k in Option.__dataclass_fields__})
    bounds = {k: v for k, v in more.items() if k not in Option.__dataclass_fields__}
    given: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return Field(**given, description=description, json_schema_extra={"option": said}, **bounds)


def option_of(field: FieldInfo) -> Option:
    """What a field says of its option."""
    extra: Any = field.json_schema_extra or {"option": Option()}
    return extra["option"]  # type: ignore[no-any-return]


def plain(annotation: Any) -> Any:
    """A type without None and without what is annotated to it."""
    while get_origin(annotation) in (Annotated, Union, UnionType):
        annotation = next(a for a in get_args(annotation) if a is not NoneType)
    return annotation


def item(annotation: Any) -> Any:
    """The type of one of several values (`tuple[X, ...]`); None for a type that is not several."""
    args = get_args(plain(annotation))
    return plain(args[0]) if get_origin(plain(annotation)) is tuple and args[-1] is Ellipsis else None


def spelled(name: str) -> str:
    """A field's name as an option."""
    return "--" + name.replace("_", "-")


def current(name: str, spell: Callable[[str], str] = str) -> str:
    """The name that a field has now, with a warning if it was another; ValueError for one that is gone."""
    if name not in RENAMED:
        return name
    if not RENAMED[name]:
        raise ValueError(f"{spell(name)} is gone: {NO_DELTA}")
    warnings.warn(f"{spell(name)} is now {spell(RENAMED[name])}; the old name will go", FutureWarning, stacklevel=2)
    return RENAMED[name]


def named(values: Mapping[str, Any], fields: Collection[str] = ()) -> dict[str, Any]:
    """Values by the names that fields have now, dashes as in options; ValueError if one is gone, or given twice."""
    found = {name if name in fields else current(name.replace("-", "_")): value for name, value in values.items()}
    if len(found) < len(values):
        raise ValueError("an option is given twice, by two of its names")
    return found


def _sentence(error: ValidationError, kind: type[BaseModel]) -> str:
    """One clause for every field that is wrong, and for an unknown one the nearest name."""
    parts, problems = [], error.errors()
    wrong = {problem["loc"] for problem in problems}
    for problem in problems:
        loc, where = problem["loc"], ".".join(str(p) for p in problem["loc"])
        if problem["type"] == "default_factory_not_called" or any(o[: len(loc)] == loc != o for o in wrong if loc):
            continue  # of an output whose target is wrong, or of all values where one of them is: said already
        text = problem["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {text[0].lower()}{text[1:]}" if where else text)
        if problem["type"] == "extra_forbidden":
            near = [name for name, field in kind.model_fields.items() if spelled(where) in option_of(field).names]
            near = near or difflib.get_close_matches(where, kind.model_fields, 1)
            parts[-1] = f"there is no option '{where}'" + (f", did you mean '{near[0]}'?" if near else "")
        elif problem["type"] == "missing":
            parts[-1] = f"{where} is missing"
        elif where and (problem["type"] != "value_error" or str(_plain(problem["input"])) not in text):
            parts[-1] += f", found {_plain(problem['input'])!r}"
    return "; ".join(parts)


def _plain(value: Any) -> Any:
    """A value as it was given: a path is its name."""
    if isinstance(value, (list, tuple)):
        return _plain(value[0]) if len(value) == 1 else [_plain(v) for v in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class Config(BaseModel):
    """Frozen, and strict about unknown keys: UsageError names what is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    PANEL: ClassVar[str] = ""
    COMMAND: ClassVar[str] = ""  # that has these options

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            hint = f"See `unforget {self.COMMAND} --help`." if self.COMMAND else ""
            raise UsageError(_sentence(error, type(self)), hint) from None

    @model_validator(mode="before")
    @classmethod
    def _written(cls, values: Any) -> Any:
        """One value stands for several, and `1,2,3` for a tuple, as on a command line; an old name for the new one."""
        if not isinstance(values, dict):
            return values
        given = named(values, cls.model_fields)
        return {n: _tupled(cls.model_fields[n], v) if n in cls.model_fields else v for n, v in given.items()}

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        # No path holds a NUL, nor does anything else that a command line can say.
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, (str, Path)) and "\0" in str(one):
                raise ValueError("a text holds a NUL")
        return value

    @model_validator(mode="after")
    def _belonging(self) -> Self:
        chosen = (option_of(f).of[0] for f in type(self).model_fields.values() if option_of(f).of)
        if wrong := self.misplaced({name: getattr(self, name) for name in chosen}):
            raise ValueError(wrong)
        return self

    def written_beside(self) -> dict[Path, str]:
        """What is written although no option names it, and what that is, as in `Option.writes`."""
        return {}

    def misplaced(self, chosen: Mapping[str, str | None]) -> str:
        """A sentence about an option that was given and that its chosen strategy does not have; empty if all fit."""
        for name in type(self).model_fields:
            which, *kinds = option_of(type(self).model_fields[name]).of or ("",)
            given = name in self.model_fields_set and getattr(self, name) not in (None, ())
            if given and chosen.get(which) is not None and chosen[which] not in kinds:
                return f"{spelled(name)} belongs to {spelled(which)} {' or '.join(kinds)}, not to {chosen[which]}"
        return ""


def _tupled(field: FieldInfo, value: Any) -> Any:
    kind = plain(field.annotation)
    if get_origin(kind) is not tuple:
        return value
    if item(kind) is None:
        return value.split(",") if isinstance(value, str) else value
    return () if value is None else value if isinstance(value, (list, tuple)) else (value,)


class ModelConfig(Config):
    """What every command asks about the model and the machine."""

    model: str = option(
        "Model: a name that `unforget models` lists, a diffusers folder, a .safetensors file, or a hub id "
        "owner/name[@revision].",
        names=("-m", "--pretrained-model-name-or-path"),
    )
    pipeline_config: Path | None = option(
        "Diffusers folder, weights not needed, or hub id that says what a single file holds.", None, "none"
    )
    text_encoder: tuple[Path, ...] = option(
        "File of a text encoder that a single file lacks (clip_l, clip_g, t5xxl); repeats.", (), "none", reads="file"
    )
    t5: bool = option("Load the third text encoder, where the model has one.", True)
    resolution: int | None = option(
        "Width and height of images of a text-to-image model.", None, "the model's", ge=8, le=8192
    )
    guidance: float | None = option(
        "Classifier-free guidance of every draw.", None, "the model's, or 7", names=("--guidance-scale",), ge=1, le=100
    )
    seed: int = option("Seed of every random draw.", 0, ge=0, lt=2**31)
    force: bool = option("Overwrite what exists.", False)
    device: str = option(
        "Where to compute: cpu, cuda, cuda:1, mps, xpu, or auto: a card if there is one.", "auto", panel=MACHINE
    )
    cpu_offload: bool | None = option(
        "Keep the network's weights in the host's memory, each layer's on the card while it computes.", None,
        "only if they do not fit the card", panel=MACHINE,
    )  # fmt: skip
    threads: int | None = option("CPU threads.", None, "all cores", panel=MACHINE, ge=1, le=1024)
    allow_pickle: bool = option(
        "Also open pickled .bin weights; only from sources that you trust.", False, panel=DANGER
    )

    @field_validator("model", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value


class PromptConfig(Config):
    """What commands ask about prompts."""

    prompt: tuple[str, ...] = option(
        "Prompt under which the model draws the target; repeats.", (), "none, or those of the patch", names=("-p",)
    )
    retain_prompts: Path | None = option(
        "Text file, one prompt a line, for what must stay.", None, "the model's, or a built-in list", reads="file"
    )


class ImageConfig(PromptConfig, ModelConfig):
    """What commands ask that read images."""

    resize: bool = option("Crop and scale images to the model's size.", False)


class DrawConfig(ImageConfig):
    """What commands ask that make surrogates."""

    retain_count: int | None = option(
        "Number of images to draw from the base, to be retained.", None,
        "192, more for many prompts; 64 from 512 px on", ge=8, le=100_000,
    )  # fmt: skip
    sampler_steps: int = option("Sampler steps of those images.", 20, ge=2, le=1000)
    near_copy: float = option("RMS at 80 px under which two images are the same one, in [-1, 1].", 0.16, gt=0, lt=2)
    allow_near_copy: bool = option("Take a surrogate although it is a near-copy, by --near-copy.", False)
    min_distance: float = option("Least RMS of a made surrogate to its target.", 0.2, gt=0, lt=2)


class PatchedConfig(ModelConfig):
    """What commands ask that take patches."""

    patch: tuple[Path, ...] = option("Patch to put on the base; repeats, in order.", (), "none", reads="patch")
    scale: tuple[float, ...] = option("Share of each patch, in the same order.", (), "1 for each")

    @field_validator("scale")
    @classmethod
    def _bounded(cls, scale: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < abs(s) <= 100 for s in scale):
            raise ValueError("a scale is a number other than 0, between -100 and 100")
        return scale

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if self.scale and len(self.scale) != len(self.patch):
            raise ValueError(f"{len(self.patch)} patch(es) but {len(self.scale)} scale(s)")
        return self


def paired(target: tuple[Path, ...], surrogate: tuple[Path, ...]) -> None:
    """Refuse surrogates that are not one a target."""
    if surrogate and len(surrogate) != len(target):
        raise ValueError(f"{len(target)} target(s) but {len(surrogate)} surrogate(s)")


def real(path: Path) -> Path:
    """Where a path leads, without links; OSError for links in a circle, on every version of Python."""
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return found


def run_folder(patch: Path) -> Path:
    """Where the run of a patch lies: face.patch has face.run; whatever else it is called, face-1.0 has face-1.0.run."""
    return patch.with_suffix(".run") if patch.suffix == ".patch" else patch.parent / f"{patch.name}.run"


def beside(field: str, suffix: str) -> Callable[[dict[str, Any]], Path]:
    """The default of an output: the first of a field's paths, in this folder, with another suffix."""

    def path(data: dict[str, Any]) -> Path:
        given = data.get(field)  # absent if it is wrong, which pydantic before 2.11 asks about all the same
        first = given[0] if isinstance(given, tuple) else given
        return Path(first.stem + suffix) if first else Path()

    return path
