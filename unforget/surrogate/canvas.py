"""What an editor works on, and where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from unforget.core import passes
from unforget.core.sampling import add_noise, draw, visited
from unforget.core.types import UNCONDITIONAL, Family
from unforget.errors import UsageError

RANKED = 20
"""Steps of a whole sampling run, for the ranking."""


@dataclass(frozen=True)
class Canvas:
    """A target to be edited, (C, H, W) in [-1, 1], by the model that must forget it."""

    family: Family
    target: Tensor
    mask: Tensor  # where to edit, (1, H, W) in [0, 1]
    donor: Tensor | None = None  # an image to take a face from
    seed: int = 0
    drawn: Tensor | None = None  # images that the base draws, (M, C, H, W), if any are known
    prompt_id: int = UNCONDITIONAL  # of the prompt to edit under
    note: Callable[[str], object] = lambda sentence: None
    advance: Callable[[int], object] = lambda passes: None

    def redraw(self, images: Tensor, noise: Tensor, timestep: float, *, steps: int = RANKED) -> Tensor:
        """What the base makes of images (N or 1, C, H, W) that were noised to about a timestep, under the prompt."""
        start = visited(self.family, timestep, steps=steps)
        x_t = add_noise(self.family, images, noise, start)
        id = torch.tensor([self.prompt_id])
        return draw(self.family, x_t, steps=steps, start=start, prompt_ids=id, advance=self.advance)

    @torch.no_grad()
    def fill(self, noise: Tensor, timestep: float, *, steps: int) -> Tensor:
        """What the base draws into the mask, (N, C, H, W), from about a timestep on, under the prompt.

        After each step the target stands outside the mask, noised as far, as in diffusers' inpainting pipelines.
        """
        family, visits = self.family, self.family.sampling_timesteps(steps)
        start = visited(family, timestep, steps=steps)
        x_s = family.encode(self.target[None])
        mask, out = adaptive_max_pool2d(self.mask, x_s.shape[2:]), []
        for part in torch.split(noise, passes.drawn_in_one_pass(family)):
            ids = torch.full((len(part),), self.prompt_id)
            x_t = part if start == visits[0] else add_noise(family, x_s, part, start, encoded=True)
            for t, after in pairwise([*(t for t in visits if t <= start), None]):
                x_t = family.denoise(x_t, steps=steps, start=t, stop=-1 if after is None else after, prompt_ids=ids)
                known = x_s if after is None else add_noise(family, x_s, part, after, encoded=True)
                x_t = mask * x_t + (1 - mask) * known
            self.advance(passes.drawn(family, ids.tolist(), passes.calls(family, steps, start)))
            out.append(family.decode(x_t))
        return torch.cat(out)


def redrawn_passes(model: Any, prompt_ids: Sequence[int], timestep: float, steps: int) -> int:
    """Network passes of `Canvas.redraw` of an image under each prompt; `model` is a family, loaded or not."""
    return passes.drawn(model, prompt_ids, passes.calls(model, steps, visited(model, timestep, steps=steps)))


def box_mask(box: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    """1 inside the box x, y, width, height (pixels), 0 outside it, (1, height, width)."""
    x, y, w, h = box
    if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
        raise UsageError(f"the box {x},{y},{w},{h} leaves the {width}x{height} picture", "Give x,y,width,height.")
    mask = torch.zeros(1, height, width)
    mask[:, y : y + h, x : x + w] = 1
    return mask


def ellipse_mask(height: int, width: int) -> Tensor:
    """A soft ellipse where a portrait has its face, (1, height, width) in [0, 1]."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    ellipse: Tensor = ((1 - (columns / 0.55).square() - (rows / 0.65).square()) / 0.35).clamp(0, 1)
    return ellipse[None]
