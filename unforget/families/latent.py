"""Text-to-image models that work on the latents of an autoencoder, each by the row of its family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from unforget.core.types import UNCONDITIONAL
from unforget.errors import CannotRun, UsageError
from unforget.families.loading import Hints, Options
from unforget.families.model import DiffusionModel
from unforget.families.spec import FamilySpec


class LatentTextToImage(DiffusionModel):
    """A latent text-to-image pipeline behind the `Family` protocol; x_0 is the scaled, shifted posterior mean.

    Prompts are embedded once, by `prompt_ids`; after `unload_text_encoders` only known prompts work.
    """

    def __init__(
        self, spec: FamilySpec, pipeline: Any, name: str = "model", options: Options | None = None,
        hints: Hints | None = None,
    ) -> None:  # fmt: skip
        options, hints = options or Options(), hints or Hints()
        self.absent = tuple(n for n in spec.text_encoders if getattr(pipeline, n) is None)
        super().__init__(spec, pipeline, name, options.device)
        pipeline.vae.to(self.device)
        self.guidance = options.guidance or hints.guidance or spec.guidance
        self.retain_prompts = hints.retain_prompts or _everyday_prompts()
        self.latent_shape, self.image_shape = shapes(
            spec, self.network.config, pipeline.vae_scale_factor, name, options.resolution
        )
        self.prompts: list[str] = []
        self._conditioning: list[tuple[Tensor, ...]] = []
        self.prompt_ids([""])
        self.dtype = self._conditioning[UNCONDITIONAL][0].dtype

    def _placed(self, network: Any) -> Any:
        self.spec.adapt(network, self.absent)
        return network.to(self.device).eval().requires_grad_(False)

    def set_network(self, network: Any) -> None:
        """Another network of the same class, in the precision of the prompts, or none."""
        super().set_network(None if network is None else network.to(self.dtype))

    @torch.no_grad()
    def prompt_ids(self, prompts: Sequence[str]) -> Tensor:
        """The row of each prompt, (len(prompts),); the empty one is `UNCONDITIONAL`.

        Raises:
            UsageError: If a prompt is longer than the tokenizer allows.
            CannotRun: If the text encoders were released and a prompt is new.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self.prompts]
        for prompt in new:
            self._check_length(prompt)
        with self._encoders() if new else nullcontext():
            for prompt in new:
                embedded = self.spec.embed(self.pipeline, prompt, self.device)
                self.prompts.append(prompt)
                self._conditioning.append(tuple(t[0].cpu() for t in embedded))
        return torch.tensor([self.prompts.index(p) for p in prompts])

    def _check_length(self, prompt: str) -> None:
        if self.pipeline.text_encoder is None:
            raise CannotRun(f"the prompt '{prompt}' came after the text encoders were released", "Name it earlier.")
        found, most = len(self.pipeline.tokenizer(prompt).input_ids), self.pipeline.tokenizer.model_max_length
        if found > most:
            raise UsageError(
                f"the prompt '{prompt[:40]}...' has {found} tokens, the tokenizer allows {most}", "Shorten it."
            )

    @contextmanager
    def _encoders(self) -> Iterator[None]:
        """The text encoders on the network's device, for as long as they embed."""
        encoders = [e for e in (getattr(self.pipeline, name) for name in self.spec.text_encoders) if e is not None]
        for encoder in encoders:
            encoder.to(self.device)
        yield
        for encoder in encoders:
            encoder.to("cpu")

    def unload_text_encoders(self) -> None:
        """Drop the text encoders: the prompts known so far stay."""
        for name in self.spec.text_encoders:
            setattr(self.pipeline, name, None)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Scaled, shifted posterior means, (N, *latent_shape), float32, on the CPU."""
        if not len(pictures):
            return torch.empty(0, *self.latent_shape)
        vae = self.pipeline.vae
        parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode() for part in torch.split(pictures, 8)]
        latents: Tensor = (torch.cat(parts).float() - self._shift) * vae.config.scaling_factor
        return latents.cpu()

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Pictures in [-1, 1], (N, 3, H, W), on the CPU."""
        vae = self.pipeline.vae
        x_0 = x_0 / vae.config.scaling_factor + self._shift
        parts = [vae.decode(part.to(vae.device, vae.dtype)).sample.float().cpu() for part in torch.split(x_0, 8)]
        return torch.cat(parts).clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return self.pipeline.vae.config.get("shift_factor") or 0.0

    def predict(self, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        """The network's answer at (x_t, timestep, prompt_ids), float32, on the device of x_t."""
        rows = zip(*(self._conditioning[i] for i in prompt_ids.tolist()), strict=True)
        conditioning = [torch.stack(row).to(self.device) for row in rows]
        with self._adapter():
            answer = self.spec.call(
                self.network, x_t.to(self.device, self.dtype), timestep.to(self.device, torch.float32), conditioning
            )
        return answer.float().to(x_t.device)

    @torch.no_grad()
    def inpaint(
        self, picture: Tensor, mask: Tensor, *, prompt_id: int, strength: float, count: int, steps: int, seed: int
    ) -> Tensor:
        """`count` fills (count, 3, H, W) of a picture (3, H, W) in [-1, 1] where the mask (1, H, W) is 1.

        By the same weights in diffusers' inpainting pipeline, from the share `strength` of the schedule; `seed` is the
        first one's, and the others follow.
        """
        import diffusers

        embedded = {
            f"{against}{name}": tensor.expand(count, *tensor.shape)
            for against, row in (("", prompt_id), ("negative_", UNCONDITIONAL))
            for name, tensor in zip(self.spec.conditioning, self._conditioning[row], strict=True)
        }
        # What is passed when loading is passed here, too: another class has other parts that may be left out.
        kind = getattr(diffusers, self.spec.inpaint_class)
        pipeline = kind(**{**self.pipeline.components, **self.spec.passed})
        pipeline.set_progress_bar_config(disable=True)
        images: Tensor = pipeline(
            image=(picture.expand(count, -1, -1, -1) + 1) / 2, mask_image=mask.expand(count, -1, -1, -1),
            strength=strength, num_inference_steps=steps,
            height=picture.shape[1], width=picture.shape[2], guidance_scale=self.guidance,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)], output_type="pt", **embedded,
        ).images  # fmt: skip
        return images.float().cpu() * 2 - 1


def shapes(
    spec: FamilySpec, config: Any, factor: int, name: str, resolution: int | None
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(C, H, W) of latents and of pictures, at the model's own resolution or another one.

    Raises:
        UsageError: If the network cannot work at it.
    """
    side = resolution or config["sample_size"] * factor
    unit, most = spec.latent_side(config)
    if side % (unit * factor) or side > most * factor:
        raise UsageError(
            f"'{name}' cannot draw {side}x{side} pixels",
            f"Give a --resolution that is a multiple of {unit * factor}, {most * factor} at most.",
        )
    return (config["in_channels"], side // factor, side // factor), (3, side, side)


def _everyday_prompts() -> tuple[str, ...]:
    """The built-in list of retain prompts: everyday pictures of many kinds."""
    return tuple((files("unforget.families") / "models" / "retain_prompts.txt").read_text().split("\n")[:-1])
