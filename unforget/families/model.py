"""What all families have in common: sampling, scopes, copies."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from unforget.core.schedule import Schedule
from unforget.core.types import UNCONDITIONAL, Scope
from unforget.errors import UsageError
from unforget.families.spec import FamilySpec, check_scope


class DiffusionModel:
    """A stock pipeline and the row of its family; subclasses say what images and prompts are to the network."""

    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]

    def __init__(self, spec: FamilySpec, pipeline: Any, name: str, device: str = "cpu") -> None:
        self.spec, self.pipeline, self.name, self.device = spec, pipeline, name, torch.device(device)
        self.guidance = spec.guidance
        self.dtype = torch.float32
        self.schedule = Schedule.from_diffusers(pipeline.scheduler)
        self.plain = False
        self.network = self._placed(getattr(pipeline, spec.network))

    def _placed(self, network: Any) -> Any:
        """A network where and as it is to work."""
        raise NotImplementedError

    def predict(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        """The network's answer at (x_t, timestep, prompt_ids), on the device of x_t."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """Name of the family."""
        return self.spec.name

    @property
    def scheduler_config(self) -> Any:
        """Configuration of its diffusers scheduler."""
        return self.pipeline.scheduler.config

    def trainable(self, scope: Scope, *, rank: int = 16, alpha: int = 16, seed: int = 0) -> list[nn.Parameter]:
        """See `trainable` below."""
        return trainable(self.spec, self.network, scope, rank=rank, alpha=alpha, seed=seed)

    def _sampler(self, steps: int, name: str | None = None) -> Any:
        options = {} if name else self.spec.sampler_options
        sampler = sampler_named(name or self.spec.sampler, self.scheduler_config, **options)
        sampler.set_timesteps(steps)
        return sampler

    @torch.no_grad()
    def replay(self, seed: int, *, steps: int, scheduler: str | None, prompt_ids: Tensor) -> Tensor:
        """What the stock pipeline draws with `torch.Generator().manual_seed(seed)`; returns x_0."""
        generator = torch.Generator().manual_seed(seed)
        sampler = self._sampler(steps, scheduler)
        scaled = getattr(sampler, "scale_model_input", lambda x_t, t: x_t)
        x_t = torch.randn((1, *self.latent_shape), generator=generator, dtype=self.dtype)
        x_t = (x_t * getattr(sampler, "init_noise_sigma", 1)).float()
        draws = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
        for t in sampler.timesteps:
            answer = self._guided(scaled(x_t, t), t.expand(1), prompt_ids)
            x_t = sampler.step(answer, t, x_t, **draws).prev_sample
        return x_t

    def sampling_timesteps(self, steps: int) -> list[float]:
        """The timesteps that `denoise` visits, from noisy to clean."""
        return [float(t) for t in self._sampler(steps).timesteps]

    def denoise(
        self, x_t: Tensor, *, steps: int, start: float | None = None, stop: float = -1, prompt_ids: Tensor | None = None
    ) -> Tensor:
        """Steps of DDIM (arXiv:2010.02502, eta 0) or Euler with classifier-free guidance; returns x_0.

        From pure noise, or from the visited timesteps at `start` and below; only those above `stop`.
        """
        prompt_ids = torch.full((len(x_t),), UNCONDITIONAL) if prompt_ids is None else prompt_ids
        sampler = self._sampler(steps)
        first = 0 if start is None else int((sampler.timesteps > start).sum())
        if hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(first)
        for t in sampler.timesteps[first : int((sampler.timesteps > stop).sum())]:
            x_t = sampler.step(self._guided(x_t, t.expand(len(x_t)), prompt_ids), t, x_t).prev_sample
        return x_t

    def _guided(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        if self.guidance in (None, 1) or bool((prompt_ids == UNCONDITIONAL).all()):
            return self.predict(x_t, timestep, prompt_ids)
        both = torch.cat([torch.full_like(prompt_ids, UNCONDITIONAL), prompt_ids])
        plain, asked = self.predict(torch.cat([x_t, x_t]), timestep.repeat(2), both).chunk(2)
        return plain + self.guidance * (asked - plain)

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        """Switch the LoRA off for the length of a call, where this is the view without it."""
        if not self.plain or not getattr(self.network, "_hf_peft_config_loaded", False):
            yield
            return
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def copy(self) -> Self:
        """An independent model with equal, frozen weights; all but the network is shared."""
        twin = copy.copy(self)
        twin.pipeline, twin.network = copy.copy(self.pipeline), copy.deepcopy(self.network).requires_grad_(False).eval()
        setattr(twin.pipeline, self.spec.network, twin.network)
        return twin

    def frozen_reference(self, scope: Scope) -> Self:
        """For `lora` the same network with the adapter off, no second copy; else a copy."""
        if scope != "lora":
            return self.copy()
        view = copy.copy(self)
        view.plain = True
        return view

    def set_network(self, network: Any) -> None:
        """Another network of the same class, or none."""
        self.network = None if network is None else self._placed(network)
        setattr(self.pipeline, self.spec.network, self.network)


def trainable(
    spec: FamilySpec, network: Any, scope: Scope, *, rank: int, alpha: int, seed: int
) -> list[nn.Parameter]:  # fmt: skip
    """The weights of a scope, in the network's order; for `lora`, of an adapter that is added if need be.

    Raises:
        UsageError: If the family has no such scope.
    """
    check_scope(spec, scope)
    if scope == "full":
        return list(network.parameters())
    if scope == "bottleneck" and spec.bottleneck is not None:
        return list(spec.bottleneck(network))
    if not getattr(network, "_hf_peft_config_loaded", False):
        from peft import LoraConfig

        targets = list(spec.lora_targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
            )
    return [p for name, p in network.named_parameters() if ".lora_" in name]


def sampler_named(name: str, config: Any, **options: Any) -> Any:
    """A diffusers scheduler with a model's configuration.

    Raises:
        UsageError: If diffusers has no such class, or it takes no such configuration.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UsageError(f"diffusers has no scheduler '{name}'", "Give a class name, such as DDIMScheduler.")
    try:
        return kind.from_config(config, **options)  # type: ignore[attr-defined]
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"the scheduler '{name}' does not fit this model: {error}", "Give another.") from None


def pixels(config: Any) -> tuple[int, int, int]:
    """(C, H, W) of what a network that works on pixels draws."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width
