"""`unforget unlearn`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unforget.cli.app import app
from unforget.cli.console import before_after, console_progress, err, errors, leave, print_json
from unforget.cli.options import (
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
    Scales,
    Seed,
    Surrogates,
    Targets,
    Threads,
)

if TYPE_CHECKING:
    from unforget.config import UnlearnConfig


def _resumed(config: UnlearnConfig, which: str) -> UnlearnConfig:
    """diffusers' spelling of --resume."""
    from unforget.errors import UsageError

    folder = config.output.with_suffix(".run")
    if which != "latest" and Path(which).resolve() != folder.resolve():
        raise UsageError(f"'{which}' is not the run of {config.output}, which is '{folder}'", "Give its --output too.")
    return config.model_copy(update={"resume": True})


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
    patch: Annotated[
        list[Path] | None,
        typer.Option(help="Patch to begin with, which the new one will hold; repeats. [default: the base alone]"),
    ] = None,
    scale: Scales = None,
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
    num_validation_images: Annotated[
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
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with the run beside the patch, to the same bytes.")
    ] = None,
    resume_from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--resume-from-checkpoint",
            "--resume_from_checkpoint",
            help="The same: latest, or the folder of this run.",
        ),
    ] = None,
    checkpointing_steps: Annotated[
        int | None,
        typer.Option(
            "--checkpointing-steps",
            "--checkpointing_steps",
            rich_help_panel=MACHINE,
            help="Updates between two checkpoints. [default: as often as costs under 5 % of the time]",
        ),
    ] = None,
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
        if resume_from_checkpoint is not None:
            resolved = _resumed(resolved, resume_from_checkpoint)
        if dry_run:
            from unforget.api import memory_plan, recipe_of

            shown = resolved.model_copy(update={"recipe": recipe_of(resolved)}).model_dump(mode="json")
            print_json({**shown, "memory_gib": memory_plan(resolved)})
            return
        from unforget.api import EXIT_UNLEARN
        from unforget.api import unlearn as command

        with console_progress() as progress:
            result = command(resolved, progress)
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
        leave(EXIT_UNLEARN[result.forgotten])
