"""`unforget export` and `unforget show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unforget.cli.app import app, values
from unforget.console import errors, out, print_json, progress, provenance_table
from unforget.options import (
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
    Resolution,
    Scales,
    Threads,
)


@app.command()
def export(
    model: Model = None,
    patch: Patches = None,
    scale: Scales = None,
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

        resolved = build(ExportConfig, values(locals(), "config"), config)
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
