"""`unforget verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unforget.cli.app import app, values
from unforget.cli.console import checks_table, console_progress, err, errors, leave
from unforget.cli.options import (
    MACHINE,
    REPORTS,
    T5,
    AsJson,
    ConfigFile,
    Device,
    Force,
    Guidance,
    Model,
    Patches,
    Pickle,
    PipelineConfig,
    Prompts,
    Resize,
    Resolution,
    RetainPrompts,
    Scales,
    Seed,
    Surrogates,
    Targets,
    Threads,
)


@app.command()
def verify(
    model: Model = None,
    patch: Patches = None,
    scale: Scales = None,
    candidate: Annotated[Path | None, typer.Option(help="Or a diffusers folder to judge.")] = None,
    target: Targets = None,
    surrogate: Surrogates = None,
    prompt: Prompts = None,
    retain_prompts: RetainPrompts = None,
    policy: Annotated[
        Path | None, typer.Option(help="What your team agreed on. [default: unforget.toml or pyproject.toml here]")
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="quick, standard or deep: which probes run. [default: standard]")
    ] = None,
    require: Annotated[
        list[str] | None, typer.Option("--require", help="Probe to run and to decide by, whatever the level; repeats.")
    ] = None,
    max_rate: Annotated[
        float | None, typer.Option(help="Largest share of draws that may be near-copies. [default: 0.005]")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of that; both say how many to draw. [default: 0.95]")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Most draws. [default: as many as decide]")] = None,
    false_positive_rate: Annotated[
        float | None, typer.Option(help="Share of different pictures that may pass for near-copies. [default: 0.0001]")
    ] = None,
    similarity: Annotated[
        list[str] | None,
        typer.Option(help="What sees near-copies: pixels, structure, sscd, face, or KIND=FILE; repeats."),
    ] = None,
    must_retain: Annotated[list[Path] | None, typer.Option(help="Picture that must still be drawn; repeats.")] = None,
    draws: Annotated[int | None, typer.Option(help="Reconstructions a noise level. [default: 32]")] = None,
    timestep: Annotated[
        list[int] | None,
        typer.Option("--timestep", help="To reconstruct from, a timestep; repeats. [default: 250 400 550]"),
    ] = None,
    sampler_steps: Annotated[int | None, typer.Option(help="Sampler steps of the draws. [default: 20]")] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            help="Largest median same-seed drift, in distances between draws. [default: 0.15, 0.5 for a folder]"
        ),
    ] = None,
    min_kept: Annotated[
        float | None, typer.Option(help="Least share of look-alikes still drawn. [default: 0.6]")
    ] = None,
    replay_seed: Annotated[int | None, typer.Option(help="Seed that made the picture.")] = None,
    replay_steps: Annotated[int | None, typer.Option(help="Sampler steps that made it. [default: 20]")] = None,
    replay_scheduler: Annotated[
        str | None, typer.Option(help="diffusers class of the sampler that made it, such as DDPMScheduler.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the JSON report here.", rich_help_panel=REPORTS)] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.", rich_help_panel=REPORTS)] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to look at here.", rich_help_panel=REPORTS)] = None,
    summary: Annotated[
        Path | None,
        typer.Option(help="Append Markdown here. [default: $GITHUB_STEP_SUMMARY]", rich_help_panel=REPORTS),
    ] = None,
    save_images: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures, which then stand in the page, too.", rich_help_panel=REPORTS),
    ] = None,
    seed: Seed = None,
    resize: Resize = None,
    guidance: Guidance = None,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    t5: T5 = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    force: Force = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither read nor keep what the base does.", rich_help_panel=MACHINE)
    ] = False,
    device: Device = None,
    threads: Threads = None,
    allow_pickle: Pickle = None,
) -> None:
    """Judge a patch or a checkpoint: is the target gone, is the rest still there?

    Passing is evidence, never a certificate.

    Example: unforget verify --model faces --patch face.patch --report report.json --html report.html
    """
    with errors():
        from unforget.api import verify as command
        from unforget.verification.policy import resolve

        given = values(locals(), "as_json", "config", "policy", "no_cache")
        given["cache"] = False if no_cache else None
        with console_progress() as progress:
            result = command(resolve(given, config, policy), progress)
        if as_json:
            typer.echo(result.model_dump_json(indent=2))
        else:
            err.print(checks_table(result))
            for noted in result.robustness:
                err.print(f"{noted.target[:8]} {noted.probe}: {noted.sentence}", soft_wrap=True)
            typer.echo(f"{result.verdict}: {result.summary}")
        leave(result.exit_code)
