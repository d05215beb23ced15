"""What a run computes, as one frozen record: it is chosen by name, changed by options, and kept in the patch."""

from pydantic import Field, SerializeAsAny

from unforget.core.objectives import CleanSpace, Objective, PosteriorSwap
from unforget.core.strategy import Scope, Span, Strategy
from unforget.core.surgery import Project, Surgery


class Recipe(Strategy):
    """How the weights are changed. Recorded in the patch."""

    # One of your own is taken by `model_copy` (`unforget.unlearn`), and written with all its fields.
    objective: SerializeAsAny[Objective] = PosteriorSwap(weighting=CleanSpace(cap=400.0, retain=12.0))
    surgery: Surgery = Project()
    train: Scope = "bottleneck"
    # Of the gradients, added to the second moment of what retain images feed a layer, in units of its mean; None: none.
    damping: float | None = Field(None, gt=0)
    saliency: float | None = Field(None, gt=0, le=1)  # share of those weights that move: the largest forget gradients
    learning_rate: float | None = Field(1e-4, gt=0, le=1)  # None: by `update_share`
    update_share: float = Field(0.05, gt=0, le=1)  # most that an update may change of a projection's answer
    max_train_steps: int = Field(120, ge=1, le=100_000)
    warmup_steps: int = Field(5, ge=0)
    cooldown_steps: int = Field(100, ge=0)
    sequential: bool = False  # targets one after another, not side by side
    forget_batch_size: int = Field(8, ge=1, le=1024)
    retain_batch_size: int = Field(24, ge=1, le=1024)
    neighbour_share: float = Field(0.5, ge=0, le=1)
    surrogate_share: float = Field(0.0, ge=0, le=1)  # of the forget batch, shown as surrogates instead of targets
    forget_range: Span = (50, 650)  # timesteps at which targets are noised, from the first to under the second
    max_grad_norm: float = Field(1.0, gt=0)
    rank: int = Field(16, ge=1, le=1024)
    lora_alpha: int = Field(16, ge=1)
    stop_margin: float | None = Field(None, ge=-1, le=1)
