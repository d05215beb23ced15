"""From options, TOML files and policies to a checked configuration; and whether the paths that it names will do."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from unforget.config.base import Config, named, option_of
from unforget.config.verify import Policy, VerifyConfig
from unforget.errors import UsageError

C = TypeVar("C", bound=Config)
LARGEST = 64 << 20  # bytes from which on a TOML file is not read


def build(kind: type[C], given: Mapping[str, Any], file: Path | None = None) -> C:
    """A checked configuration: what was given beats the TOML file, which beats the defaults."""
    return kind(**{**read(file), **_stated(given)})


def resolve(given: Mapping[str, Any], file: Path | None = None, policy: Path | None = None) -> VerifyConfig:
    """`build` for `verify`: below the TOML file stands the policy, and below that the presets of the level.

    The policy is an `unforget.toml`, or a `pyproject.toml` with `[tool.unforget]`; the one in this folder if None.
    """
    agreed, given = read_policy(policy), _stated(given)
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
        if file.stat().st_size > LARGEST:
            raise ValueError("too large")
        return named({name.replace("-", "_"): value for name, value in tomllib.loads(file.read_text()).items()})
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"cannot read the configuration '{file}': {reason}", "Give a TOML file.") from None


def read_policy(path: Path | None) -> dict[str, Any]:
    """The keys that a policy sets, its paths made relative to its own folder."""
    found = path or next((p for p in (Path("unforget.toml"), Path("pyproject.toml")) if _holds(p)), None)
    if found is None:
        return {}
    table = read(found)
    table = table.get("tool", {}).get("unforget", {}) if found.name == "pyproject.toml" else table
    keys = table.get("verify", {})
    unknown = [*(set(table) - {"verify"}), *([] if isinstance(keys, dict) else ["verify"])]
    if unknown:
        raise UsageError(f"the policy '{found}' has no use for '{unknown[0]}'", "Its one table is [verify].")
    try:
        keys = named({name.replace("-", "_"): value for name, value in keys.items()})
        Policy(**keys)
    except (ValueError, UsageError) as error:
        raise UsageError(f"the policy '{found}' is wrong: {error}", "See docs/verify.md.") from None
    for name in keys:
        if option_of(Policy.model_fields[name]).reads:
            several = isinstance(keys[name], list)
            keys[name] = [found.parent / p for p in keys[name]] if several else found.parent / keys[name]
    return keys


def _holds(path: Path) -> bool:
    return path.is_file() and (path.name != "pyproject.toml" or "unforget" in read(path).get("tool", {}))


def check_paths(config: Config) -> None:
    """Refuse at once what cannot be read, or could not be written after the work."""
    for name, field in type(config).model_fields.items():
        option, value = option_of(field), getattr(config, name)
        for path in value if isinstance(value, tuple) else filter(None, [value]):
            if option.writes and not getattr(config, "resume", False):
                writable(path, getattr(config, "force", False))
            elif option.reads and not (path.is_dir() if option.reads == "folder" else path.is_file()):
                raise UsageError(f"there is no {option.reads} '{path}'", "Check the path.")


def writable(path: Path, force: bool) -> None:
    """Refuse before any work what could not be written after it: it exists, or its folder does not or is read-only."""
    if path.exists() and not force:
        raise UsageError(f"'{path}' exists", "Say --force to overwrite it, or give another --output.")
    home = path.parent
    if not home.is_dir():
        raise UsageError(f"there is no folder '{home}'", "Make it first.")
    if not os.access(home, os.W_OK):
        raise UsageError(f"the folder '{home}' cannot be written", "Give another --output.")
