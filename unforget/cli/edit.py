"""`unforget edit-surrogate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from unforget.cli.app import app, values
from unforget.cli.console import console_progress, err, errors, print_json
from unforget.cli.options import (
    T5,
    AsJson,
    ConfigFile,
    Device,
    Force,
    Guidance,
    MinDistance,
    Model,
    Pickle,
    PipelineConfig,
    Prompts,
    Resize,
    Resolution,
    RetainCount,
    RetainPrompts,
    Seed,
    Threads,
)


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
        from unforget.api import edit_surrogate as command
        from unforget.config import EditConfig, build

        given = values(locals(), "as_json", "config", "method", "box", "instruction", "editor_model")
        kind = method or ("donor" if donor else "instruct" if instruction else "inpaint" if mask or box else None)
        if kind:
            words = {"instruction": instruction, "model": editor_model} if kind == "instruct" else {}
            given["editor"] = {"kind": kind, **{k: v for k, v in words.items() if v is not None}}
        if box:
            given["box"] = box.split(",")
        if target and not output:
            given["output"] = target.with_suffix(".surrogate.png").name
        with console_progress() as progress:
            result = command(build(EditConfig, given, config), progress)
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
