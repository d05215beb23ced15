"""What a person sees of the command line: progress, tables, errors. With `cli` the only user of typer and rich."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from unforget.cli.ending import PROCESS, told
from unforget.errors import UsageError, printable

if TYPE_CHECKING:
    from unforget.cli.progress import ConsoleProgress
    from unforget.config import UnlearnConfig
    from unforget.exports.show import Shown
    from unforget.verification.report import Check, Report


class _Console(Console):
    """Prints no text that commands a terminal or a log."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class _Record(logging.LogRecord):
    """What a library logs, as it may be printed: it quotes files."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def tame_libraries() -> None:
    """Let nothing that libraries log or warn of, which --verbose shows, command a terminal or a log."""
    written = warnings.formatwarning
    warnings.formatwarning = lambda *given, **more: printable(written(*given, **more))
    logging.setLogRecordFactory(_Record)


err = _Console(stderr=True, highlight=False, emoji=False, quiet=PROCESS > 0)
out = _Console(highlight=False, emoji=False)
voice = SimpleNamespace(quiet=False, verbose=False)
"""How much is said: what --quiet and --verbose set."""
UNPARSED: type[Exception] = typer.BadParameter.__mro__[2]
"""What the parser raises: typer gives no name to the class of all its errors."""
SIGNS = {"at least": "\u2265", "at most": "\u2264"}
COLOURS = {"failed": "red", "inconclusive": "yellow"}
OF_A_PATCH = {"base", "digest", "targets", "surrogates", "prompts", "earlier", "recipe", "seed", "steps", "versions"}


def say(text: str) -> None:
    """A result on stdout."""
    typer.echo(printable(text))


def tell(text: Any) -> None:
    """A table or a sentence beside the result, on stderr, unless --quiet."""
    if not voice.quiet:
        err.print(text, soft_wrap=isinstance(text, str))


def complain(sentence: str, hint: str) -> None:
    """What is wrong with a result, on stderr, however quiet."""
    err.print(f"[red]{escape(sentence)}[/] {escape(hint)}", soft_wrap=True)


@contextmanager
def progress() -> Iterator[ConsoleProgress]:
    """How far the command is, as much of it as is wanted; what libraries print meanwhile is no result."""
    from unforget.cli.progress import ConsoleProgress

    with redirect_stdout(sys.stderr), ConsoleProgress(quiet=voice.quiet, verbose=voice.verbose) as shown:
        yield shown


def print_json(value: dict[str, Any]) -> None:
    """The result on stdout, for machines."""
    say(json.dumps(value, indent=2, default=str))


@contextmanager
def whatever_fails() -> Iterator[None]:
    """For what is said of a verdict, which stands: that a disk is full is said, and no more."""
    try:
        yield
    except OSError as error:
        told(error)


def cache_table(found: dict[str, Any], removed: int | None) -> Table:
    """Where the cache lies and what it holds."""
    table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    table.add_row("folder", escape(str(found["folder"] or "none: there is no home folder; set $UNFORGET_CACHE")))
    table.add_row("entries", f"{found['entries']:,}" + ("" if removed is None else f" ({removed:,} removed)"))
    table.add_row("size", f"{found['bytes'] / 2**20:,.1f} MiB of {found['limit'] / 2**20:,.1f} MiB")
    return table


def doctor_table(found: dict[str, Any]) -> Table:
    """What this machine has, a row a thing."""
    table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    table.add_row("unforget", escape(f"{found['unforget']}, Python {found['python']}, {found['platform']}"))
    for title, packages in {"libraries": found["libraries"], **found["extras"]}.items():
        row = title if title == "libraries" else f"extra {title}"
        table.add_row(row, escape(", ".join(_package(*p) for p in packages.items())))
    for said in found["devices"].values():
        table.add_row("device", escape(_text(said)))
    for part in ("hub", "cache", "disk"):
        table.add_row(part, escape(_text(found[part])))
    return table


def _package(name: str, found: dict[str, Any]) -> str:
    return f"{name} {found['version'] or 'missing'}" + ("" if found["ok"] or not found["version"] else " (too old)")


def models_list(families: list[dict[str, Any]]) -> str:
    """The models that have a name, under what their family can do; lines that no width cuts."""
    lines = []
    for family in families:
        prompts = "prompts" if family["prompts"] else "no prompts"
        trained, formats = (", ".join(family[name]) for name in ("trained", "formats"))
        lines.append(f"{family['title']}: {prompts}; trains {trained}; exports {formats}")
        for model in family["names"]:
            memory = "" if model["memory_gib"] is None else f"; {model['memory_gib']:.1f} GiB to unlearn"
            lines.append(f"  {model['name']:15}{model['source']}; tested: {model['tested']}{memory}")
    return "\n".join(lines)


def before_after(rows: list[dict[str, Any]]) -> Table:
    """What `unlearn` changed, a row a target, prompt and noise level, and what it is judged by."""
    title = "What comes back of a noised target: RMS to target / surrogate, share nearer to that"
    names = ("target", "prompt", "at", "before", "after", "nearer", "wanted")
    table = Table(
        *(Column(name, no_wrap=name in ("target", "before", "after"), overflow="fold") for name in names), title=title
    )
    for row in rows:
        before, after = (row[side] for side in ("before", "after"))
        sides = (f"{s['to_target']:.2f} / {s['to_surrogate']:.2f}" for s in (before, after))
        share = " to ".join(f"{s['nearer_surrogate']:.0%}" for s in (before, after))
        judged = f"{SIGNS['at least']} 50%" if row["judged"] else "not judged"
        where = (str(row["target"])[:8], escape(row["prompt"]) or "none", row["probe"].partition("@")[2])
        table.add_row(*where, *sides, share, judged)
    return table


STOPPED = {
    "margin": "stopped early, for the margin to the surrogate was held (--stop-margin)",
    "budget": "all that --max-train-steps gives; the rows above say what came of it",
}
"""How a run ended, as people are told."""


def verify_command(config: UnlearnConfig) -> str:
    """The command that judges what a run of `unlearn` wrote: the same model, opened in the same way."""
    from unforget.config import ModelConfig
    from unforget.config.commands import command_line

    fields = [name for name in ModelConfig.model_fields if name not in ("seed", "force")]
    return command_line(config, fields, "verify", patch=config.output, html=config.output.with_suffix(".html"))


def plan_table(plan: dict[str, Any]) -> Table:
    """What `--dry-run` says of a command."""
    return costs_table(plan) if "passes" in plan else room_table(plan)


def costs_table(plan: dict[str, Any]) -> Table:
    """Whether a command would run, and what it would take: network passes by stage, and time if a pass was timed."""
    free = "" if plan["free_gib"] is None else f" of {plan['free_gib']:.1f} that are free"
    memory = f"{plan['memory_gib']['peak']:.2f} GiB{free} on {escape(plan['computes_on'])}"
    would = "It would run" if plan["would_run"] else "[red]It would not run: more memory is needed than there is[/]"
    pass_takes = plan.get("seconds_a_pass")
    figures = (Column(name, justify="right") for name in ("passes", "at most", "time", "at most"))
    table = Table(Column("stage", no_wrap=True), *figures, title=f"{would}; {memory}", title_justify="left")
    for name, counts in plan["passes"].items():
        times = [duration(pass_takes * n) if pass_takes else "" for n in counts]
        table.add_row(name, *(f"{n:,}" for n in counts), *times, style="bold" if name == "in all" else "")
    for name in plan.get("not_counted", ()):
        table.add_row(name, "not counted")
    if pass_takes:
        table.caption = f"{pass_takes:.3g} s a pass (the median of three, timed here), less what the cache holds"
    return table


def room_table(plan: dict[str, Any]) -> Table:
    """What an export would write: the patches fit the base, or it would have ended with an error."""
    size, free = (f"{plan[name] / 1e6:,.1f} MB" for name in ("bytes", "free_bytes"))
    table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    table.title, table.title_justify = f"It would run; {size} of {free} that are free on the disk", "left"
    table.add_row("export", escape(f"{plan['format']}, {plan['dtype']}, to {plan['output']}"))
    digests = (plan[name][:12] for name in ("base_digest", "patched_digest"))
    table.add_row("patches", "made for this base, {}; with them it is {}".format(*digests))
    table.add_row("verdict", escape(plan["verified"]["summary"] if plan["verified"] else "none of these weights"))
    _rows(table, {name: plan[name] for name in ("rounding", "notes")})
    return table


def duration(seconds: float) -> str:
    """A time as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def candidates_table(rows: list[dict[str, Any]]) -> Table:
    """The best candidates of `edit-surrogate`."""
    table = Table("pick", "how", "distance", "typicality", "sharpness", "accepted", title="Candidates, best first")
    for row in rows[:10]:
        figures = (f"{row['distance']:.3f}", f"{row['typicality']:.3f}", f"{row['quality']:.2f}")
        table.add_row(str(row["pick"]), str(row["label"]), *figures, "yes" if row["accepted"] else row["refused"])
    return table


def checks_table(result: Report) -> Table:
    """What `verify` judged: a row a probe that passed, and every figure that did not."""
    names = ("target", "probe", "figure", "base", "candidate", "wanted", "outcome")
    title = f"Verify ({result.level}): base beside candidate"
    table = Table(*(Column(name, overflow="fold") for name in names), title=title)
    groups: dict[tuple[str, str], list[Check]] = {}
    for c in result.checks:
        groups.setdefault(((c.target or "")[:8], c.probe), []).append(c)
    for (target, probe), checks in groups.items():
        passed, noted = (sum(c.outcome == o for c in checks) for o in ("passed", "informational"))
        if passed:
            told = f", {noted} informational" if noted else ""
            table.add_row(target, probe, "", "", "", "", f"[green]passed[/] {passed}{told}")
        for c in checks:
            if c.outcome in ("failed", "inconclusive"):
                table.add_row(target, *_figures(c))
    return table


def _figures(c: Check) -> list[str]:
    base = "" if c.base is None else f"{c.base:.3g}"
    edge = "borderline " if c.borderline else ""
    return [
        escape(c.name), c.meaning, base, f"{c.candidate:.3g}", f"{SIGNS[c.rule]} {c.threshold:.3g}",
        f"[{COLOURS[c.outcome]}]{c.outcome}[/] {edge}{escape(c.note)}",
    ]  # fmt: skip


def shown(found: Shown) -> Table:
    """What `show` found, a row a field; patches of an export under one another."""
    said = dict(found.said)
    table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    if found.kind == "export":
        parts = said.pop("patches")
        table.add_row("export", escape(f"{said.pop('format')}, {said.pop('dtype')}, of {said.pop('base')}"))
        _rows(table, said)
        for number, part in enumerate(parts, 1):
            table.add_row(f"patch {number}", f"scale {part['scale']:g}", style="cyan")
            _rows(table, {k: v for k, v in part["provenance"].items() if k in OF_A_PATCH})
    else:
        holds = said.pop("holds", None)
        table.add_row(*(("patch", f"{holds}, of {escape(said.pop('base'))}") if holds else ("file", "safetensors")))
        _rows(table, said)
    return table


def _rows(table: Table, said: dict[str, Any]) -> None:
    """Fields that say something, their names in words."""
    for name, value in said.items():
        if value not in (None, [], {}, ""):
            table.add_row(name.replace("_", " "), escape(_text(value)))


def _text(value: Any) -> str:
    """A value as people read it: a table in one line, a list of texts one under another, long numbers in groups."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        inner = ((k, f"({_text(v)})" if isinstance(v, dict) else _text(v)) for k, v in value.items() if v is not None)
        return ", ".join(f"{k.replace('gib', 'GiB').replace('_', ' ')} {v}" for k, v in inner)
    if isinstance(value, list):
        return ("\n" if any(isinstance(v, (str, dict)) for v in value) else " ").join(_text(v) for v in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def drawn(row: dict[str, Any]) -> str:
    """What the patched model draws under a prompt, in a line."""
    parts = (f"{share:.0%} {name.replace('_', ' ')}" for name, share in row["after"].items() if share)
    return f"under '{escape(row['prompt'])}' it draws: {', '.join(parts)}"


@contextmanager
def old_names() -> Iterator[None]:
    """Say which names of earlier versions were given."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", FutureWarning)
        yield
    for sentence in dict.fromkeys(str(w.message) for w in found if w.category is FutureWarning):
        err.print(f"note: {escape(sentence)}", style="yellow", soft_wrap=True)


@contextmanager
def errors(args: Sequence[str]) -> Iterator[None]:
    """Turn what went wrong with these arguments into a sentence, a way out and an exit code, as JSON if they say so."""
    as_json = "--json" in args
    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except BaseException as error:
        if not isinstance(error, UNPARSED):
            raise typer.Exit(told(error, as_json=as_json)) from None
        if type(error).__name__ == "NoArgsIsHelpError":  # it shows the help
            raise
        path = error.ctx.command_path if getattr(error, "ctx", None) else "unforget"  # type: ignore[attr-defined]
        sentence = error.format_message()  # type: ignore[attr-defined]
        wrong = UsageError(sentence, f"See `{path} --help`.")
        raise typer.Exit(told(wrong, as_json=as_json)) from None


def leave(code: int) -> NoReturn:
    """End with a verdict. Of several processes the first one's counts: a launcher stops all when one says no."""
    raise typer.Exit(0 if PROCESS else code)
