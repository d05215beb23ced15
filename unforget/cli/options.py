"""The options that commands share, under the names that diffusers' training scripts use where they have them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MACHINE, DANGER, REPORTS = "This machine", "Dangerous options", "Reports"
Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", "--pretrained-model-name-or-path", "--pretrained_model_name_or_path",
        help="Alias (faces, flags, ddpm-celebahq, sd3, sd3.5-medium, sd3.5-large), diffusers folder, .safetensors "
        "file, or hub id owner/name[@revision].",
    ),
]  # fmt: skip
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file; options given here beat it.")]
Seed = Annotated[int | None, typer.Option(help="Of every random draw. [default: 0]")]
Resize = Annotated[bool | None, typer.Option("--resize", help="Crop and scale pictures to the model's size.")]
Force = Annotated[bool | None, typer.Option("--force", help="Overwrite what exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps. [default: cpu]", rich_help_panel=MACHINE)]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]", rich_help_panel=MACHINE)]
Pickle = Annotated[
    bool | None,
    typer.Option("--allow-pickle", help="Also open pickled .bin weights you trust.", rich_help_panel=DANGER),
]
Targets = Annotated[list[Path] | None, typer.Option("--target", "-t", help="Picture to forget; repeats.")]
Surrogates = Annotated[
    list[Path] | None, typer.Option("--surrogate", "-s", help="What to say instead, one a target, in order.")
]
Patches = Annotated[list[Path] | None, typer.Option(help="Patch to put on the base; repeats, in order.")]
Scales = Annotated[
    list[float] | None, typer.Option(help="Share of each patch, in the same order. [default: 1, the whole]")
]
NearCopy = Annotated[
    float | None, typer.Option(help="RMS under which two pictures are the same, pixels in [-1, 1]. [default: 0.16]")
]
RetainCount = Annotated[
    int | None,
    typer.Option(help="Pictures to draw from the base, to keep. [default: 192, more for many prompts]"),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="Prompt under which the model draws the target; repeats. [default: none]"),
]
RetainPrompts = Annotated[
    Path | None,
    typer.Option(help="Text file with a prompt a line, for what must stay. [default: the model's, or a built-in list]"),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", "--guidance-scale", "--guidance_scale",
        help="Classifier-free guidance of every draw. [default: the model's, or 7]",
    ),
]  # fmt: skip
Resolution = Annotated[
    int | None, typer.Option(help="Width and height of pictures, of a text-to-image model. [default: the model's]")
]
T5 = Annotated[
    bool | None, typer.Option("--t5/--no-t5", help="Load the third text encoder, where there is one. [default: yes]")
]
PipelineConfig = Annotated[
    Path | None, typer.Option(help="For a single file offline: a diffusers folder of that model, without weights.")
]
MinDistance = Annotated[float | None, typer.Option(help="Least RMS of a made surrogate to its target. [default: 0.2]")]
