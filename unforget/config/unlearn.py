"""The configuration of `unforget unlearn`."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import field_validator, model_validator

from unforget.config.base import MACHINE, Config, DrawConfig, PatchedConfig, beside, option, paired, real, run_folder
from unforget.config.pictures import Pictures, Surrogates
from unforget.core.strategy import Scope, Span

REDIRECTED = ("objective", "surrogate", "random-surrogate")
REGRESSED = (*REDIRECTED, "neggrad", "erasediff", "siss", "retrack", "esd", "concept-ablation")
SWAP, LORA, CLEAN = ("objective", "posterior-swap"), ("train", "lora"), ("weighting", "clean-space")
change = partial(option, default=None, words="the recipe's")


class RecipeOptions(Config):
    """What is computed: a named recipe of the model's family, and what to change in it; None changes nothing."""

    PANEL: ClassVar[str] = "Recipe"

    recipe: str = option(
        "Recipe to begin with: default (ours), paper (arXiv:2603.10445), "
        "or a baseline: random-surrogate, naive, neggrad, erasediff, salun, siss, retrack; where there are prompts, "
        "esd, concept-ablation. docs/recipes.md has papers and equations.",
        "default",
    )
    objective: (
        Literal[
            "posterior-swap", "surrogate", "random-surrogate", "neggrad", "erasediff", "siss", "retrack", "esd",
            "concept-ablation",
        ] | None
    ) = change("What the network learns at noised targets.")  # fmt: skip
    target_prior: float | None = change(
        "How many times more often than the base drew it a target counts.", of=SWAP, gt=0
    )
    taper: Span | None = change("Timesteps low,high between which the swap tapers off to nothing.", of=SWAP)
    normalize_edit: bool | None = change(
        "Divide the forget loss by the size of a small edit, so that it is learnt as well as a large one.", of=SWAP
    )
    distil: bool | None = change(
        "Retain what the base predicts at retain images, not the images themselves.", of=REGRESSED
    )
    one_noise: bool | None = change("Use one timestep and one noise an update, for both batches.", of=REDIRECTED)
    mixture: float | None = change(
        "Share of the noised images that are targets, not retain images.", of=("objective", "siss"), gt=0, lt=1
    )
    nearest: int | None = change(
        "Number of retain images that a target is led to, the nearest ones.", of=("objective", "retrack"), ge=1,
        le=10_000,
    )  # fmt: skip
    negative_guidance: float | None = change("How far to lead away from the prompt.", of=("objective", "esd"), ge=0)
    weighting: Literal["clean-space", "linear", "uniform"] | None = change("How losses are weighted by timestep.")
    weighting_cap: float | None = change("Largest weight of a timestep.", of=CLEAN, gt=0)
    weighting_beta: float | None = change(
        "Slope of the weight over timesteps.", of=("weighting", "linear"), gt=0, le=1e-3
    )
    retain_weight: float | None = change("Weight of the retain loss.", of=(*CLEAN, "uniform"), ge=0)
    surgery: Literal["sum", "project", "pcgrad", "erasediff", "fixed-norm", "forget-only", "retain-only"] | None = (
        change("How the forget gradient and the retain gradient become one step.")
    )
    surgery_eta: float | None = change(
        "Least weight per unit of the forget gradient.", of=("surgery", "erasediff"), ge=0
    )
    surgery_share: float | None = change(
        "Norm of the forget gradient as a share of the retain gradient's.", of=("surgery", "fixed-norm"), gt=0
    )
    train: Scope | None = change("Which weights are trained.")
    damping: float | None = change(
        "Divide gradients, and what a LoRA begins with, by the second moment of what retain images feed a layer, "
        "with this share of its mean added.",
        gt=0,
    )
    saliency: float | None = change(
        "Share of these weights that move: those that the loss at the targets moves most.", gt=0, le=1
    )
    rank: int | None = change("Rank of the LoRA.", of=LORA, ge=1, le=1024)
    lora_alpha: int | None = change(
        "Alpha of the LoRA, whose change is scaled by alpha / rank; follows --rank.", of=LORA, ge=1, le=2**20
    )
    learning_rate: float | None = change("Learning rate of Adam.", names=("--lr",), gt=0, le=1)
    update_share: float | None = change(
        "Instead of a learning rate: most that an update may change of what a projection answers, as a share of it.",
        gt=0, le=1,
    )  # fmt: skip
    max_train_steps: int | None = change("Largest number of updates.", ge=1, le=100_000)
    warmup_steps: int | None = change("Updates over which the learning rate rises.", ge=0, le=100_000)
    cooldown_steps: int | None = change("Last updates, over which the learning rate falls.", ge=0, le=100_000)
    sequential: bool | None = change("Forget several targets one after another, with equal shares of all updates.")
    train_batch_size: int | None = change("Noised targets in a batch.", ge=1, le=1024)
    retain_batch_size: int | None = change("Retain images in a batch.", ge=1, le=1024)
    neighbour_share: float | None = change("Share of the retain batch that is nearest to the targets.", ge=0, le=1)
    surrogate_share: float | None = change(
        "Share of the noised targets that are noised surrogates instead, as the changed model meets them.", ge=0, le=1
    )
    forget_range: Span | None = change("Timesteps low,high at which targets are noised.")
    max_grad_norm: float | None = change("Norm to which the gradient of a step is clipped.", gt=0)
    stop_margin: float | None = change(
        "Begin the last updates early, once this margin between target and surrogate is held.", ge=-1, le=1
    )

    @field_validator("recipe", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError("a recipe is a name; write its options flat beside it, such as rank = 8")
        return value


class UnlearnConfig(RecipeOptions, DrawConfig, PatchedConfig):
    """What `unforget unlearn` is asked: a field is the option of that name."""

    COMMAND: ClassVar[str] = "unlearn"

    target: Pictures = option(
        "Image to forget, or a folder of them; repeats. demo:0 to demo:3 are pictures that `faces` knows.",
        names=("-t",), reads="file", min_length=1,
    )  # fmt: skip
    surrogate: Surrogates = option(
        "Image to generate instead, one for each target, in order; or a folder, by the targets' names.", (), "made",
        names=("-s",), reads="file",
    )  # fmt: skip
    output: Path = option("Patch to write.", beside("target", ".patch"), "TARGET.patch", names=("-o",), writes="file")
    retain: Path | None = option("Folder of retain images.", None, "drawn from the base", reads="folder")
    patch: tuple[Path, ...] = option(
        "Patch to begin with, which the new one will hold; repeats.", (), "none", reads="patch"
    )
    num_validation_images: int | None = option(
        "Reconstructions for each timestep, and seeds, to show at the end.", None, "8, 4 from 512 px on", ge=1, le=256
    )
    resume: bool = option("Continue the run beside the patch; on a CPU to the same bytes.", False)
    resume_from_checkpoint: str | None = option(
        "The same as --resume: latest, or the folder of this run.", None, "none"
    )
    checkpointing_steps: int | None = option(
        "Updates between two checkpoints.",
        None,
        "what costs under 5 % of the time",
        panel=MACHINE,
        ge=1,
        le=100_000,
    )
    micro_batch: int | None = option(
        "Images in one pass of the network.", None, "by their size", panel=MACHINE, ge=1, le=100_000
    )
    gradient_checkpointing: bool | None = option(
        "Recompute activations: less memory, more time.",
        None,
        "on for large models, unless the card has room",
        panel=MACHINE,
    )
    report_to: Literal["tensorboard", "wandb", "trackio"] | None = option(
        "Tracker that hears of each update, too; needs its package. TensorBoard's files go into NAME.run/logs.", None,
        "none",
    )  # fmt: skip
    use_8bit_adam: bool = option("Keep the optimiser's state in 8 bits; needs bitsandbytes.", False, panel=MACHINE)
    mixed_precision: Literal["auto", "no", "bf16"] = option(
        "Precision of the network's passes; auto is bf16 where the machine has it.", "auto", panel=MACHINE
    )

    @model_validator(mode="before")
    @classmethod
    def _resumed(cls, values: Any) -> Any:
        named = isinstance(values, dict) and values.get("resume_from_checkpoint") is not None
        return {**values, "resume": True} if named else values

    @model_validator(mode="after")
    def _together(self) -> Self:
        paired(self.target, self.surrogate)
        which = self.resume_from_checkpoint
        if which not in (None, "latest") and real(Path(str(which))) != real(self.folder):
            raise ValueError(f"'{which}' is not the run of {self.output}, which is '{self.folder}'")
        return self

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return run_folder(self.output)

    def written_beside(self) -> dict[Path, str]:
        """The folder of the run."""
        return {self.folder: "run"}
