"""The recipes that rows name: ours, the paper's, and the field's baselines, which all rows have (docs/recipes.md)."""

from unforget.core.objectives import (
    ESD,
    SISS,
    CleanSpace,
    ConceptAblation,
    Linear,
    NegGrad,
    PosteriorSwap,
    RandomSurrogate,
    ReTrack,
    Surrogate,
    Uniform,
    UniformNoise,
)
from unforget.core.recipe import Recipe
from unforget.core.strategy import Span
from unforget.core.surgery import EraseDiff, FixedNorm, ForgetOnly, RetainOnly, Sum

PAPER = Recipe(
    objective=Surrogate(one_noise=True), train="full", learning_rate=5e-6, max_train_steps=240, warmup_steps=0,
    cooldown_steps=0, sequential=True, forget_batch_size=1, retain_batch_size=8, neighbour_share=0,
    forget_range=(1, 1000),
)  # fmt: skip
"""arXiv:2603.10445 on google/ddpm-celebahq-256; its learning rate belongs to a model of 114 M parameters."""


def pixel_recipes() -> dict[str, Recipe]:
    """Those of models without prompts, trained where they tell one image from another."""
    ours = Recipe(damping=0.1, learning_rate=1.5e-4)
    return {"default": ours, "paper": PAPER, **baselines(PAPER, update_share=0.004)}


def latent_recipes(
    *, taper: Span, forget_range: Span, updates: int = 180, damping: float | None = None
) -> dict[str, Recipe]:
    """Those of text-to-image models on latents, at noise levels where their images are told apart.

    A prompt says at pure noise what will be drawn, so forgetting reaches up to there. The paper's is that for Stable
    Diffusion 3, whose learning rate belongs to 2 B weights.
    """
    ours = Recipe(
        objective=PosteriorSwap(weighting=CleanSpace(cap=1.0, retain=200.0), taper=taper, normalize_edit=True),
        train="lora", learning_rate=None, update_share=0.05, max_train_steps=updates,
        cooldown_steps=round(0.61 * updates), forget_batch_size=4, retain_batch_size=12, surrogate_share=0.5,
        forget_range=forget_range, damping=damping,
    )  # fmt: skip
    objective = Surrogate(one_noise=True, weighting=Linear(beta=2e-4))
    paper = PAPER.model_copy(
        update={"objective": objective, "train": "lora", "learning_rate": 1e-5, "max_train_steps": 100}
    )
    few = {"forget_batch_size": 4, "retain_batch_size": 4}
    return {"default": ours, "paper": paper, **baselines(paper, update_share=0.05, by_prompt=True, **few)}


def baselines(
    paper: Recipe, *, update_share: float, by_prompt: bool = False, forget_batch_size: int = 16,
    retain_batch_size: int = 16,
) -> dict[str, Recipe]:  # fmt: skip
    """What the field compares with, as far from the paper's recipe as each is from the paper (docs/recipes.md).

    Updates are those of their papers. Their rates belong to networks of other widths, so they are by `update_share`.
    """
    sizes = {"forget_batch_size": forget_batch_size, "retain_batch_size": retain_batch_size}
    common = paper.model_copy(
        update={"learning_rate": None, "update_share": update_share, "surgery": Sum(), "sequential": False, **sizes}
    )
    random = RandomSurrogate(**paper.objective.model_dump(include={"weighting", "one_noise"}))
    changed = {
        "naive": {"objective": NegGrad(), "surgery": RetainOnly(), "max_train_steps": 60},
        "neggrad": {"objective": NegGrad(), "surgery": ForgetOnly(), "max_train_steps": 10},
        "erasediff": {"objective": UniformNoise(), "surgery": EraseDiff(), "max_train_steps": 60},
        "salun": {"objective": RandomSurrogate(weighting=Uniform()), "saliency": 0.5, "max_train_steps": 60},
        "siss": {"objective": SISS(), "surgery": FixedNorm(), "max_train_steps": 60},
        "retrack": {"objective": ReTrack(weighting=Uniform(retain=1 if by_prompt else 199)), "max_train_steps": 40},
    }
    if by_prompt:
        changed |= {
            "esd": {"objective": ESD(), "surgery": ForgetOnly(), "max_train_steps": 180},
            "concept-ablation": {"objective": ConceptAblation(), "max_train_steps": 180},
        }
    made = {name: common.model_copy(update=update) for name, update in changed.items()}
    return {"random-surrogate": paper.model_copy(update={"objective": random}), **made}
