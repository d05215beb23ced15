"""A loaded pipeline behind the `Family` protocol: prompts, images, sampling, scopes, copies."""

import copy
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unforget.core import devices, passes
from unforget.core.schedule import Schedule
from unforget.core.types import UNCONDITIONAL, Scope, Trajectory
from unforget.errors import CannotRun, UsageError
from unforget.families import offload
from unforget.families.loading import Hints, Options, asking
from unforget.families.samplers import Along, sampler
from unforget.families.scopes import check_precision, switch_adapter, trainable
from unforget.families.spec import FamilySpec, Setting, is_guided, tokenizer
from unforget.files.storage import digest

ONE_PASS: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""How a pass is computed again; nothing in it is drawn."""


class DiffusionModel:
    """A stock pipeline, by the row of its family.

    x_0 is the scaled, shifted mean of the autoencoder's posterior, or the pixels where there is no autoencoder. Prompts
    are embedded once, by `prompt_ids`; after `unload_text_encoders` only known prompts work.
    """

    def __init__(self, spec: FamilySpec, pipeline: Any, name: str, options: Options, hints: Hints) -> None:
        self.spec, self.pipeline, self.name, self.device = spec, pipeline, name, torch.device(options.device)
        self.batch_size, self.note, self.options = options.batch_size, options.note, options
        self.schedule, self.plain = Schedule.from_diffusers(pipeline.scheduler), False
        for part in spec.optional:
            if getattr(pipeline, part) is not None and spec.silent(getattr(pipeline, part)):
                pipeline.register_modules(**{part: None, tokenizer(part): None})
        self.absent = tuple(n for n in spec.text_encoders if getattr(pipeline, n) is None)
        self.network = self._placed(getattr(pipeline, spec.network))
        self.vae = getattr(pipeline, spec.autoencoder).to(self.device) if spec.autoencoder else None
        self.guidance, self.retain_prompts = drawing(spec, options, hints)
        factor = 1 if self.vae is None else pixels_wide(spec, self.vae.config)
        self.latent_shape, self.image_shape = shapes(spec, self.network.config, factor, name, options.resolution)
        self.prompts: list[str] = [] if spec.prompted else [""]
        self._conditioning: list[list[Tensor]] = [[] for _ in self.prompts]
        self._read, self._autoencoder = dict[int, str](), list[str]()
        self.prompt_ids([""])
        told = [t.dtype for t in self._conditioning[UNCONDITIONAL] if t.is_floating_point()]
        self.dtype = (told or [torch.float32 if self.vae is None else self.vae.dtype])[0]

    def _placed(self, network: Any) -> Any:
        """A network where and as it is to work."""
        network = self._at_home(network).eval().requires_grad_(False)
        self.spec.adapt(network, self.absent)
        return network

    def _at_home(self, network: Any) -> Any:
        """A network on its device, or beside it."""
        size = self.options.networks * sum(offload.resident(network))
        if offload.waits(network) or offload.wanted(self.options.cpu_offload, self.device, size):
            offload.place(network, self.device)
            return network
        return network.to(self.device)

    @property
    def scheduler_config(self) -> Any:
        """Configuration of its diffusers scheduler."""
        return self.pipeline.scheduler.config

    @property
    def guided(self) -> bool:
        """Whether a draw under a prompt asks the network twice at each step."""
        return is_guided(self.spec, self.guidance)

    def trainable(self, scope: Scope, *, rank: int = 16, alpha: int = 16, seed: int = 0) -> list[nn.Parameter]:
        """See `trainable` below."""
        return trainable(self.spec, self.network, scope, rank=rank, alpha=alpha, seed=seed)

    @torch.no_grad()
    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """The row of each prompt, (len(prompts),); the empty one is `UNCONDITIONAL`.

        Raises:
            UsageError: If the model takes no prompts, or not such long ones.
            CannotRun: If the text encoders were released and a prompt is new.
        """
        if new := [p for p in dict.fromkeys(prompts) if p not in self.prompts]:
            with asking(self.name):
                self._embed(new)
        return torch.tensor([self.prompts.index(p) for p in prompts], dtype=torch.long)

    def _embed(self, prompts: list[str]) -> None:
        """Add prompts to the table; the text encoders are on the device meanwhile, and the network is not."""
        for prompt in prompts:
            self._check_prompt(prompt)
        encoders = [e for e in (getattr(self.pipeline, name) for name in self.spec.text_encoders) if e is not None]
        leaves = bool(encoders) and self.network is not None and not offload.waits(self.network)
        for part, device in [(self.network, "cpu")] * leaves + [(encoder, self.device) for encoder in encoders]:
            part.to(device)
        for prompt in prompts:
            embedded = self.spec.embed(self.pipeline, prompt, self.device)
            self.prompts.append(prompt)
            self._conditioning.append([tensor[0].cpu() for tensor in embedded])
        for part, device in [(encoder, "cpu") for encoder in encoders] + [(self.network, self.device)] * leaves:
            part.to(device)

    def _check_prompt(self, prompt: str) -> None:
        if not self.spec.prompted:
            raise UsageError(f"'{self.name}' takes no prompts", "Leave --prompt out.")
        if not self.spec.text_encoders:
            return
        if self.pipeline.text_encoder is None:
            raise CannotRun(f"the prompt '{prompt}' came after the text encoders were released", "Name it earlier.")
        names = [name for name in self.spec.text_encoders if name not in self.absent]
        words = {name: getattr(self.pipeline, tokenizer(name)) for name in names}
        most = {name: self.spec.reads.get(name, words[name].model_max_length) for name in names}
        found = {name: len(words[name](prompt).input_ids) for name in names}
        short = [name for name in names if found[name] > most[name]]
        if short == names:
            sentence = f"the prompt '{prompt[:40]}...' has {found[names[0]]} tokens, the tokenizer allows"
            raise UsageError(f"{sentence} {max(most.values())}", "Shorten it.")
        if short:
            whole = next(name for name in names if name not in short)
            self.note(
                f"the prompt '{prompt[:40]}...' has {found[short[0]]} tokens: {', '.join(short)} read the first "
                f"{most[short[0]]}, as in the stock pipeline; {whole} reads it whole"
            )

    def made_by(self, prompts: Sequence[str]) -> list[Any]:
        """All that a draw under prompts depends on beside the network's weights, noise and steps, as JSON.

        Text encoders count by what they made of the prompts, with or without T5; the autoencoder by its weights.
        """
        for id in {UNCONDITIONAL, *self.prompt_ids(prompts).tolist()} - set(self._read):
            self._read[id] = digest({str(k): tensor for k, tensor in enumerate(self._conditioning[id])})
        if self.vae is not None and not self._autoencoder:
            self._autoencoder.append(digest(self.vae.state_dict()))
        configs = [self.network.config, self.scheduler_config, {} if self.vae is None else self.vae.config]
        own = [{k: v for k, v in c.items() if k != "_name_or_path"} for c in configs]  # that is another at each load
        return [
            self.spec.name, *(json.dumps(c, sort_keys=True, default=str) for c in own),
            *self._autoencoder, self.image_shape, self.guidance, str(self.dtype), self.absent,
            passes.drawn_in_one_pass(self), devices.machine(str(self.device)), self.batch_size,
            [[prompt, self._read[self.prompts.index(prompt)]] for prompt in dict.fromkeys(["", *prompts])],
        ]  # fmt: skip

    def learnable_embedding(self, prompt_id: int) -> tuple[int, list[Tensor]]:
        """A new row of the table that begins as that of a prompt, and its tensors that gradients may change."""
        row = [tensor.clone() for tensor in self._conditioning[prompt_id]]
        self.prompts.append(f"{self.prompts[prompt_id]} (searched {len(self.prompts)})")
        self._conditioning.append(row)
        return len(self.prompts) - 1, [tensor.requires_grad_() for tensor in row if tensor.is_floating_point()]

    def answers(self) -> dict[str, list[Tensor]]:
        """What the text encoders made of each prompt so far."""
        return dict(zip(self.prompts, self._conditioning, strict=True))

    def unload_text_encoders(self) -> None:
        """Drop the text encoders: the prompts known so far stay."""
        for name in self.spec.text_encoders:
            setattr(self.pipeline, name, None)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """What the network works on, (N, *latent_shape): latents are float32 and on the CPU."""
        vae = self.vae
        if vae is None:
            return pictures
        if not len(pictures):
            return torch.empty(0, *self.latent_shape)
        few = torch.split(pictures, self._in_one_pass)
        with asking(self.name):
            answers = (vae.encode(part.to(vae.device, vae.dtype)) for part in few)
            parts = [a.latent_dist.mode() if hasattr(a, "latent_dist") else next(iter(a.values())) for a in answers]
            return self.spec.to_x_0(vae, torch.cat(parts).float()).cpu()

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Pictures in [-1, 1], (N, C, H, W); those of an autoencoder on the CPU."""
        vae = self.vae
        if vae is not None:
            with asking(self.name):
                few = torch.split(self.spec.to_latents(vae, x_0), self._in_one_pass)
                x_0 = torch.cat([vae.decode(part.to(vae.device, vae.dtype)).sample.float().cpu() for part in few])
        return x_0.clamp(-1, 1)

    @property
    def _in_one_pass(self) -> int:
        """How many pictures the autoencoder takes at once: one of 1024 px needs GiB."""
        return min(8, passes.in_one_pass(8 * 256 * 256, self.image_shape))

    def predict(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        """The network's answer at (x_t, timestep, prompt_ids), float32, on the device of x_t."""
        device = self.device
        told = zip(*(self._conditioning[i] for i in prompt_ids.tolist()), strict=True)
        conditioning = [torch.stack(tensors).to(device) for tensors in told]
        with asking(self.name), self._adapter():
            answer = self.spec.call(
                self.network, x_t.to(device, self.dtype), timestep.to(device, torch.float32), conditioning,
                Setting(self.image_shape[1:], self.guidance),
            )  # fmt: skip
        return answer.float().to(x_t.device)

    @contextmanager
    def _adapter(self) -> Iterator[None]:
        """Switch the LoRA off for the length of a call, where this is the view without it."""
        if not self.plain or not getattr(self.network, "_hf_peft_config_loaded", False):
            yield
            return
        switch_adapter(self.network, False)
        try:
            yield
        finally:
            switch_adapter(self.network, True)

    def _sampler(self, steps: int, name: str | None = None) -> Any:
        return sampler(self.spec, self.scheduler_config, steps, self.latent_shape, name)

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
            with asking(self.name):
                answer = self._guided(scaled(x_t, t), t.expand(1), prompt_ids)
                x_t = sampler.step(answer, t, x_t, **draws).prev_sample
        return x_t

    def sampling_timesteps(self, steps: int) -> list[float]:
        """The timesteps that `denoise` visits, from noisy to clean."""
        return [float(t) for t in self._sampler(steps).timesteps]

    def denoise(
        self, x_t: Tensor, *, steps: int | Trajectory, start: float | None = None, stop: float = -1,
        prompt_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """DDIM (arXiv:2010.02502, eta 0), Euler, or along a trajectory, with classifier-free guidance; returns x_0.

        From pure noise, or from the visited timesteps at `start` and below; only those above `stop`.
        """
        prompt_ids = torch.full((len(x_t),), UNCONDITIONAL) if prompt_ids is None else prompt_ids
        told = self
        if isinstance(steps, Trajectory) and steps.guidance is not None:
            told = copy.copy(self)
            told.guidance = steps.guidance
        sampler = self._sampler(steps) if isinstance(steps, int) else Along(self.schedule, steps, self.vae is None)
        first = 0 if start is None else int((sampler.timesteps > start).sum())
        if hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(first)
        for t in sampler.timesteps[first : int((sampler.timesteps > stop).sum())]:
            given = x_t, t.expand(len(x_t)), prompt_ids
            # Where gradients go through the whole chain, one pass is kept at a time and computed again.
            again = torch.is_grad_enabled() and x_t.requires_grad
            answer = checkpoint(told._guided, *given, **ONE_PASS) if again else told._guided(*given)
            with asking(self.name):
                x_t = sampler.step(answer, t, x_t).prev_sample
        return x_t

    def _guided(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        if self.guidance is None or not self.guided or bool((prompt_ids == UNCONDITIONAL).all()):
            return self.predict(x_t, timestep, prompt_ids)
        both = torch.cat([torch.full_like(prompt_ids, UNCONDITIONAL), prompt_ids])
        plain, asked = self.predict(torch.cat([x_t, x_t]), timestep.repeat(2), both).chunk(2)
        return plain + self.guidance * (asked - plain)

    def copy(self) -> Self:
        """An independent model with equal, frozen weights; all but the network is shared."""
        twin = copy.copy(self)
        twin.pipeline = copy.copy(self.pipeline)
        twin.network = self._at_home(copy.deepcopy(self.network)).requires_grad_(False).eval()
        setattr(twin.pipeline, self.spec.network, twin.network)
        return twin

    def frozen_reference(self, scope: Scope) -> Self:
        """For `lora` the same network with the adapter off, no second copy; else a copy.

        CannotRun if the scope's weights cannot be trained: see `trainable`.
        """
        check_precision(self.network, scope)
        if scope != "lora":
            return self.copy()
        view = copy.copy(self)
        view.plain = True
        return view

    def set_network(self, network: Any) -> None:
        """Another network of the same class, in the precision of the prompts, or none."""
        self.network = None if network is None else self._placed(network.to(self.dtype))
        setattr(self.pipeline, self.spec.network, self.network)


def pixels_wide(spec: FamilySpec, autoencoder: Any) -> int:
    """How many pixels a place of x_0 is wide, by an autoencoder's configuration."""
    widths = autoencoder.get("encoder_block_out_channels") or autoencoder["block_out_channels"]
    return int(spec.gathered * 2 ** (len(widths) - 1))


Shape = tuple[int, int, int]


def shapes(spec: FamilySpec, config: Any, factor: int, name: str, resolution: int | None) -> tuple[Shape, Shape]:
    """(C, H, W) of what the network works on and of pictures, at the model's own resolution or another one.

    UsageError if the network cannot work at it, or is that of another kind of model.
    """
    if reason := spec.unfit(config):
        raise UsageError(f"'{name}' {reason}", f"Give a {spec.title} that draws pictures from noise alone.")
    channels, size = spec.latent(config)
    if not spec.autoencoder:
        height, width = (size, size) if isinstance(size, int) else size
        return (channels, height, width), (channels, height, width)
    side = resolution or size * factor
    unit, most = spec.latent_side(config)
    if side % (unit * factor) or side > most * factor:
        hint = f"Give a --resolution that is a multiple of {unit * factor}, {most * factor} at most."
        raise UsageError(f"'{name}' cannot draw {side}x{side} pixels", hint)
    return (channels, side // factor, side // factor), (3, side, side)


def drawing(spec: FamilySpec, options: Options, hints: Hints) -> tuple[float | None, tuple[str, ...]]:
    """Guidance, where there is such, and the prompts under which a model draws what is to be retained."""
    guidance = spec.guidance and (options.guidance or hints.guidance or spec.guidance)
    return guidance, (hints.retain_prompts or spec.everyday or _everyday_prompts()) if spec.prompted else ("",)


def _everyday_prompts() -> tuple[str, ...]:
    """The built-in list of retain prompts: everyday pictures of many kinds."""
    return tuple((files("unforget.families") / "models" / "retain_prompts.txt").read_text().split("\n")[:-1])
