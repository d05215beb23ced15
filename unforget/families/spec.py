"""What is particular of a family of models, as data and a few small functions; a row a family, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unforget.core.objectives import Surrogate
from unforget.core.recipe import Recipe
from unforget.core.types import Scope
from unforget.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unforget.families.layouts import Layout

Config = Mapping[str, Any]
"""Of a network, as diffusers writes it."""
PAPER = Recipe(
    objective=Surrogate(), train="full", learning_rate=5e-6, max_train_steps=240, warmup_steps=0, cooldown_steps=0,
    forget_batch_size=8, retain_batch_size=8, neighbour_share=0, forget_range=(1, 1000), stop_margin=None,
)  # fmt: skip
"""arXiv:2603.10445 on google/ddpm-celebahq-256; its learning rate belongs to a model of 114 M parameters."""


def _latent(*args: Any) -> Any:
    from unforget.families.latent import LatentTextToImage

    return LatentTextToImage(*args)


@dataclass(frozen=True, eq=False, kw_only=True)
class FamilySpec:
    """A row. Classes are names of diffusers, unless said otherwise: nothing is imported before it is needed.

    Attributes:
        name: Its name: sd3.
        title: What people call it: Stable Diffusion 3.
        pipeline_class: The stock pipeline, `_class_name` in model_index.json.
        inpaint_class: The stock pipeline that inpaints with the same parts; none for models that draw pixels.
        network: The part that is trained: its name in the pipeline, its subfolder, the prefix of its LoRAs.
        network_class: Its class.
        prompted: Whether prompts say what is drawn.
        scopes: Which weights can be trained, the default first.
        recipes: By name; there is a `default` and a `paper`.
        formats: Export formats that it has.
        task: What the hub calls what it does.
        architecture: ModelSpec's name of a network with a configuration.
        reference: Code that reads its original layout, for ModelSpec.
        lora_targets: Names of the projections that a LoRA is beside.
        aliases: Hub ids by a short name.
        sampler: The class that `denoise` steps with.
        sampler_options: What is changed in its configuration.
        model: Makes the `Family` of (spec, pipeline, name, options, hints).
        call: The network's answer at (network, x_t, timestep, conditioning).
        bottleneck: The weights of that scope.
        adapt: Changes a network, given the names of the text encoders that the pipeline lacks.
        text_encoders: Their classes in transformers, by part.
        optional: Those that may be left out.
        embed: What (pipeline, prompt, device) comes to, a tensor (1, ...) for each name in `conditioning`. The empty
            prompt is the unconditional one; whatever stands for it is embedded here.
        conditioning: The tensors' names as arguments of the stock pipelines; `negative_` before them is against it.
        conditioning_shapes: Their shapes, for the memory plan.
        guidance: Classifier-free guidance of its draws, where there is such.
        float32: Whether it is always computed in float32, which otherwise depends on its size.
        vae_dtype: Precision of the autoencoder, torch's name; that of the rest if empty.
        latent_side: What a latent's width must be a multiple of, and its maximum.
        blocks: How many parts checkpointing splits the network into.
        passed: What stock `from_pretrained` is given besides; a part that is None here is not loaded.
        layout: The names in its original single file, if it has one.
    """

    name: str
    title: str
    pipeline_class: str
    network: str
    network_class: str
    prompted: bool
    scopes: tuple[Scope, ...]
    recipes: Mapping[str, Recipe]
    formats: tuple[str, ...]
    task: str
    architecture: Callable[[Config], str]
    sampler: str
    call: Callable[[Any, Tensor, Tensor, Sequence[Tensor]], Tensor]
    inpaint_class: str = ""
    reference: str = ""
    lora_targets: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    model: Callable[..., Any] = _latent
    bottleneck: Callable[[Any], Iterable[nn.Parameter]] | None = None
    adapt: Callable[[Any, Sequence[str]], None] = lambda network, absent: None
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    embed: Callable[[Any, str, Any], tuple[Tensor, ...]] = lambda pipeline, prompt, device: ()
    conditioning: tuple[str, ...] = ()
    conditioning_shapes: Callable[[Config], tuple[tuple[int, ...], ...]] = lambda config: ()
    guidance: float | None = None
    float32: bool = False
    vae_dtype: str = ""
    latent_side: Callable[[Config], tuple[int, int]] = lambda config: (1, 1024)
    blocks: Callable[[Config], int] = lambda config: 1
    passed: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout | None = None


def tokenizer(text_encoder: str) -> str:
    """The tokenizer of a text encoder, by the names of the parts."""
    return text_encoder.replace("text_encoder", "tokenizer")


def check_scope(spec: FamilySpec, scope: Scope) -> None:
    """Refuse a scope that a family does not have.

    Raises:
        UsageError: If it has not.
    """
    if scope not in spec.scopes:
        raise UsageError(f"{spec.title} has no --train {scope}", f"Give --train {' or '.join(spec.scopes)}.")
