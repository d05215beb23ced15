"""`unforget export` and `unforget show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unforget.cli.app import app, values
from unforget.cli.console import console_progress, errors, out, print_json, shown
from unforget.cli.options import (
    DANGER,
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

HUB = "The hub"


@app.command()
def export(
    model: Model = None,
    patch: Patches = None,
    scale: Scales = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; a file for transformer and single-file."),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="diffusers: a folder for `from_pretrained`. lora: for `load_lora_weights`. peft: for `PeftModel`. "
            "transformer: the network in one file with diffusers' names. single-file: the original layout. "
            "[default: diffusers]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the network's weights: float32, bfloat16, float16. [default: that of the base's file]"),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size", "--max_shard_size", help="Largest file with weights, diffusers. [default: 10GB]"
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Report of `unforget verify` to record. [default: verify.json in the patch's .run]"),
    ] = None,
    card: Annotated[
        bool | None, typer.Option("--card/--no-card", help="Write a model card into folders. [default: yes]")
    ] = None,
    card_images: Annotated[
        Path | None, typer.Option(help="Folder of pictures for the card. [default: none]")
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub", "--push_to_hub", "--hub-model-id", "--hub_model_id",
            help="Upload to this repository, owner/name; the token is $HF_TOKEN or that of `hf auth login`.",
            rich_help_panel=HUB,
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository. [default: private]", rich_help_panel=HUB),
    ] = None,
    guidance: Guidance = None,
    resolution: Resolution = None,
    pipeline_config: PipelineConfig = None,
    t5: T5 = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
    force: Force = None,
    device: Device = None,
    threads: Threads = None,
    force_rounding: Annotated[
        bool | None,
        typer.Option(
            "--force-rounding", help="Write it although rounding loses the change.", rich_help_panel=DANGER
        ),
    ] = None,
    allow_pickle: Pickle = None,
) -> None:  # fmt: skip
    """Write the base with patches on in a form that stock loaders open.

    It is opened and compared, weights and a picture, before the command says done.

    Example: unforget export --model faces --patch face.patch -o faces-patched
    """
    with errors():
        from unforget.api import export as command
        from unforget.config import ExportConfig, build

        resolved = build(ExportConfig, values(locals(), "config", "as_json"), config)
        with console_progress() as progress:
            done = command(resolved, progress)
        if as_json:
            made = done.manifest.model_dump(mode="json")
            print_json({"output": str(done.output), "url": done.url, **made})
        else:
            typer.echo(done.url or str(done.output))


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="Patch, exported file or folder, or any .safetensors file.")],
    as_json: AsJson = False,
) -> None:
    """Say where a patch or an export came from: base, targets (by digest), recipe, rounding, verdict, versions.

    Example: unforget show face.patch
    """
    with errors():
        from unforget.exports.show import look

        found = look(path)
        if as_json:
            print_json(found.said)
        else:
            out.print(shown(found))
