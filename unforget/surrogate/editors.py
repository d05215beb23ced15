"""Editors: from a target to candidates for its surrogate."""

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from diffusers import RePaintScheduler
from PIL import Image, ImageFilter
from pydantic import Field
from torch import Tensor

from unforget import families
from unforget.core.passes import Count, is_large
from unforget.core.sampling import random_noise
from unforget.core.types import Progress, Strategy
from unforget.errors import UsageError
from unforget.files.images import from_pil, to_pil
from unforget.surrogate.canvas import RANKED, Canvas, redrawn_passes
from unforget.surrogate.ranking import TYPICAL_AT, Candidate, rank

EDITS = "surrogate candidates"
"""The stage of the work, for progress."""


class Redraw(Strategy):
    """Draw again from several noise levels: what editors share in which the model itself draws the picture."""

    kind: str
    strengths: tuple[float, ...] = Field(description="noise levels, as shares of the schedule")
    seeds: int = Field(ge=1, le=256, description="candidates a strength")
    steps: int = Field(20, ge=2, le=1000, description="steps of a whole sampling run")

    def passes(self, model: Any, prompt_id: int) -> int:
        """Network passes of the candidates and their ranking; `model` is a family, loaded or not."""
        at = [(model.schedule.share(strength), self.seeds, self.steps) for strength in self.strengths]
        at.append((TYPICAL_AT, self.seeds * len(self.strengths), RANKED))
        return sum(redrawn_passes(model, [prompt_id] * count, timestep, steps) for timestep, count, steps in at)

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        family, out = canvas.family, []
        for strength in self.strengths:
            noise = random_noise(self.seeds, family.latent_shape, canvas.seed, f"{self.kind} {strength}")
            images = self.draw(canvas, noise, family.schedule.share(strength))
            out += _edits(canvas, images, f"{self.kind} {strength:.2f}")
        return out

    def draw(self, canvas: Canvas, noise: Tensor, timestep: float) -> Tensor:
        """Images (N, C, H, W) from noise at about a timestep."""
        raise NotImplementedError


class SDEdit(Redraw):
    """Noise the target and let the model itself denoise it (arXiv:2108.01073): a new picture in its own style."""

    kind: Literal["sdedit"] = "sdedit"
    strengths: tuple[float, ...] = Field(
        (0.5, 0.55, 0.6, 0.65, 0.7), description="noise levels, as shares of the schedule"
    )
    seeds: int = Field(24, ge=1, le=256, description="candidates a strength")

    def draw(self, canvas: Canvas, noise: Tensor, timestep: float) -> Tensor:
        return canvas.redraw(canvas.target[None], noise, timestep, steps=self.steps)


class RePaint(Strategy):
    """Let the model fill the mask and keep the rest (arXiv:2201.09865), with diffusers' scheduler."""

    kind: Literal["repaint"] = "repaint"
    seeds: int = Field(8, ge=1, le=256, description="candidates")
    steps: int = Field(50, ge=2, le=1000, description="denoising steps")
    jump_length: int = Field(5, ge=1, description="steps to go back at a time")
    jump_n_sample: int = Field(3, ge=1, description="how often to go back and repaint")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
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
        return _edits(canvas, x_t.clamp(-1, 1), "repaint")


class Inpaint(Redraw):
    """Let the model fill the mask and keep the rest: `repaint` for pixels, in latents step by step."""

    kind: Literal["inpaint"] = "inpaint"
    strengths: tuple[float, ...] = Field((0.7, 0.85, 1.0), description="noise levels, as shares of the schedule")
    seeds: int = Field(8, ge=1, le=256, description="candidates a strength")

    def passes(self, model: Any, prompt_id: int) -> int:
        """As of every `Redraw`; 0 for `repaint`, which is not counted."""
        return super().passes(model, prompt_id) if model.spec.autoencoder else 0

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        return super().__call__(canvas) if canvas.family.spec.autoencoder else RePaint(seeds=self.seeds)(canvas)

    def draw(self, canvas: Canvas, noise: Tensor, timestep: float) -> Tensor:
        return canvas.fill(noise, timestep, steps=self.steps)


class Instruct(Strategy):
    """Ask an instruction editor: any diffusers pipeline that takes an image and a prompt (FLUX.2-klein, Kontext,
    Qwen-Image-Edit, InstructPix2Pix), by hub id or folder."""

    kind: Literal["instruct"] = "instruct"
    model: str = Field("black-forest-labs/FLUX.2-klein-4B", description="hub id or folder of the editor")
    instruction: str = Field(min_length=1, description="what to change, in words")
    seeds: int = Field(4, ge=1, le=256, description="candidates")
    steps: int = Field(20, ge=1, le=1000, description="sampler steps")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        pipeline, licence = families.editor(self.model, canvas.family.device)
        canvas.note(f"the editor {self.model} is under {licence}")
        picture, out = to_pil(canvas.target), []
        for i in range(self.seeds):
            with families.asking(self.model):
                edit = pipeline(
                    image=picture, prompt=self.instruction, num_inference_steps=self.steps,
                    generator=torch.Generator().manual_seed(canvas.seed + i),
                ).images[0]  # fmt: skip
            out.append(from_pil(edit.convert("RGB").resize(picture.size, Image.Resampling.LANCZOS)))
        return _edits(canvas, torch.stack(out), "instruct")


class Donor(Strategy):
    """Put the donor's pixels into the mask, with a soft edge."""

    kind: Literal["donor"] = "donor"

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        assert canvas.donor is not None, "`check` was called"
        return [Candidate(_within(canvas, canvas.donor), "donor")]


class Blur(Strategy):
    """Gaussian blur inside the mask: a plain fallback that costs quality."""

    kind: Literal["blur"] = "blur"
    radii: tuple[float, ...] = Field((0.05, 0.1, 0.2), description="standard deviations, as shares of the width")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        picture, width = to_pil(canvas.target), canvas.target.shape[-1]
        blurs = ((r, picture.filter(ImageFilter.GaussianBlur(r * width))) for r in self.radii)
        return [Candidate(_within(canvas, from_pil(edit)), f"blur {r:g}") for r, edit in blurs]


class Pixelate(Strategy):
    """Coarse blocks inside the mask: a plain fallback that costs quality."""

    kind: Literal["pixelate"] = "pixelate"
    blocks: tuple[int, ...] = Field((8, 4), description="blocks across the picture")

    def __call__(self, canvas: Canvas) -> list[Candidate]:
        picture = to_pil(canvas.target)
        coarse = ((n, picture.resize((n, n), Image.Resampling.BOX)) for n in self.blocks)
        blocks = ((n, small.resize(picture.size, Image.Resampling.NEAREST)) for n, small in coarse)
        return [Candidate(_within(canvas, from_pil(edit)), f"pixelate {n}") for n, edit in blocks]


Editor = Annotated[SDEdit | Inpaint | RePaint | Instruct | Donor | Blur | Pixelate, Field(discriminator="kind")]


def _within(canvas: Canvas, images: Tensor) -> Tensor:
    """The images inside the mask, the target outside it."""
    return canvas.mask * images + (1 - canvas.mask) * canvas.target


def _edits(canvas: Canvas, images: Tensor, label: str) -> list[Candidate]:
    return [Candidate(image, f"{label} #{i}") for i, image in enumerate(_within(canvas, images))]


def counted(editor: Editor, model: Any, prompt_id: int) -> int:
    """Network passes of an editor and the ranking; 0 where they are not counted. `model` is a family, loaded or not."""
    return editor.passes(model, prompt_id) if isinstance(editor, Redraw) else 0


def check(editor: Editor, canvas: Canvas) -> None:
    """UsageError for an editor that cannot work on this canvas."""
    if isinstance(editor, RePaint) and canvas.family.spec.autoencoder:
        raise UsageError("repaint is for models that draw pixels", "Give --method inpaint.")
    if isinstance(editor, Donor) and canvas.donor is None:
        raise UsageError("the donor editor needs a picture to take the face from", "Give one with --donor FILE.")


def candidates(
    canvas: Canvas, *editors: Editor, distance: float, near_copy: float, progress: Progress
) -> list[Candidate]:
    """What editors make of the target, ranked as by `rank`; the later ones are asked if no edit before is accepted."""
    ranked: list[Candidate] = []
    for editor in editors:
        check(editor, canvas)
        passes = counted(editor, canvas.family, canvas.prompt_id)
        progress.stage(EDITS, passes or 1)
        canvas = replace(canvas, advance=progress.advance) if passes else canvas
        ranked = rank(editor(canvas), canvas, distance=distance, near_copy=near_copy) + ranked
        if not passes:
            progress.advance()
        if ranked[0].accepted:
            break
    return ranked


def automatic(image_shape: tuple[int, int, int]) -> tuple[SDEdit, SDEdit]:
    """What makes a surrogate that nobody gave: the second is asked if no edit of the first is accepted."""
    seeds = 8 if is_large(image_shape) else 24
    return SDEdit(seeds=seeds), SDEdit(strengths=(0.75, 0.8, 0.85), seeds=seeds)


def automatic_passes(model: Any, prompt_id: int) -> Count:
    """Network passes of that, for one target."""
    first, second = (editor.passes(model, prompt_id) for editor in automatic(model.image_shape))
    return Count(first, first + second)
