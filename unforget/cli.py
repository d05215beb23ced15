"""The command line: parse, call, print, exit code. Heavy imports stay inside bodies, so that --help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from unforget import __version__
from unforget.console import before_after, checks_table, err, errors, out, print_json, progress, provenance_table
from unforget.options import (
    MACHINE,
    T5,
    AsJson,
    ConfigFile,
    Device,
    Force,
    Guidance,
    MinDistance,
    Model,
    NearCopy,
    Pickle,
    PipelineConfig,
    Prompts,
    Resize,
    Resolution,
    RetainCount,
    RetainPrompts,
    Seed,
    Surrogates,
    Targets,
    Threads,
)

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


@app.command("edit-surrogate")
def edit_surrogate(
    model: Model = None,
    target: Annotated[Path | None, typer.Option("--target", "-t", help="The picture to replace.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write. [default: TARGET.surrogate.png]")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="sdedit, inpaint, repaint, instruct, donor, blur, pixelate. [default: sdedit]")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Edit where this picture is white.")] = None,
    box: Annotated[str | None, typer.Option(help="Edit inside x,y,width,height (pixels).")] = None,
    instruction: Annotated[str | None, typer.Option(help="What to change, in words (method instruct).")] = None,
    editor_model: Annotated[
        str | None, typer.Option(help="Hub id or folder of an instruction editor (method instruct).")
    ] = None,
    donor: Annotated[Path | None, typer.Option(help="Picture to take the face from (method donor).")] = None,
    prompt: Prompts = None,
    retain_prompts: RetainPrompts = None,
    retain_count: RetainCount = None,
    pick: Annotated[int | None, typer.Option(help="Take this candidate of the sheet, not the best.")] = None,
    min_distance: MinDistance = None,
    seed: Seed = None,
    resize: Resize = None,
    guidance: Guidance = None,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    t5: T5 = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    force: Force = None,
    device: Device = None,
    threads: Threads = None,
    allow_pickle: Pickle = None,
) -> None:
    """Make a surrogate: a picture near the target that is another instance.

    Writes the best candidate, and beside it a contact sheet of all (FILE.sheet.png).

    Example: unforget edit-surrogate --model faces --target face.png -o face.surrogate.png
    """
    with errors():
        from unforget.commands import edit_surrogate as command
        from unforget.config import EditConfig, build

        given = _given(locals(), "as_json", "config", "method", "box", "instruction", "editor_model")
        kind = method or ("donor" if donor else "instruct" if instruction else "inpaint" if mask or box else None)
        if kind:
            words = {"instruction": instruction, "model": editor_model} if kind == "instruct" else {}
            given["editor"] = {"kind": kind, **{k: v for k, v in words.items() if v is not None}}
        if box:
            given["box"] = box.split(",")
        if target and not output:
            given["output"] = target.with_suffix(".surrogate.png").name
        with progress() as listener:
            result = command(build(EditConfig, given, config), listener)
        if as_json:
            print_json({**vars(result)})
            return
        table = Table(title="Candidates, best first")
        for name in ("pick", "how", "distance", "typicality", "sharpness", "accepted"):
            table.add_column(name)
        for row in result.candidates[:10]:
            table.add_row(
                str(row["pick"]), str(row["label"]), f"{row['distance']:.3f}", f"{row['typicality']:.3f}",
                f"{row['quality']:.2f}", "yes" if row["accepted"] else "no",
            )  # fmt: skip
        err.print(table)
        err.print(f"All candidates: {result.sheet}; take another with --pick N --force.")
        typer.echo(str(result.output))


@app.command()
def unlearn(
    model: Model = None,
    target: Targets = None,
    surrogate: Surrogates = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Patch to write. [default: TARGET.patch]")
    ] = None,
    retain: Annotated[
        Path | None, typer.Option(help="Folder of pictures to keep. [default: drawn from the base]")
    ] = None,
    prompt: Prompts = None,
    retain_prompts: RetainPrompts = None,
    retain_count: RetainCount = None,
    recipe: Annotated[str, typer.Option(help="default (ours) or paper (arXiv:2603.10445).")] = "default",
    objective: Annotated[str | None, typer.Option(help="posterior-swap or surrogate.")] = None,
    surgery: Annotated[
        str | None, typer.Option(help="project, pcgrad, sum, erasediff, fixed-norm, forget-only.")
    ] = None,
    weighting: Annotated[str | None, typer.Option(help="Of the noise levels: clean-space, linear, uniform.")] = None,
    train: Annotated[
        str | None, typer.Option(help="bottleneck, full, lora. [default: bottleneck, lora for SD3]")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA. [default: 16]")] = None,
    lora_alpha: Annotated[
        int | None, typer.Option("--lora-alpha", "--lora_alpha", help="Its alpha. [default: 16]")
    ] = None,
    retain_weight: Annotated[float | None, typer.Option(help="Weight of the retain loss.")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--learning_rate", "--lr")] = None,
    max_train_steps: Annotated[
        int | None, typer.Option("--max-train-steps", "--max_train_steps", help="Step budget.")
    ] = None,
    max_grad_norm: Annotated[float | None, typer.Option("--max-grad-norm", "--max_grad_norm")] = None,
    train_batch_size: Annotated[
        int | None, typer.Option("--train-batch-size", "--train_batch_size", help="Targets in a batch.")
    ] = None,
    retain_batch_size: Annotated[int | None, typer.Option(help="Pictures to keep in a batch.")] = None,
    stop_margin: Annotated[float | None, typer.Option(help="Stop once the margin is held, in [-1, 1].")] = None,
    preview: Annotated[
        int | None, typer.Option(help="Reconstructions a level, and seeds, to show at the end. [default: 8]")
    ] = None,
    near_copy: NearCopy = None,
    min_distance: MinDistance = None,
    seed: Seed = None,
    resize: Resize = None,
    guidance: Guidance = None,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    t5: T5 = None,
    config: ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and a memory plan, and stop.")
    ] = False,
    as_json: AsJson = False,
    force: Force = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Pictures in one pass. [default: by their size]", rich_help_panel=MACHINE)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            "--gradient_checkpointing",
            help="Less memory, more time. [default: on for large models]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    use_8bit_adam: Annotated[
        bool | None,
        typer.Option("--use-8bit-adam", "--use_8bit_adam", help="Needs bitsandbytes.", rich_help_panel=MACHINE),
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(
            "--mixed-precision",
            "--mixed_precision",
            rich_help_panel=MACHINE,
            help="no, bf16, or auto: bf16 where the machine has it. [default: auto]",
        ),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    allow_pickle: Pickle = None,
) -> None:
    """Make the model say a surrogate instead of the target.

    Writes a patch, and beside it a folder (NAME.run) with the log, the surrogate and a contact sheet.

    Example: unforget unlearn --model faces --target face.png -o face.patch
    """
    with errors():
        from unforget.config import UnlearnConfig, build

        strategy = {
            "objective": objective,
            "surgery": surgery,
            "train": train,
            "weighting": weighting,
            "rank": rank,
            "lora_alpha": lora_alpha,
            "retain_weight": retain_weight,
            "learning_rate": learning_rate,
            "max_train_steps": max_train_steps,
            "max_grad_norm": max_grad_norm,
            "forget_batch_size": train_batch_size,
            "retain_batch_size": retain_batch_size,
            "stop_margin": stop_margin,
        }
        fields = set(UnlearnConfig.model_fields)
        given = {k: v for k, v in locals().items() if k in fields and k != "recipe"}
        changes = {k: v for k, v in strategy.items() if v is not None}
        if recipe != "default" or changes:
            given["recipe"] = {"name": recipe, "changes": changes}
        if target and not output:
            given["output"] = target[0].with_suffix(".patch").name
        resolved = build(UnlearnConfig, given, config)
        if dry_run:
            from unforget.commands import memory_plan, recipe_of

            shown = resolved.model_copy(update={"recipe": recipe_of(resolved)}).model_dump(mode="json")
            print_json({**shown, "memory_gib": memory_plan(resolved)})
            return
        from unforget.commands import EXIT_UNLEARN
        from unforget.commands import unlearn as command

        with progress() as listener:
            result = command(resolved, listener)
        if as_json:
            print_json(vars(result))
        else:
            err.print(before_after(result.table))
            err.print(
                f"{result.steps} steps, stopped by {result.stopped}; same-seed drift: "
                f"median {result.drift['median']:.3f}. Look at {result.folder / 'sheet.png'}."
            )
            if not result.forgotten:
                err.print("[red]The target still comes back.[/] Raise --max-train-steps or lower --retain-weight.")
            typer.echo(str(result.output))
        raise typer.Exit(EXIT_UNLEARN[result.forgotten])


@app.command()
def verify(
    model: Model = None,
    patch: Annotated[Path | None, typer.Option(help="Patch to judge.")] = None,
    candidate: Annotated[Path | None, typer.Option(help="Or a diffusers folder to judge.")] = None,
    target: Targets = None,
    surrogate: Surrogates = None,
    prompt: Prompts = None,
    retain_prompts: RetainPrompts = None,
    keep: Annotated[list[Path] | None, typer.Option(help="Picture that must still be drawn; repeats.")] = None,
    samples: Annotated[int | None, typer.Option(help="Images to draw from each model. [default: 256]")] = None,
    draws: Annotated[int | None, typer.Option(help="Reconstructions a noise level. [default: 32]")] = None,
    level: Annotated[
        list[int] | None, typer.Option(help="Noise level, timestep of 1000; repeats. [default: 250 400 550]")
    ] = None,
    sampler_steps: Annotated[int | None, typer.Option(help="Sampler steps of the draws. [default: 25]")] = None,
    near_copy: NearCopy = None,
    max_drift: Annotated[float | None, typer.Option(help="Largest median same-seed drift. [default: 0.08]")] = None,
    min_kept: Annotated[
        float | None, typer.Option(help="Least share of look-alikes still drawn. [default: 0.6]")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the JSON report here.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet here; it shows the target.")] = None,
    seed: Seed = None,
    resize: Resize = None,
    guidance: Guidance = None,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    t5: T5 = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    force: Force = None,
    device: Device = None,
    threads: Threads = None,
    allow_pickle: Pickle = None,
) -> None:
    """Judge a patch or a checkpoint: is the target gone, is the rest still there?

    Passing is evidence, never a certificate.

    Example: unforget verify --model faces --patch face.patch --report report.json
    """
    with errors():
        from unforget.commands import verify as command
        from unforget.config import VerifyConfig, build

        given = _given(locals(), "as_json", "config", "level")
        given["levels"] = level
        with progress() as listener:
            result = command(build(VerifyConfig, given, config), listener)
        if as_json:
            typer.echo(result.model_dump_json(indent=2))
        else:
            err.print(checks_table(result))
            typer.echo(f"{result.verdict}: {result.summary}")
        raise typer.Exit(result.exit_code)


@app.command()
def export(
    model: Model = None,
    patch: Annotated[Path | None, typer.Option(help="Patch to put on the base.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    format: Annotated[str | None, typer.Option(help="diffusers or lora. [default: diffusers]")] = None,
    guidance: Guidance = None,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    t5: T5 = None,
    config: ConfigFile = None,
    force: Force = None,
    device: Device = None,
    threads: Threads = None,
    allow_pickle: Pickle = None,
) -> None:
    """Write the patched model as a checkpoint that the stock loader opens.

    It is opened and compared before the command says done.

    Example: unforget export --model faces --patch face.patch -o faces-patched
    """
    with errors():
        from unforget.commands import export as command
        from unforget.config import ExportConfig, build

        resolved = build(ExportConfig, _given(locals(), "config"), config)
        with progress() as listener:
            typer.echo(str(command(resolved, listener)))


@app.command()
def show(
    patch: Annotated[Path, typer.Argument(help="Patch to look into.")],
    as_json: AsJson = False,
) -> None:
    """Say where a patch came from: its base, targets (by digest), prompts, recipe, seed and versions.

    Example: unforget show face.patch
    """
    with errors():
        from unforget.patch import Patch

        found = Patch.load(patch)
        if as_json:
            print_json(found.provenance.model_dump())
            return
        out.print(provenance_table(found))


def _given(values: dict[str, Any], *without: str) -> dict[str, Any]:
    """The options of a command body, from its `locals()`, less those that are not configuration."""
    return {k: v for k, v in values.items() if k not in without and not callable(v)}


def main() -> None:
    """The console script."""
    quiet: Callable[[str, str], str] = os.environ.setdefault
    quiet("TRANSFORMERS_VERBOSITY", "error")
    quiet("DIFFUSERS_VERBOSITY", "error")
    sys.exit(app())
