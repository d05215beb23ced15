"""From options, TOML files and policies to a checked configuration; and whether the paths that it names will do."""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from unforget.config.base import Config, named, option_of, real
from unforget.config.pictures import PICTURES, located
from unforget.config.verify import Policy, VerifyConfig
from unforget.errors import UsageError

C = TypeVar("C", bound=Config)
LARGEST = 2**19
"""Bytes of a TOML file that is read: each two may cost 1 KiB and 20 microseconds."""
DEEPEST = re.compile(r"""(?:(?<![\w-])(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""", re.ASCII)
"""A key of more parts than so many, which costs tomllib the square of them."""
PARTS = re.compile(r".*\.(safetensors|bin|model)|(.*[_.])?(config|index|tokenizer|vocab|unforget)\.json|merges\.txt")
"""Files of a folder that is read, of a model: other outputs may lie there, too."""


def build(kind: type[C], given: Mapping[str, Any], file: Path | None = None) -> C:
    """A checked configuration: what was given beats the TOML file, which beats the defaults."""
    return kind(**{**read(file), **_stated(given)})


def resolve(given: Mapping[str, Any], file: Path | None = None, policy: Path | None = None) -> VerifyConfig:
    """`build` for `verify`: below the TOML file stands the policy, and below that the presets of the level.

    The policy is an `unforget.toml`, or a `pyproject.toml` with `[tool.unforget]`; the one in this folder if None.
    """
    agreed, given = read_policy(policy_file(policy)), _stated(given)
    if "target" in given:
        agreed.pop("surrogate", None)  # the policy's belong to its own targets
    return VerifyConfig(**{**agreed, **read(file), **given})


def _stated(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in given.items() if v is not None and v != []}


def read(file: Path | None) -> dict[str, Any]:
    """A TOML file as a table, its keys spelt as fields; empty for none."""
    if file is None:
        return {}
    try:
        if file.exists() and not file.is_file():  # a pipe would keep us waiting
            raise ValueError("it is no file")
        with file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        if len(content) > LARGEST or DEEPEST.search(text):
            raise ValueError("too large" if len(content) > LARGEST else "a key has more than 32 parts")
        return named(tomllib.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"cannot read the configuration '{file}': {reason}", "Give a TOML file.") from None


def policy_file(given: Path | None) -> Path | None:
    """The policy that was given, or the one in this folder, if there is one."""
    return given or next((p for p in (Path("unforget.toml"), Path("pyproject.toml")) if _holds(p)), None)


def read_policy(found: Path | None) -> dict[str, Any]:
    """The keys that a policy sets, its paths made relative to its own folder."""
    if found is None:
        return {}
    said = _ours(found, {})
    table = said if isinstance(said, dict) else {"unforget": said}
    keys = table.get("verify", {})
    unknown = [*(set(table) - {"verify"}), *([] if isinstance(keys, dict) else ["verify"])]
    if unknown:
        raise UsageError(f"the policy '{found}' has no use for '{unknown[0]}'", "Its one table is [verify].")
    try:
        keys = named(keys)
        Policy(**keys)
    except (ValueError, UsageError) as error:
        raise UsageError(f"the policy '{found}' is wrong: {error}", "See docs/verify.md.") from None
    for name in keys:
        if option_of(Policy.model_fields[name]).reads:
            several = isinstance(keys[name], list)
            paths = [located(Path(p), found.parent) for p in (keys[name] if several else [keys[name]])]
            keys[name] = paths if several else paths[0]
    return keys


def _holds(path: Path) -> bool:
    return path.is_file() and (path.name != "pyproject.toml" or _ours(path, None) is not None)


def _ours(path: Path, otherwise: Any) -> Any:
    """All of a policy, or what a `pyproject.toml` has for us; `otherwise` if that is nothing."""
    table = read(path)
    if path.name != "pyproject.toml":
        return table
    tools = table.get("tool")
    return tools.get("unforget", otherwise) if isinstance(tools, dict) else otherwise


def check_paths(config: Config, *read: Path | None) -> None:
    """Refuse at once what cannot be read, or could not be written after the work; `read` are inputs beside its own."""
    try:
        _check_paths(config, *read)
    except OSError as error:  # a name that is too long, or links that go round
        raise UsageError(f"'{error.filename}' is no path: {error.strerror}", "Give another.") from None


def _check_paths(config: Config, *read: Path | None) -> None:
    inputs = [*_inputs(config), *(path for path in read if path is not None)]
    force, resume = getattr(config, "force", False), getattr(config, "resume", False)
    known: list[Path] = []
    for path, kind in outputs(config):
        real(path)
        for other in known:
            if _same(path, other):
                raise UsageError(f"'{path}' would be written twice", "Give each output a name of its own.")
        for given in inputs:
            if _would_replace(path, kind, given):
                raise UsageError(f"'{path}' would replace '{given}', which is read", "Give another output.")
        writable(path, force or resume or kind in ("run", "part"), kind)
        known.append(path)


def outputs(config: Config) -> list[tuple[Path, str]]:
    """What a command writes, and what each is, as in `Option.writes`."""
    fields = type(config).model_fields.items()
    named = [(getattr(config, name), option_of(field).writes) for name, field in fields if option_of(field).writes]
    return [(path, kind) for path, kind in named if path is not None] + list(config.written_beside().items())


def _inputs(config: Config) -> list[Path]:
    """What a command reads, as far as it lies here; UsageError for a file or folder that does not."""
    found = []
    for name, field in type(config).model_fields.items():
        what, value = option_of(field).reads, getattr(config, name)
        for path in (value if isinstance(value, tuple) else filter(None, [value])) if what else ():
            if not (path.is_dir() if what == "folder" else path.is_file()):
                raise _absent(path, what)
            found.append(path)
    more = [getattr(config, name, None) for name in ("model", "candidate", "pipeline_config", "editor_model")]
    more += [text.partition("=")[2] for text in getattr(config, "similarity", ())]
    return found + [Path(ref) for ref in more if ref and Path(ref).exists()]


def _absent(path: Path, what: str) -> UsageError:
    """What is said of an input that is not there, or is something else."""
    if not path.exists():
        return UsageError(f"there is no {what} '{path}'", "Check the path.")
    kind, hint = "file" if path.is_file() else "folder", "Check the path."
    if what == "patch":
        hint = "Give the file that `unforget unlearn` wrote; `verify --candidate` takes an export."
    return UsageError(f"'{path}' is a {kind}, and is to be a {what}", hint)


def _would_replace(output: Path, kind: str, given: Path) -> bool:
    """Whether writing loses an input: the file itself, one in the folder of a run, a part of a model, a picture."""
    if _same(output, given):
        return True
    if kind == "run":
        return real(output) in real(given).parents
    inside = output.is_file() and given.is_dir() and real(given) in real(output).parents
    if (given / "model_index.json").exists():
        return inside and PARTS.fullmatch(output.name) is not None
    return inside and output.suffix.lower() in PICTURES


def _same(one: Path, other: Path) -> bool:
    return real(one) == real(other) or (one.exists() and other.exists() and one.samefile(other))


def writable(path: Path, force: bool, kind: str = "file") -> None:
    """Refuse before any work what could not be written after it; `kind` is as in `Option.writes`.

    It exists, is a folder where a file is to be or a file where a folder is, or its folder is missing or read-only.
    """
    file = kind in ("file", "appended") or (kind == "either" and path.suffix == ".safetensors")
    if (file and path.is_dir()) or not path.name:
        raise UsageError(f"'{path}' is a folder", f"Give the name of a {'file' if file else 'new folder'}.")
    if kind in ("folder", "run") and path.exists() and not path.is_dir():
        raise UsageError(f"'{path}' is a file, and is to be a folder", "Give another name.")
    if kind != "appended" and path.exists() and not (path.is_file() or path.is_dir()):
        raise UsageError(f"'{path}' is no file, but a device or a pipe", "Give the name of a file.")
    if kind != "appended" and path.exists() and not force:
        raise UsageError(f"'{path}' exists", "Say --force to overwrite it, or give another name.")
    home = path.parent
    if kind == "part" and not home.exists():  # it is made with the folder
        return
    if not home.is_dir():
        raise UsageError(f"there is no folder '{home}'", "Make it first.")
    if kind == "appended" and path.exists():
        if not os.access(path, os.W_OK):
            raise UsageError(f"'{path}' cannot be written", "Give another file.")
        return
    _try_to_write(path)


def _try_to_write(path: Path) -> None:
    """Make a file beside it and remove it: what rights, mounts and lengths of names allow is told by nothing else."""
    trial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with trial.open("xb"):
            pass
        trial.unlink()
    except FileExistsError:
        return
    except OSError as error:
        reason = f"'{path.name}' cannot be written into '{path.parent}': {error.strerror}"
        raise UsageError(reason, "Give another name.") from None
