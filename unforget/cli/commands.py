"""The commands. Each calls the function of its name with the configuration that its options make; nothing heavy is
imported before that is known to be sound."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape

from unforget import __version__
from unforget.cli import console
from unforget.cli.options import SETTINGS, Commands, command
from unforget.errors import ExitCode

if TYPE_CHECKING:
    from unforget.api import Unlearned
    from unforget.verification.report import Report

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say whether it would run, where, and what it would take, and stop.")
]

app = typer.Typer(
    name="unforget", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings=SETTINGS, help="Make a diffusion model stop producing one image, and collect the evidence.",
    epilog="Exit codes: 0 done or passed, 1 still reproduced or too much lost, 2 wrong usage, 3 could not run, "
    "4 inconclusive, 130 interrupted. Options may be spelt with underscores, too, as in diffusers' scripts.",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@command(app, "edit-surrogate", "EditConfig")
def edit_surrogate(config: Any, *, as_json: AsJson = False, dry_run: DryRun = False) -> None:
    """Make a surrogate: another image near the target.

    \b
    Examples:
      unforget edit-surrogate --model faces --target demo:0
      unforget edit-surrogate --model sd3 --target face.png --prompt "a face" --box 40,40,96,96 -o new.png

    It writes the best candidate, and beside it a contact sheet of all (FILE.sheet.png).
    """
    from unforget import api

    if dry_run:
        _rehearsed(config, as_json)
    with console.progress() as progress:
        result = api.edit_surrogate(config, progress)
    if as_json:
        console.print_json(vars(result))
    else:
        console.tell(console.candidates_table(result.candidates))
        console.tell(f"All candidates: {escape(str(result.sheet))}; take another with --pick N --force.")
        console.say(str(result.output))


@command(app, "unlearn", "UnlearnConfig")
def unlearn(
    config: Any, *, as_json: AsJson = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Make the model generate a surrogate instead of the target.

    \b
    Examples:
      unforget unlearn --model faces --target demo:0 -o face.patch
      unforget unlearn --model sd3 --target face.png --surrogate new.png --prompt "a face" --device cuda

    It writes a patch, and beside it a folder (NAME.run) with the log, the surrogate and a contact sheet.
    """
    from unforget import api

    if dry_run:
        _rehearsed(config, as_json)
    with console.progress() as progress:
        result = api.unlearn(config, progress)
    with console.whatever_fails():
        _tell(config, result, as_json)
    console.leave(result.code)


def _rehearsed(config: Any, as_json: bool) -> NoReturn:
    """Say whether the command would run, and end."""
    from unforget import api

    found = api.rehearse(config)
    if as_json:
        console.print_json(found)
    else:
        console.out.print(console.plan_table(found))
    console.leave(ExitCode.OK if found["would_run"] else ExitCode.CANNOT_RUN)


def _tell(config: Any, result: Unlearned, as_json: bool) -> None:
    if as_json:
        console.print_json(vars(result))
        return
    console.tell(console.before_after(result.table))
    console.tell(
        f"{result.steps} updates: {console.STOPPED[result.stopped]}. Same-seed drift: "
        f"median {result.drift['median']:.3f}. Look at {escape(str(result.folder / 'sheet.png'))}."
    )
    for row in result.drawn:
        console.tell(console.drawn(row))
    if not result.forgotten:
        console.complain("The target is still generated.", "Raise --max-train-steps or lower --retain-weight.")
    elif not result.replaced:
        console.complain(
            "The target is gone, but something else than the surrogate is drawn.",
            "Raise --max-train-steps, or give a --surrogate that the model can draw: look at the sheet.",
        )
    else:
        console.tell(f"Next, collect the evidence: {escape(console.verify_command(config))}")
    console.say(str(result.output))


@command(app, "verify", "VerifyConfig")
def verify(config: Any, *, as_json: AsJson = False, dry_run: DryRun = False) -> None:
    """Judge a patch or a checkpoint beside its base.

    \b
    Examples:
      unforget verify --model faces --patch face.patch --html report.html
      unforget verify --model sd3 --candidate sd3-patched --target face.png --level quick --json

    Is the target gone, is the rest still there? Passing is evidence, never a certificate.
    """
    from unforget import api

    if dry_run:
        _rehearsed(config, as_json)
    with ExitStack() as bar:
        progress = bar.enter_context(console.progress())

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
        console.tell(console.checks_table(result))
        for noted in result.robustness:
            console.tell(escape(f"{noted.target[:8]} {noted.probe}: {noted.sentence}"))
        console.say(f"{result.verdict}: {result.summary}")
        for sentence in words.rates(result):
            console.say(sentence)
        console.say(", ".join(f"{name} {value}" for name, value in words.facts(result).items()))


@command(app, "export", "ExportConfig")
def export(config: Any, *, as_json: AsJson = False, dry_run: DryRun = False) -> None:
    """Write base and patches in a form that stock loaders open.

    \b
    Examples:
      unforget export --model faces --patch face.patch -o faces-patched
      unforget export --model sd3 --patch face.patch --format lora -o sd3-lora

    What is written is opened and compared, weights and an image, before the command says done.
    """
    from unforget import api

    if dry_run:
        _rehearsed(config, as_json)
    with console.progress() as progress:
        done = api.export(config, progress)
    if as_json:
        console.print_json({"output": str(done.output), "url": done.url, **done.manifest.model_dump(mode="json")})
    else:
        console.say(done.url or str(done.output))


@app.command(context_settings=SETTINGS)
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all entries.")] = False, as_json: AsJson = False
) -> None:
    """Say where the cache lies and what it holds.

    \b
    Examples:
      unforget cache
      unforget cache --clear

    It holds images that models drew, perhaps targets among them, and figures. $UNFORGET_CACHE says where it lies,
    $UNFORGET_CACHE_SIZE how much it may take, such as 4GiB; what was not used for longest goes first.
    """
    from unforget.files import cache as kept

    removed = kept.clear() if clear else None
    found = kept.state()
    if as_json:
        console.print_json({**found, **({"removed": removed} if clear else {})})
    else:
        console.out.print(console.cache_table(found, removed))


@app.command(context_settings=SETTINGS)
def show(
    path: Annotated[Path, typer.Argument(help="Patch, exported file or folder, or any .safetensors file.")],
    as_json: AsJson = False,
) -> None:
    """Say where a patch or an export came from.

    \b
    Examples:
      unforget show face.patch
      unforget show faces-patched --json

    That is its base, targets (by digest), recipe, rounding, verdict and versions.
    """
    from unforget import api

    found = api.show(path)
    if as_json:
        console.print_json(found.said)
    else:
        console.out.print(console.shown(found))


@app.command(context_settings=SETTINGS)
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has: devices, libraries, disk.

    \b
    Examples:
      unforget doctor
      unforget doctor --json

    Exit code 3 means that something is missing without which nothing runs. The hub's token is never shown.
    """
    from unforget.cli import doctor

    found = doctor.look()
    wrong = doctor.wrong(found)
    if as_json:
        console.print_json({**found, "wrong": wrong})
    else:
        console.out.print(console.doctor_table(found))
        for sentence in wrong:
            console.err.print(f"[red]{escape(sentence)}[/]", soft_wrap=True)
    console.leave(ExitCode.CANNOT_RUN if wrong else ExitCode.OK)


@app.command(context_settings=SETTINGS)
def models(as_json: AsJson = False) -> None:
    """List the names of models, and what each family can do.

    \b
    Examples:
      unforget models
      unforget models --json

    Memory to unlearn is told of models whose configuration lies on this disk: nothing is downloaded.
    """
    from unforget import api

    found = api.models()
    if as_json:
        console.print_json({"families": found})
    else:
        console.say(console.models_list(found))
