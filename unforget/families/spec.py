"""What is particular of a family of models, as data and a few small functions; a row a family, in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from unforget.core.recipe import Recipe
from unforget.core.types import Scope
from unforget.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unforget.families.layouts import Layout

Config = Mapping[str, Any]
"""Of a network, as diffusers writes it."""


class Setting(NamedTuple):
    """What a network may want to know of a draw besides its prompt."""

    size: tuple[int, int]  # (H, W) of its pictures
    guidance: float | None


def scaled(autoencoder: Any, latents: Tensor) -> Tensor:
    """What an autoencoder answers, as its configuration wants it to be worked on."""
    config = autoencoder.config
    x_0: Tensor = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    return x_0


def unscaled(autoencoder: Any, x_0: Tensor) -> Tensor:
    """The inverse of `scaled`."""
    config = autoencoder.config
    latents: Tensor = x_0 / config.scaling_factor + (config.get("shift_factor") or 0.0)
    return latents


def _set_timesteps(sampler: Any, steps: int, latent_shape: tuple[int, int, int]) -> None:
    sampler.set_timesteps(steps)


@dataclass(frozen=True, eq=False, kw_only=True)
class FamilySpec:
    """A row, of a transformer that draws latents by prompts where it says nothing else.

    Classes are names of diffusers, unless said otherwise: nothing is imported before it is needed.
    """

    name: str  # sd3
    title: str  # what people call it: Stable Diffusion 3
    pipeline_class: str  # the stock pipeline, `_class_name` in model_index.json
    also: tuple[str, ...] = ()  # others, of the same parts
    network: str = "transformer"  # the part that is trained: its name, its subfolder, the prefix of its LoRAs
    network_class: str
    network_also: tuple[str, ...] = ()  # what diffusers called that class before
    prompted: bool = True  # whether prompts say what is drawn
    everyday: tuple[str, ...] = ()  # prompts of what is to be retained, instead of the built-in list
    scopes: tuple[Scope, ...] = ("lora", "full")  # which weights can be trained, the default first
    recipes: Mapping[str, Recipe]  # by name: `pixel_recipes` or `latent_recipes`
    formats: tuple[str, ...]  # of export
    task: str = "text-to-image"  # what the hub calls what it does
    architecture: Callable[[Config], str]  # ModelSpec's name of a network with a configuration
    sampler: str  # the class that `denoise` steps with
    schedulers: tuple[str, ...] = ()  # that a folder may have besides that and those that diffusers makes of its like
    call: Callable[[Any, Tensor, Tensor, Sequence[Tensor], Setting], Tensor]
    """The network's answer at (network, x_t, timestep, conditioning, setting)."""
    autoencoder: str = "vae"  # its name in the pipeline; none for models that draw pixels
    autoencoders: tuple[str, ...] = ("AutoencoderKL",)  # the classes that it may have
    to_x_0: Callable[[Any, Tensor], Tensor] = scaled
    """What the network works on, of (autoencoder, latents)."""
    to_latents: Callable[[Any, Tensor], Tensor] = unscaled  # its inverse
    gathered: int = 1  # latents of a side that x_0 has in one place, in channels
    reference: str = ""  # code that reads its original layout, for ModelSpec
    lora_targets: tuple[str, ...] = ()  # names of the projections that a LoRA is beside
    aliases: Mapping[str, str] = field(default_factory=dict)  # hub ids by a short name
    sampler_options: Mapping[str, Any] = field(default_factory=dict)  # what is changed in the sampler's configuration
    bottleneck: Callable[[Any], Iterable[nn.Parameter]] | None = None  # the weights of that scope
    adapt: Callable[[Any, Sequence[str]], None] = lambda network, absent: None
    """Changes a network, given the names of the text encoders that the pipeline lacks."""
    text_encoders: Mapping[str, str] = field(default_factory=dict)  # their classes in transformers, by part
    optional: tuple[str, ...] = ()  # text encoders that may be left out
    silent: Callable[[Any], bool] = lambda encoder: False
    """Whether an optional text encoder answers what stands in its place where it is left out."""
    reads: Mapping[str, int] = field(default_factory=dict)  # tokens that they read, where the tokenizer says otherwise
    embed: Callable[[Any, str, Any], tuple[Tensor, ...]] = lambda pipeline, prompt, device: ()
    """The conditioning that (pipeline, prompt, device) comes to, tensors (1, ...).

    The empty prompt is the unconditional one; whatever stands for it is embedded here.
    """
    conditioning_shapes: Callable[[Config], tuple[tuple[int, ...], ...]] = lambda config: ()  # for the memory plan
    guidance: float | None = None  # of its draws, where there is such
    distilled: bool = False  # whether guidance is told to the network; else it is classifier-free, two passes a step
    float32: bool = False  # whether it is always computed in float32, which otherwise depends on its size
    vae_dtype: str = ""  # precision of the autoencoder, torch's name; that of the rest if empty
    timesteps: Callable[[Any, int, tuple[int, int, int]], None] = _set_timesteps
    """Sets those that (sampler, steps, latent_shape) visit."""
    latent: Callable[[Config], tuple[int, int]] = lambda config: (config["in_channels"], config["sample_size"])
    """Channels and own width of latents."""
    latent_side: Callable[[Config], tuple[int, int]] = lambda config: (1, 1024)
    """What a latent's width must be a multiple of, and its maximum."""
    unfit: Callable[[Config], str] = lambda config: ""
    """Why a network of its class with a configuration is another kind of model; empty if it is not."""
    blocks: Callable[[Config], int] = lambda config: 1  # how many parts checkpointing splits the network into
    passed: Mapping[str, Any] = field(default_factory=dict)  # what stock `from_pretrained` is given besides
    refused: Mapping[str, str] = field(default_factory=dict)
    """Pipeline classes that look like this family's and are not, with what to give instead."""
    layout: Layout | None = None  # the names in its original single file, if it has one


def tokenizer(text_encoder: str) -> str:
    """The tokenizer of a text encoder, by the names of the parts."""
    return text_encoder.replace("text_encoder", "tokenizer")


def is_inside(spec: FamilySpec, part: str, names: Iterable[str]) -> bool:
    """Whether a single file with tensors of such names holds an autoencoder or text encoder."""
    assert spec.layout is not None
    begin = {spec.autoencoder: spec.layout.vae_prefix, **spec.layout.text_encoders}[part]
    return any(name.startswith(begin) for name in names)


def is_guided(spec: FamilySpec, guidance: float | None) -> bool:
    """Whether a draw under a prompt asks the network twice at each step."""
    return guidance not in (None, 1) and not spec.distilled


def check_scope(spec: FamilySpec, scope: Scope) -> None:
    """UsageError for a scope that a family does not have."""
    if scope not in spec.scopes:
        raise UsageError(f"{spec.title} has no --train {scope}", f"Give --train {' or '.join(spec.scopes)}.")
