"""The commands. Each calls the function of its name with the configuration that its options make; nothing heavy is
imported before that is known to be sound."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from unforget import __version__
from unforget.cli import console
from unforget.cli.options import SETTINGS, Commands, command

if TYPE_CHECKING:
    from unforget.api import Unlearned
    from unforget.verification.report import Report

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the configuration and its cost (memory, passes, time), and stop.")
]

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
def edit_surrogate(config: Any, *, as_json: AsJson = False) -> None:
    """Make a surrogate: an image near the target that is another instance.

    Writes the best candidate, and beside it a contact sheet of all (FILE.sheet.png).

    Example: unforget edit-surrogate --model faces --target face.png -o face.surrogate.png
    """
    from unforget import api

    with console.console_progress() as progress:
        result = api.edit_surrogate(config, progress)
    if as_json:
        console.print_json(vars(result))
    else:
        console.err.print(console.candidates_table(result.candidates))
        console.err.print(f"All candidates: {escape(str(result.sheet))}; take another with --pick N --force.")
        console.say(str(result.output))


@command(app, "unlearn", "UnlearnConfig")
def unlearn(
    config: Any, *, as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Make the model generate a surrogate instead of the target.

    Writes a patch, and beside it a folder (NAME.run) with the log, the surrogate and a contact sheet.

    Example: unforget unlearn --model faces --target face.png -o face.patch
    """
    from unforget import api
    from unforget.config import RecipeOptions

    if dry_run:
        recipe = api.recipe_of(config).model_dump(mode="json")
        rest = config.model_dump(mode="json", exclude=set(RecipeOptions.model_fields))
        plan = api.plan_unlearn(config)
        console.err.print(console.costs_table(plan))
        console.print_json({**rest, "recipe": recipe, **plan})
        return
    with console.console_progress() as progress:
        result = api.unlearn(config, progress)
    with console.whatever_fails():
        _tell(result, as_json)
    console.leave(result.code)


def _tell(result: Unlearned, as_json: bool) -> None:
    if as_json:
        console.print_json(vars(result))
    else:
        console.err.print(console.before_after(result.table))
        console.err.print(
            f"{result.steps} steps, stopped by {result.stopped}; same-seed drift: "
            f"median {result.drift['median']:.3f}. Look at {escape(str(result.folder / 'sheet.png'))}."
        )
        for row in result.drawn:
            console.err.print(console.drawn(row), soft_wrap=True)
        if not result.forgotten:
            console.err.print(
                "[red]The target is still generated.[/] Raise --max-train-steps or lower --retain-weight."
            )
        elif not result.replaced:
            console.err.print(
                "[red]The target is gone, but something else than the surrogate is drawn.[/] Raise --max-train-steps, "
                "or give a --surrogate that the model can draw: look at the sheet."
            )
        console.say(str(result.output))


@command(app, "verify", "VerifyConfig")
def verify(config: Any, *, as_json: AsJson = False, dry_run: DryRun = False) -> None:
    """Judge a patch or a checkpoint: is the target gone, is the rest still there?

    Passing is evidence, never a certificate.

    Example: unforget verify --model faces --patch face.patch --report report.json --html report.html
    """
    from unforget import api

    if dry_run:
        plan = api.plan_verify(config)
        console.err.print(console.costs_table(plan))
        console.print_json({**config.model_dump(mode="json"), **plan})
        return
    with ExitStack() as bar:
        progress = bar.enter_context(console.console_progress())

        def tell(result: Report) -> None:
            bar.close()
            with console.whatever_fails():
                _judged(result, as_json)

        result = api.verify(config, progress, tell)
    console.leave(result.exit_code)


def _judged(result: Report, as_json: bool) -> None:
    from unforget.reports import words

    if as_json:
        console.say(result.text())
    else:
        console.err.print(console.checks_table(result))
        for noted in result.robustness:
            console.err.print(escape(f"{noted.target[:8]} {noted.probe}: {noted.sentence}"), soft_wrap=True)
        console.say(f"{result.verdict}: {result.summary}")
        for sentence in words.rates(result):
            console.say(sentence)
        console.say(", ".join(f"{name} {value}" for name, value in words.facts(result).items()))


@command(app, "export", "ExportConfig")
def export(config: Any, *, as_json: AsJson = False) -> None:
    """Write the base with patches on in a form that stock loaders open.

    It is opened and compared, weights and an image, before the command says done.

    Example: unforget export --model faces --patch face.patch -o faces-patched
    """
    from unforget import api

    with console.console_progress() as progress:
        done = api.export(config, progress)
    if as_json:
        console.print_json({"output": str(done.output), "url": done.url, **done.manifest.model_dump(mode="json")})
    else:
        console.say(done.url or str(done.output))


@app.command(context_settings=SETTINGS)
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all entries.")] = False, as_json: AsJson = False
) -> None:
    """Say where the cache lies, what it holds, and how much it may.

    It holds images that models drew, perhaps targets among them, and figures. $UNFORGET_CACHE says where it lies,
    $UNFORGET_CACHE_SIZE how much it may take, such as 4GiB; what was not used for longest goes first.

    Example: unforget cache --clear
    """
    from unforget.files import cache as kept

    removed = kept.clear() if clear else None
    sizes = [path.lstat().st_size for path in kept.entries()]
    found = {"folder": kept.cache_folder(), "entries": len(sizes), "bytes": sum(sizes), "limit": kept.limit()}
    if as_json:
        console.print_json({**found, **({"removed": removed} if clear else {})})
    else:
        console.out.print(console.cache_table(found, removed))


@app.command(context_settings=SETTINGS)
def show(
    path: Annotated[Path, typer.Argument(help="Patch, exported file or folder, or any .safetensors file.")],
    as_json: AsJson = False,
) -> None:
    """Say where a patch or an export came from: base, targets (by digest), recipe, rounding, verdict, versions.

    Example: unforget show face.patch
    """
    from unforget import api

    found = api.show(path)
    if as_json:
        console.print_json(found.said)
    else:
        console.out.print(console.shown(found))
