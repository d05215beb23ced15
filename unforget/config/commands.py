"""The command line that a configuration came from, or another that goes with it."""

import shlex
from collections.abc import Collection
from pathlib import Path

from unforget.config.base import Config, item, spelled


def command_line(config: Config, fields: Collection[str], command: str = "", **more: str | int | Path) -> str:
    """A command with those of the fields that were given, as options; `more` are options of its own.

    It is that of the configuration, unless another is named.
    """
    words = ["unforget", command or config.COMMAND]
    for name in fields:
        value = getattr(config, name) if name in config.model_fields_set else None
        if isinstance(value, bool):
            words.append(spelled(name if value else f"no_{name}"))
        elif value is not None:
            several = item(type(config).model_fields[name].annotation) is not None
            words += [word for one in (value if several else [value]) for word in (spelled(name), _said(one))]
    return shlex.join([*words, *(word for n, value in more.items() for word in (spelled(n), str(value)))])


def _said(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
