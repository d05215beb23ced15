"""`unforget verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unforget.cli.app import app, values
from unforget.console import checks_table, err, errors, progress
from unforget.options import (
    T5,
    AsJson,
    ConfigFile,
    Device,
    Force,
    Guidance,
    Model,
    NearCopy,
    Pickle,
    PipelineConfig,
    Prompts,
    Resize,
    Resolution,
    RetainPrompts,
    Seed,
    Surrogates,
    Targets,
    Threads,
)


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

        given = values(locals(), "as_json", "config", "level")
        given["levels"] = level
        with progress() as listener:
            result = command(build(VerifyConfig, given, config), listener)
        if as_json:
            typer.echo(result.model_dump_json(indent=2))
        else:
            err.print(checks_table(result))
            typer.echo(f"{result.verdict}: {result.summary}")
        raise typer.Exit(result.exit_code)
