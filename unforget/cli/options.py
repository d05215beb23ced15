"""From the fields of a configuration to the options of a command: names, types, choices, defaults and help."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
import typer.core

from unforget.cli.console import errors, old_names, voice
from unforget.errors import UsageError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from unforget.config import Config

BODIES: dict[str, tuple[Callable[..., None], str]] = {}
"""The body of each command whose options are generated, and the name of its configuration."""
SETTINGS = {
    "help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-"),
    "max_content_width": 100,
}  # fmt: skip
"""An option may be written with underscores, as in diffusers' scripts."""
TYPES = (bool, Path)  # what Typer parses; the rest is text until the configuration is checked
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file, its keys the names of these options, which beat it.")]
NEARBY = "unforget.toml or pyproject.toml in this folder"
PolicyFile = Annotated[Path | None, typer.Option(help="What your team agreed on.", show_default=NEARBY)]


def _voice(context: typer.Context, option: typer.CallbackParam, wanted: bool) -> None:
    setattr(voice, str(option.name), wanted)
    if voice.verbose:  # before they are imported
        os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "warning"


Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_voice, help="Say nothing but the result and notes.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", callback=_voice, help="Say more: figures, and what the libraries warn of.")
]


class Commands(typer.core.TyperGroup):
    """Generates the options of a command when it is run, so that `unforget --help` loads no configuration."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        if name not in BODIES:
            return name, found, rest
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name, cls=Command, context_settings=SETTINGS)(_generated(*BODIES[name]))
        return name, typer.main.get_command(single), rest

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        self._args = tuple(args)
        with errors(self._args):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse what follows and run the command: whatever comes of it has one of our exit codes."""
        with errors(self._args):
            try:
                return super().invoke(ctx)
            except SystemExit as left:  # no command of ours leaves so: its code would pass for a verdict
                raise RuntimeError("a library ended the program") from left


class Command(typer.core.TyperCommand):
    """Takes the options of earlier versions for the new ones; lists options under the headings that they name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            panels.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).extend([row] if row else [])
        for heading, rows in panels.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from unforget.config.base import current, spelled

        known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        words = list(args)
        with old_names():
            for k, word in enumerate(args):
                name, given, value = word.partition("=")
                name = name.replace("_", "-")
                if name.startswith("--") and name not in known:
                    try:
                        words[k] = spelled(current(name[2:].replace("-", "_"), spelled)) + given + value
                    except ValueError as error:
                        raise UsageError(str(error), f"See `{ctx.command_path} --help`.") from None
        return super().parse_args(ctx, words)


def command(app: typer.Typer, name: str, config: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command whose options are the fields of a configuration, and what its body has as keywords beside."""

    def add(body: Callable[..., None]) -> Callable[..., None]:
        BODIES[name] = body, config
        app.command(name, help=body.__doc__)(lambda: None)
        return body

    return add


def _generated(body: Callable[..., None], config: str) -> Callable[..., None]:
    """A function with the signature that Typer makes the command of; it calls the body with the configuration."""
    from unforget.config.base import option_of

    model: type[Config] = getattr(import_module("unforget.config"), config)
    known = model.model_fields
    fields = {n: _parameter(model, n) for n in _ordered(model) if not option_of(known[n]).hidden}
    more = {n: p for n, p in inspect.signature(body, eval_str=True).parameters.items() if p.kind is p.KEYWORD_ONLY}

    def run(ctx: typer.Context, **values: Any) -> None:
        given = {n: values[n] for n in fields if getattr(ctx.get_parameter_source(n), "name", "") != "DEFAULT"}
        with old_names():
            config = _checked(model, given, values["config"], values.get("policy"))
        body(config, **{n: values[n] for n in more})

    parameters = [_keyword("ctx", typer.Context, inspect.Parameter.empty), *fields.values()]
    parameters += [_keyword("config", ConfigFile), *more.values()]
    parameters += [_keyword("quiet", Quiet, False), _keyword("verbose", Verbose, False)]
    parameters += [_keyword("policy", PolicyFile)] if config == "VerifyConfig" else []
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = body.__doc__
    return run


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _checked(model: type[Config], given: dict[str, Any], file: Path | None, policy: Path | None) -> Any:
    """The configuration that was given, sound as far as can be told without heavy imports."""
    from unforget import config as configs
    from unforget.verification.probes import KINDS

    judges = model is configs.VerifyConfig
    made: Any = configs.resolve(given, file, policy) if judges else configs.build(model, given, file)
    for kind in made.require if judges else ():
        if kind not in KINDS:
            raise UsageError(f"there is no probe '{kind}'", f"Give one of {', '.join(KINDS)}.")
    configs.check_paths(made, file, configs.policy_file(policy) if judges else None)
    return made


def _ordered(model: type[Config]) -> list[str]:
    """The fields, what is required first, then what the command has of its own."""
    names = dict.fromkeys(
        n for c in model.__mro__ for n in vars(c).get("__annotations__", {}) if n in model.model_fields
    )
    return sorted(names, key=lambda name: not model.model_fields[name].is_required())


def _parameter(model: type[Config], name: str) -> inspect.Parameter:
    """The option of a field."""
    from unforget.config.base import item, option_of, plain, spelled

    field = model.model_fields[name]
    said, several, kind, flag = option_of(field), item(field.annotation), plain(field.annotation), spelled(name)
    single = several or kind
    typed: Any = single if single in TYPES else str
    panel = next(vars(c).get("PANEL") for c in reversed(model.__mro__) if name in vars(c).get("__annotations__", {}))
    choices = _choices(name, single)

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    info = typer.Option(
        f"{flag}/--no-{flag[2:]}" if typed is bool else flag, *said.names, help=_help(field),
        show_default=not field.is_required() and (said.words or True),
        metavar=None if typed is bool else _metavar(single, choices), rich_help_panel=said.panel or panel or None,
        autocompletion=complete if choices else None,
    )  # fmt: skip
    default = None if said.words or field.default_factory or field.is_required() else field.default
    default = list(default) if several and default else default
    return _keyword(name, Annotated[(list[typed] if several else typed) | None, info], default)


def _help(field: FieldInfo) -> str:
    """What the field says, and when the option may be given."""
    from unforget.config.base import option_of, spelled

    which, *kinds = option_of(field).of or ("",)
    parts = [str(field.description)]
    parts += [f"Only for {spelled(which)} {' or '.join(kinds)}."] if which else []
    return " ".join([*parts, "[required]"] if field.is_required() else parts)


def _metavar(kind: Any, choices: tuple[str, ...]) -> str:
    """What stands for one value."""
    if choices:
        return f"[{'|'.join(choices)}]"
    parts = get_args(kind) if get_origin(kind) is tuple else (kind,)
    return f"<{','.join(part.__name__ for part in parts).lower()}>"


def _choices(name: str, kind: Any) -> tuple[str, ...]:
    if name == "require":
        from unforget.verification.probes import KINDS

        return KINDS
    return get_args(kind) if get_origin(kind) is Literal else ()
