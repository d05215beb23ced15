"""From a picture to candidates for its surrogate, and their ranking.

A good surrogate is another instance (far enough from the target, and drawn differently: not the same face on another
background), keeps its structure (otherwise near), looks like something the model itself would draw, and is nobody it
draws already: to send a target's share to another memorised picture would only move the harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from diffusers import RePaintScheduler
from PIL import Image, ImageFilter
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from unforget import families
from unforget.core.metrics import pairwise_rms, redrawn, rms, sharpness
from unforget.core.sampling import add_noise, draw, random_noise, visited
from unforget.core.types import Family, Strategy
from unforget.errors import UsageError
from unforget.files.images import from_pil, to_pil


@dataclass(frozen=True)
class Candidate:
    """An edited target and how it ranks.

    Attributes:
        image: (C, H, W) in [-1, 1].
        label: How it was made.
        distance: RMS to the target, in pixels of [-1, 1].
        redrawn: Share of the target's drawing that is another (`metrics.redrawn`), whatever the colours.
        moved: RMS to the target moved and scaled to where the edit has it, under a prompt; infinite without.
        familiar: RMS to the nearest picture that the base is known to draw; infinite if none is known.
        quality: Its sharpness as a share of the target's; 1 is the same.
        typicality: RMS between it and the base's reconstruction of it; small is what the base could draw.
        strays: Chance that a noised target, taken for somebody else, is taken for a picture nearer to the target than
            to the edit; small when the edit lies among those others.
        score: Smaller is better.
        accepted: Another instance than the target, of fair quality, and nobody the base draws already.
    """

    image: Tensor
    label: str
    distance: float = 0.0
    redrawn: float = 0.0
    moved: float = math.inf
    familiar: float = math.inf
    quality: float = 1.0
    typicality: float = 0.0
    strays: float = 0.0
    score: float = 0.0
    accepted: bool = False


@dataclass(frozen=True)
class Canvas:
    """What an editor works on.

    Attributes:
        family: The model that must forget.
        target: (C, H, W) in [-1, 1].
        mask: Where to edit, (1, H, W) in [0, 1].
        donor: A picture to take a face from, (C, H, W), if one was given.
        seed: Of every random draw.
        drawn: Pictures that the base draws, (M, C, H, W), if any are known.
        prompt_id: Of the prompt to edit under.
        note: Called with a sentence that the user should see.
    """

    family: Family
    target: Tensor
    mask: Tensor
    donor: Tensor | None = None
    seed: int = 0
    drawn: Tensor | None = None
    prompt_id: int = 0
    note: Callable[[str], object] = lambda sentence: None

    def redraw(self, images: Tensor, noise: Tensor, timestep: float, *, steps: int = 20) -> Tensor:
        """What the base makes of images (N or 1, C, H, W) that were noised to about a timestep, under the prompt."""
        start = visited(self.family, timestep, steps=steps)
        x_t = add_noise(self.family, images, noise, start)
        return draw(self.family, x_t, steps=steps, start=start, prompt_ids=torch.tensor([self.prompt_id]))


class SDEdit(Strategy):
    """Noise the target and let the model itself denoise it (arXiv:2108.01073): a new picture in its own style."""

    kind: Literal["sdedit"] = "sdedit"
    strengths: tuple[float, ...] = Field(
        (0.5, 0.55, 0.6, 0.65, 0.7), description="noise levels, as shares of the schedule"
    )
    seeds: int = Field(24, ge=1, le=256, description="candidates a strength")
    steps: int = Field(20, ge=2, le=1000, description="steps of a whole sampling run")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        family, out = canvas.family, []
        for strength in self.strengths:
            noise = random_noise(self.seeds, family.latent_shape, canvas.seed, f"sdedit {strength}")
            start = family.schedule.share(strength)
            images = canvas.redraw(canvas.target[None], noise, start, steps=self.steps)
            out += [Candidate(image, f"sdedit {strength:.2f} #{i}") for i, image in enumerate(_within(canvas, images))]
        return out


class RePaint(Strategy):
    """Let the model fill the mask and keep the rest (arXiv:2201.09865), with diffusers' scheduler."""

    kind: Literal["repaint"] = "repaint"
    seeds: int = Field(8, ge=1, le=256, description="candidates")
    steps: int = Field(50, ge=2, le=1000, description="denoising steps")
    jump_length: int = Field(5, ge=1, description="steps to go back at a time")
    jump_n_sample: int = Field(3, ge=1, description="how often to go back and repaint")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        if canvas.family.spec.inpaint_class:
            raise UsageError("repaint is for models that draw pixels", "Give --method inpaint.")
        scheduler = RePaintScheduler.from_config(canvas.family.scheduler_config)
        scheduler.set_timesteps(self.steps, self.jump_length, self.jump_n_sample)
        generator = torch.Generator().manual_seed(canvas.seed)
        known = canvas.target.expand(self.seeds, *canvas.target.shape)
        x_t, last = torch.randn(known.shape, generator=generator).to(known), scheduler.timesteps[0] + 1
        with torch.no_grad():
            for t in scheduler.timesteps:
                if t < last:
                    no_prompt = torch.zeros(self.seeds, dtype=torch.long)
                    prediction = canvas.family.predict(x_t, t.expand(self.seeds), no_prompt)
                    # RePaint's mask is 1 where the picture is kept.
                    x_t = scheduler.step(prediction, t, x_t, known, 1 - canvas.mask, generator).prev_sample
                else:
                    x_t = scheduler.undo_step(x_t, last, generator)
                last = t
        return [Candidate(image, f"repaint #{i}") for i, image in enumerate(_within(canvas, x_t.clamp(-1, 1)))]


class Inpaint(Strategy):
    """Let the model fill the mask and keep the rest: `repaint` for pixels, else the family's inpainting pipeline."""

    kind: Literal["inpaint"] = "inpaint"
    strengths: tuple[float, ...] = Field((0.7, 0.85, 1.0), description="noise levels, as shares of the schedule")
    seeds: int = Field(8, ge=1, le=256, description="candidates a strength")
    steps: int = Field(20, ge=2, le=1000, description="steps of a whole sampling run")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        family: Any = canvas.family
        if not family.spec.inpaint_class:
            return RePaint(seeds=self.seeds)(canvas)
        out = []
        for strength in self.strengths:
            images = family.inpaint(
                canvas.target, canvas.mask, prompt_id=canvas.prompt_id, strength=strength, count=self.seeds,
                steps=self.steps, seed=canvas.seed,
            )  # fmt: skip
            out += [Candidate(image, f"inpaint {strength:.2f} #{i}") for i, image in enumerate(_within(canvas, images))]
        return out


class Instruct(Strategy):
    """Ask an instruction editor: any diffusers pipeline that takes an image and a prompt (FLUX.2-klein, Kontext,
    Qwen-Image-Edit, InstructPix2Pix), by hub id or folder."""

    kind: Literal["instruct"] = "instruct"
    model: str = Field("black-forest-labs/FLUX.2-klein-4B", description="hub id or folder of the editor")
    instruction: str = Field(min_length=1, description="what to change, in words")
    seeds: int = Field(4, ge=1, le=256, description="candidates")
    steps: int = Field(20, ge=1, le=1000, description="sampler steps")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        pipeline, licence = families.editor(self.model)
        canvas.note(f"the editor {self.model} is under {licence}")
        picture, size = to_pil(canvas.target), canvas.target.shape[1:]
        out = []
        for i in range(self.seeds):
            edit = pipeline(
                image=picture, prompt=self.instruction, num_inference_steps=self.steps,
                generator=torch.Generator().manual_seed(canvas.seed + i),
            ).images[0]  # fmt: skip
            edit = edit.convert("RGB").resize((size[1], size[0]), Image.Resampling.LANCZOS)
            out.append(Candidate(_pasted(canvas, edit), f"instruct #{i}"))
        return out


class Donor(Strategy):
    """Put the donor's pixels into the mask, with a soft edge."""

    kind: Literal["donor"] = "donor"

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        if canvas.donor is None:
            raise UsageError("the donor editor needs a picture to take the face from", "Give one with --donor FILE.")
        return [Candidate(_within(canvas, canvas.donor[None])[0], "donor")]


class Blur(Strategy):
    """Gaussian blur inside the mask: a plain fallback that costs quality."""

    kind: Literal["blur"] = "blur"
    radii: tuple[float, ...] = Field((0.05, 0.1, 0.2), description="standard deviations, as shares of the width")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        picture, width = to_pil(canvas.target), canvas.target.shape[-1]
        blurs = ((r, picture.filter(ImageFilter.GaussianBlur(r * width))) for r in self.radii)
        return [Candidate(_pasted(canvas, edit), f"blur {r:g}") for r, edit in blurs]


class Pixelate(Strategy):
    """Coarse blocks inside the mask: a plain fallback that costs quality."""

    kind: Literal["pixelate"] = "pixelate"
    blocks: tuple[int, ...] = Field((8, 4), description="blocks across the picture")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        picture = to_pil(canvas.target)
        coarse = ((n, picture.resize((n, n), Image.Resampling.BOX)) for n in self.blocks)
        return [
            Candidate(_pasted(canvas, small.resize(picture.size, Image.Resampling.NEAREST)), f"pixelate {n}")
            for n, small in coarse
        ]


Editor = Annotated[SDEdit | Inpaint | RePaint | Instruct | Donor | Blur | Pixelate, Field(discriminator="kind")]


def _within(canvas: Canvas, images: Tensor) -> Tensor:
    """The images inside the mask, the target outside it."""
    return canvas.mask * images + (1 - canvas.mask) * canvas.target


def _pasted(canvas: Canvas, edit: Image.Image) -> Tensor:
    return _within(canvas, from_pil(edit)[None])[0]


def carried(picture: Tensor, target: Tensor, surrogate: Tensor) -> tuple[Tensor, float]:
    """The edit from target to surrogate, moved and scaled to where a picture shows the target; all (C, H, W).

    Returns:
        The edited picture, and the RMS between picture and moved target that is left: small if it is the same thing.
    """
    shifts, scales = torch.linspace(-0.125, 0.125, 9), torch.linspace(0.8, 1.2, 9)
    scale, dx, dy = (a.flatten() for a in torch.meshgrid(scales, shifts, shifts, indexing="ij"))
    zero = torch.zeros_like(scale)
    places = torch.stack([torch.stack([1 / scale, zero, dx], 1), torch.stack([zero, 1 / scale, dy], 1)], 1)

    def moved(image: Tensor, where: Tensor) -> Tensor:
        grid = functional.affine_grid(where, [len(where), *image.shape], align_corners=False)
        return functional.grid_sample(
            image.expand(len(where), -1, -1, -1), grid, padding_mode="border", align_corners=False
        )

    misfit = torch.cat([rms(moved(target, part), picture) for part in torch.split(places, 81)])
    best = int(misfit.argmin())
    edit = moved(surrogate - target, places[best : best + 1])[0]
    return (picture + edit).clamp(-1, 1), float(misfit[best])


REDRAWN = 0.35
"""Least share of a target's drawing that must change; on `faces` one face stays under 0.27, others exceed 0.42."""
QUALITY = 0.6
"""Least sharpness of an edit, as a share of its target's; its inverse is the most."""
TYPICAL_AT, STRAYS_AT = 250, 550
"""Timesteps of the reconstructions that measure typicality and strays."""
STRAYS = 32
"""Draws that measure strays."""


def rank(
    candidates: Sequence[Candidate], canvas: Canvas, *, distance: float, near_copy: float = 0.16
) -> list[Candidate]:
    """Score candidates, best first: accepted ones before others, then near, typical and sharp ones with few strays.

    Args:
        candidates: Any number of edits.
        canvas: What they were made from.
        distance: Least RMS to the target that makes another instance of it.
        near_copy: RMS under which an edit is a picture that the base draws already.
    """
    images = torch.stack([c.image for c in candidates])
    drawn = canvas.drawn if canvas.drawn is not None else images[:0]
    figures: dict[str, Any] = {
        "distance": rms(images, canvas.target),
        "redrawn": redrawn(images, canvas.target),
        "familiar": pairwise_rms(images, drawn).min(1).values if len(drawn) else torch.full((len(images),), math.inf),
        "moved": _moved(canvas, images),
        "quality": sharpness(images) / sharpness(canvas.target[None]).clamp(min=1e-6),
        "typicality": rms(_reconstructed(canvas, images), images),
        "strays": _strays(canvas, images, torch.cat([images, drawn]), near_copy),
    }
    scored = []
    for i, candidate in enumerate(candidates):
        c = replace(candidate, **{name: values[i].item() for name, values in figures.items()})
        another = c.distance >= distance and c.redrawn >= REDRAWN and min(c.familiar, c.moved) >= near_copy
        score = abs(c.distance - distance) + 3 * c.typicality + 0.3 * c.strays + 0.1 * abs(c.quality - 1)
        scored.append(replace(c, score=score, accepted=another and QUALITY <= c.quality <= 1 / QUALITY))
    return sorted(scored, key=lambda c: (not c.accepted, c.score))


def _moved(canvas: Canvas, images: Tensor) -> Tensor:
    """`Candidate.moved` of each image (N,), at a width of 32: a prompted model draws one thing in many places."""
    if not canvas.prompt_id:
        return torch.full((len(images),), math.inf)
    target, *small = functional.adaptive_avg_pool2d(torch.cat([canvas.target[None], images]), 32)
    return torch.tensor([carried(image, target, target)[1] for image in small])


def _reconstructed(canvas: Canvas, images: Tensor) -> Tensor:
    """What the base makes of images that were noised a little."""
    noise = random_noise(len(images), canvas.family.latent_shape, canvas.seed, "rank")
    return canvas.redraw(images, noise, TYPICAL_AT)


def _strays(canvas: Canvas, images: Tensor, others: Tensor, near_copy: float) -> Tensor:
    """`Candidate.strays` of each image (N,), the others being those that are no copies of the target."""
    family, target = canvas.family, canvas.target
    others = others[rms(others, target) >= near_copy]
    if not len(others):
        return torch.zeros(len(images))
    noise = random_noise(STRAYS, family.latent_shape, canvas.seed, "strays")
    x_t, timestep = add_noise(family, target[None], noise, STRAYS_AT), torch.tensor([STRAYS_AT])
    alpha, sigma = (family.schedule.column(name, timestep, noise) for name in ("alphas", "sigmas"))
    far = pairwise_rms(x_t, alpha * family.encode(others)).square() * noise[0].numel() / sigma.flatten().square()
    taken_for = torch.softmax(-far / 2, 1).mean(0)
    return (pairwise_rms(images, others) > rms(others, target)).float() @ taken_for
