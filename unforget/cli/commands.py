"""The commands. Each takes the options that were given, makes a configuration of them, and calls the function of its
name; nothing heavy is imported before the configuration is known to be sound."""

from pathlib import Path
from typing import Annotated, Any

import typer

from unforget import __version__
from unforget.cli.console import (
    before_after,
    candidates_table,
    checks_table,
    console_progress,
    err,
    errors,
    leave,
    out,
    print_json,
    shown,
)  # fmt: skip
from unforget.cli.options import SETTINGS, Commands, command
from unforget.errors import UsageError

Given = dict[str, Any]
ConfigFile = Annotated[Path | None, typer.Option(help="TOML file, its keys the names of these options, which beat it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

app = typer.Typer(
    name="unforget", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings=SETTINGS, help="Make a diffusion model stop producing one image, and prove it.",
    epilog="Exit codes: 0 done or passed, 1 still reproduced or too much lost, 2 wrong usage, 3 could not run, "
    "4 inconclusive, 130 interrupted. Options may be spelt with underscores, too, as in diffusers' scripts.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@command(app, "edit-surrogate", "EditConfig")
def edit_surrogate(given: Given, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Make a surrogate: an image near the target that is another instance.

    Writes the best candidate, and beside it a contact sheet of all (FILE.sheet.png).

    Example: unforget edit-surrogate --model faces --target face.png -o face.surrogate.png
    """
    from unforget.config import EditConfig, build, check_paths

    resolved = build(EditConfig, given, config)
    check_paths(resolved)
    from unforget import api

    with console_progress() as progress:
        result = api.edit_surrogate(resolved, progress)
    if as_json:
        print_json(vars(result))
    else:
        err.print(candidates_table(result.candidates))
        err.print(f"All candidates: {result.sheet}; take another with --pick N --force.")
        typer.echo(str(result.output))


@command(app, "unlearn", "UnlearnConfig")
def unlearn(
    given: Given, *, config: ConfigFile = None, as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print configuration and memory plan, and stop.")] = False,
) -> None:  # fmt: skip
    """Make the model generate a surrogate instead of the target.

    Writes a patch, and beside it a folder (NAME.run) with the log, the surrogate and a contact sheet.

    Example: unforget unlearn --model faces --target face.png -o face.patch
    """
    from unforget.config import RecipeOptions, UnlearnConfig, build, check_paths

    resolved = build(UnlearnConfig, given, config)
    check_paths(resolved)
    from unforget import api

    if dry_run:
        recipe = api.recipe_of(resolved).model_dump(mode="json")
        rest = resolved.model_dump(mode="json", exclude=set(RecipeOptions.model_fields))
        print_json({**rest, "recipe": recipe, "memory_gib": api.memory_plan(resolved)})
        return
    with console_progress() as progress:
        result = api.unlearn(resolved, progress)
    if as_json:
        print_json(vars(result))
    else:
        err.print(before_after(result.table))
        err.print(
            f"{result.steps} steps, stopped by {result.stopped}; same-seed drift: "
            f"median {result.drift['median']:.3f}. Look at {result.folder / 'sheet.png'}."
        )
        if not result.forgotten:
            err.print("[red]The target is still generated.[/] Raise --max-train-steps or lower --retain-weight.")
        typer.echo(str(result.output))
    leave(api.EXIT_UNLEARN[result.forgotten])


@command(app, "verify", "VerifyConfig")
def verify(
    given: Given, *, config: ConfigFile = None, as_json: AsJson = False,
    policy: Annotated[
        Path | None,
        typer.Option(help="What your team agreed on.", show_default="unforget.toml or pyproject.toml in this folder"),
    ] = None,
) -> None:  # fmt: skip
    """Judge a patch or a checkpoint: is the target gone, is the rest still there?

    Passing is evidence, never a certificate.

    Example: unforget verify --model faces --patch face.patch --report report.json --html report.html
    """
    from unforget.config import check_paths, resolve
    from unforget.verification.probes import KINDS

    resolved = resolve(given, config, policy)
    for kind in resolved.require:
        if kind not in KINDS:
            raise UsageError(f"there is no probe '{kind}'", f"Give one of {', '.join(KINDS)}.")
    check_paths(resolved)
    from unforget import api

    with console_progress() as progress:
        result = api.verify(resolved, progress)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        err.print(checks_table(result))
        for noted in result.robustness:
            err.print(f"{noted.target[:8]} {noted.probe}: {noted.sentence}", soft_wrap=True)
        typer.echo(f"{result.verdict}: {result.summary}")
    leave(result.exit_code)


@command(app, "export", "ExportConfig")
def export(given: Given, *, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """Write the base with patches on in a form that stock loaders open.

    It is opened and compared, weights and an image, before the command says done.

    Example: unforget export --model faces --patch face.patch -o faces-patched
    """
    from unforget.config import ExportConfig, build, check_paths

    resolved = build(ExportConfig, given, config)
    check_paths(resolved)
    from unforget import api

    with console_progress() as progress:
        done = api.export(resolved, progress)
    if as_json:
        print_json({"output": str(done.output), "url": done.url, **done.manifest.model_dump(mode="json")})
    else:
        typer.echo(done.url or str(done.output))


@app.command(context_settings=SETTINGS)
def show(
    path: Annotated[Path, typer.Argument(help="Patch, exported file or folder, or any .safetensors file.")],
    as_json: AsJson = False,
) -> None:
    """Say where a patch or an export came from: base, targets (by digest), recipe, rounding, verdict, versions.

    Example: unforget show face.patch
    """
    with errors():
        from unforget.api import show as look

        found = look(path)
        if as_json:
            print_json(found.said)
        else:
            out.print(shown(found))
