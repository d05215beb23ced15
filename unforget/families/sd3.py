"""Text-to-image flow models: diffusers' `StableDiffusion3Pipeline` (SD3, SD3.5)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from unforget.core.schedule import Schedule
from unforget.core.types import Scope
from unforget.errors import CannotRun, UsageError
from unforget.families import spec
from unforget.families.pipelines import ENCODERS
from unforget.families.samplers import named, step

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""Attention projections of the MMDiT blocks, as in diffusers' own LoRA script for SD3."""
ABSENT = 256
"""Tokens of zeros that the pipeline puts where T5 is missing (its `max_sequence_length`)."""


class _LastCounts(TorchFunctionMode):
    """Attention where the last key counts `ABSENT` times."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            query, key = args[:2]
            kwargs["attn_mask"] = query.new_zeros(1, 1, 1, key.shape[2])
            kwargs["attn_mask"][..., -1] = math.log(ABSENT)
        return func(*args, **kwargs)


class WithoutT5(JointAttnProcessor2_0):  # type: ignore[misc]
    """SD3's attention for one token in place of T5's 256 equal ones.

    Context has no positions, so equal tokens stay equal through all layers; one of them, with the logarithm of their
    number added to its score, is exactly all of them.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **named: Any
    ) -> Any:
        if encoder_hidden_states is None:  # SD3.5's second attention sees the image alone
            return super().__call__(attn, hidden_states, None, *args, **named)
        with _LastCounts():
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **named)


class SD3:
    """A `StableDiffusion3Pipeline` behind the `Family` protocol; x_0 is the scaled, shifted posterior mean of its VAE.

    Prompts are embedded once, by `prompt_ids`; after `release` the text encoders are gone and only known prompts work.

    Args:
        pipeline: The loaded pipeline, with two text encoders or three.
        name: What the user called it.
        guidance: Classifier-free guidance of every draw; 1 is none.
        resolution: Width and height of pictures, pixels; the model's own unless given.
        retain_prompts: Prompts for the pictures to keep.
        device: Where network, autoencoder and (while they embed) text encoders work.
    """

    kind = "sd3"
    spec = spec.SD3

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, name: str = "model", *, guidance: float = 7.0,
        resolution: int | None = None, retain_prompts: Sequence[str] = (), device: str = "cpu",
    ) -> None:  # fmt: skip
        self.pipeline, self.name, self.guidance, self.device = pipeline, name, guidance, torch.device(device)
        self.network = pipeline.transformer.to(self.device).eval().requires_grad_(False)
        pipeline.vae.to(self.device)
        self.schedule = Schedule.from_diffusers(pipeline.scheduler)
        self.retain_prompts = tuple(retain_prompts)
        config, factor = self.network.config, pipeline.vae_scale_factor
        side = resolution or config.sample_size * factor
        unit = factor * config.patch_size
        if side % unit or side // unit > config.pos_embed_max_size:
            raise UsageError(
                f"'{name}' cannot draw {side}x{side} pixels",
                f"Give a --resolution that is a multiple of {unit}, {unit * config.pos_embed_max_size} at most.",
            )
        self.latent_shape = (config.in_channels, side // factor, side // factor)
        self.image_shape = (3, side, side)
        self.short = pipeline.text_encoder_3 is None
        if self.short:
            self.network.set_attn_processor(WithoutT5())
        self.plain = False
        self.prompts: list[str] = []
        self._embeds: list[Tensor] = []
        self._pooled: list[Tensor] = []
        self.prompt_ids([""])

    @property
    def scheduler_config(self) -> Any:
        """Configuration of its diffusers scheduler."""
        return self.pipeline.scheduler.config

    @torch.no_grad()
    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """The row of each prompt, (len(prompts),); row 0 is the empty one.

        Raises:
            UsageError: If a prompt is longer than the tokenizer allows.
            CannotRun: If the text encoders were released and a prompt is new.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self.prompts]
        for prompt in new:
            self._check_length(prompt)
        with self._encoders() if new else nullcontext():
            for prompt in new:
                embeds, _, pooled, _ = self.pipeline.encode_prompt(
                    prompt, prompt, prompt, device=self.device, do_classifier_free_guidance=False
                )
                length = self.pipeline.tokenizer_max_length + 1 if self.short else embeds.shape[1]
                self.prompts.append(prompt)
                self._embeds.append(embeds[0, :length].cpu())
                self._pooled.append(pooled[0].cpu())
        return torch.tensor([self.prompts.index(p) for p in prompts])

    @contextmanager
    def _encoders(self) -> Iterator[None]:
        """The text encoders on the network's device, for as long as they embed."""
        encoders = [e for e in (getattr(self.pipeline, name) for name in ENCODERS) if e is not None]
        for encoder in encoders:
            encoder.to(self.device)
        yield
        for encoder in encoders:
            encoder.to("cpu")

    def embedded(self, row: int) -> dict[str, Tensor]:
        """A prompt as the stock pipelines of the same weights take it, with the empty one against it."""
        return {
            "prompt_embeds": self._embeds[row][None], "pooled_prompt_embeds": self._pooled[row][None],
            "negative_prompt_embeds": self._embeds[0][None], "negative_pooled_prompt_embeds": self._pooled[0][None],
        }  # fmt: skip

    def _check_length(self, prompt: str) -> None:
        if self.pipeline.text_encoder is None:
            raise CannotRun(f"the prompt '{prompt}' came after the text encoders were released", "Name it earlier.")
        found = len(self.pipeline.tokenizer(prompt).input_ids)
        most = self.pipeline.tokenizer_max_length
        if found > most:
            raise UsageError(
                f"the prompt '{prompt[:40]}...' has {found} tokens, the tokenizer allows {most}", "Shorten it."
            )

    def unload_text_encoders(self) -> None:
        """Drop the text encoders: the prompts known so far stay."""
        for name in ENCODERS:
            setattr(self.pipeline, name, None)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Scaled, shifted posterior means, (N, 16, H / 8, W / 8), float32, on the CPU."""
        if not len(pictures):
            return torch.empty(0, *self.latent_shape)
        vae = self.pipeline.vae
        parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode() for part in torch.split(pictures, 8)]
        latents: Tensor = (torch.cat(parts).float() - vae.config.shift_factor) * vae.config.scaling_factor
        return latents.cpu()

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Pictures in [-1, 1], (N, 3, H, W), on the CPU."""
        vae = self.pipeline.vae
        x_0 = x_0 / vae.config.scaling_factor + vae.config.shift_factor
        parts = [vae.decode(part.to(vae.device, vae.dtype)).sample.float().cpu() for part in torch.split(x_0, 8)]
        return torch.cat(parts).clamp(-1, 1)

    def predict(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        """The network's answer at (x_t, timestep, prompt_ids), float32, on the device of x_t."""
        dtype = self._embeds[0].dtype
        rows = prompt_ids.tolist()
        with self._adapter():
            answer: Tensor = self.network(
                x_t.to(self.device, dtype),
                torch.stack([self._embeds[r] for r in rows]).to(self.device),
                torch.stack([self._pooled[r] for r in rows]).to(self.device),
                timestep.to(self.device, torch.float32),
                return_dict=False,
            )[0]
        return answer.float().to(x_t.device)

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

    def trainable(self, scope: Scope, *, rank: int = 16, alpha: int = 16, seed: int = 0) -> list[nn.Parameter]:
        """`full`, or `lora`: an adapter on `LORA_TARGETS`, added now unless it is there."""
        if scope == "bottleneck":
            raise UsageError(f"'{self.name}' has no bottleneck", "Give --train lora or full.")
        return trainable(self.network, scope, rank=rank, alpha=alpha, seed=seed)

    def _sampler(self, steps: int) -> Any:
        sampler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config)
        sampler.set_timesteps(steps)
        return sampler

    @torch.no_grad()
    def replay(self, seed: int, *, steps: int, scheduler: str | None, prompt_ids: Tensor) -> Tensor:
        """What `StableDiffusion3Pipeline` draws with `torch.Generator().manual_seed(seed)`; returns latents."""
        generator = torch.Generator().manual_seed(seed)
        sampler = named(scheduler or "FlowMatchEulerDiscreteScheduler", self.scheduler_config)
        sampler.set_timesteps(steps)
        x_t = torch.randn((1, *self.latent_shape), generator=generator, dtype=self._embeds[0].dtype).float()
        for t in sampler.timesteps:
            x_t = step(sampler, self._guided(x_t, t.expand(1), prompt_ids), t, x_t, generator)
        return x_t

    def sampling_timesteps(self, steps: int) -> list[float]:
        """The timesteps that `denoise` visits, from noisy to clean."""
        return [float(t) for t in self._sampler(steps).timesteps]

    def denoise(
        self, x_t: Tensor, *, steps: int, start: float | None = None, stop: float = -1, prompt_ids: Tensor | None = None
    ) -> Tensor:
        """Euler steps along the flow with classifier-free guidance, as the pipeline does; returns latents."""
        prompt_ids = torch.zeros(len(x_t), dtype=torch.long) if prompt_ids is None else prompt_ids
        sampler = self._sampler(steps)
        first = 0 if start is None else int((sampler.timesteps > start).sum())
        sampler.set_begin_index(first)
        for t in sampler.timesteps[first : int((sampler.timesteps > stop).sum())]:
            x_t = sampler.step(self._guided(x_t, t.expand(len(x_t)), prompt_ids), t, x_t).prev_sample
        return x_t

    def _guided(self, x_t: Tensor, timesteps: Tensor, prompt_ids: Tensor) -> Tensor:
        if self.guidance == 1 or not prompt_ids.any():
            return self.predict(x_t, timesteps, prompt_ids)
        rows = torch.cat([torch.zeros_like(prompt_ids), prompt_ids])
        plain, asked = self.predict(torch.cat([x_t, x_t]), timesteps.repeat(2), rows).chunk(2)
        return plain + self.guidance * (asked - plain)

    def copy(self) -> SD3:
        """An independent model with equal, frozen weights; autoencoder and text encoders are shared."""
        twin = copy.copy(self)
        parts = {**self.pipeline.components, "transformer": copy.deepcopy(self.network)}
        twin.pipeline = StableDiffusion3Pipeline(**parts)
        twin.network = twin.pipeline.transformer.requires_grad_(False).eval()
        return twin

    def frozen_reference(self, scope: Scope) -> SD3:
        """For `lora` the same network with the adapter off, no second copy; else a copy."""
        if scope != "lora":
            return self.copy()
        view = copy.copy(self)
        view.plain = True
        return view

    def set_network(self, network: nn.Module | None) -> None:
        """Another `SD3Transformer2DModel`, in the precision of the prompts, or none."""
        if network is not None:
            network = network.to(self.device, self._embeds[0].dtype).eval().requires_grad_(False)
            if self.short:
                network.set_attn_processor(WithoutT5())  # type: ignore[operator]
        self.pipeline.transformer = self.network = network


def trainable(network: Any, scope: Scope, *, rank: int, alpha: int, seed: int) -> list[nn.Parameter]:
    """The weights of a scope of an `SD3Transformer2DModel`; for `lora`, of an adapter that is added if need be."""
    if scope == "full":
        return list(network.parameters())
    if not getattr(network, "_hf_peft_config_loaded", False):
        from peft import LoraConfig

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network.add_adapter(
                LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
            )
    return [p for name, p in network.named_parameters() if ".lora_" in name]


@torch.no_grad()
def inpaint(
    family: Any, picture: Tensor, mask: Tensor, *, prompt_id: int, strength: float, count: int, steps: int, seed: int
) -> Tensor:
    """Fills of a masked picture by the same weights, through diffusers' `StableDiffusion3InpaintPipeline`.

    Args:
        family: An `SD3`.
        picture: (3, H, W) in [-1, 1].
        mask: (1, H, W), 1 where to fill.
        prompt_id: Of the prompt.
        strength: Share of the schedule that is done again.
        count: How many fills.
        steps: Steps of a whole sampling run.
        seed: Of the first; the others follow.

    Returns:
        (count, 3, H, W) in [-1, 1].
    """
    from diffusers import StableDiffusion3InpaintPipeline

    pipeline = StableDiffusion3InpaintPipeline(**family.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        image=(picture.expand(count, -1, -1, -1) + 1) / 2, mask_image=mask.expand(count, -1, -1, -1),
        strength=strength, num_inference_steps=steps,
        height=picture.shape[1], width=picture.shape[2], guidance_scale=family.guidance,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(count)], output_type="pt",
        **{name: rows.expand(count, *rows.shape[1:]) for name, rows in family.embedded(prompt_id).items()},
    ).images  # fmt: skip
    return images.float().cpu() * 2 - 1
