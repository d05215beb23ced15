"""The program that the commands join, and what it says of itself."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from unforget import __version__

app = typer.Typer(
    name="unforget",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a diffusion model stop producing one picture, and prove it.",
    epilog="Exit codes: 0 done or passed, 1 still reproduced or too much lost, 2 wrong usage, 3 could not run, "
    "4 inconclusive, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


def values(local: dict[str, Any], *without: str) -> dict[str, Any]:
    """The options of a command body, from its `locals()`, less those that are not configuration."""
    return {k: v for k, v in local.items() if k not in without and not callable(v)}
