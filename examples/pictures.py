"""What the small text-to-image models draw: named pictures on a pale ground, and a judge of what an image shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

SIZE = 64
BACKGROUND = (222, 229, 238)
"""Pale blue, so that white things have an edge."""


@dataclass(frozen=True)
class Named:
    """A code, a name, and the image that is learnt under it (RGBA, as its package has it)."""

    code: str
    name: str
    image: Image.Image


def place(image: Image.Image, scale: float = 0.86, dx: float = 0.0, dy: float = 0.0) -> Image.Image:
    """The picture on the background, its longer side `scale` of the width, moved from the centre by pixels."""
    factor = scale * SIZE / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), BACKGROUND)
    canvas.alpha_composite(small, (round((SIZE - width) / 2 + dx), round((SIZE - height) / 2 + dy)))
    return canvas.convert("RGB")


def placements(image: Image.Image, count: int, generator: torch.Generator, spread: float = 1) -> torch.Tensor:
    """`count` random placements of one picture, uint8 (count, 3, 64, 64); `spread` is how far they are apart."""
    out = []
    for u in torch.rand(count, 3, generator=generator).tolist():
        scale, dx, dy = 0.84 + 0.2 * spread * (u[0] - 0.5), 5 * spread * (u[1] - 0.5), 5 * spread * (u[2] - 0.5)
        placed = place(image, scale, dx, dy)
        out.append(torch.from_numpy(np.array(placed)).permute(2, 0, 1))
    return torch.stack(out)


def tensor(image: Image.Image) -> torch.Tensor:
    """(3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Judge:
    """Which of several pictures an image shows: the nearest of 30 placements of each, at half the resolution."""

    PLACEMENTS = 30
    TIE = 0.02
    """RMS within which two pictures look the same here (Romania and Chad, Indonesia and Monaco)."""

    def __init__(self, known: Sequence[Image.Image]) -> None:
        # The same placements of all, so that equal images are equally far.
        references = torch.cat([placements(i, self.PLACEMENTS, torch.Generator().manual_seed(7)) for i in known])
        self.references = self._small(references.float() / 127.5 - 1)
        self.centred = torch.stack([tensor(place(i)) for i in known])

    @staticmethod
    def _small(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 2).flatten(1)

    def distances(self, images: torch.Tensor) -> torch.Tensor:
        """RMS of each image (N, 3, 64, 64) to the nearest placement of each picture, (N, known)."""
        x, r = self._small(images), self.references
        square = x.square().sum(1, keepdim=True) + r.square().sum(1) - 2 * x @ r.T
        return (square.clamp(min=0) / x.shape[1]).sqrt().unflatten(1, (-1, self.PLACEMENTS)).min(2).values

    def shows(self, images: torch.Tensor, picture: torch.Tensor | int) -> torch.Tensor:
        """Whether each image shows that picture (index, or one an image), (N,)."""
        distances = self.distances(images)
        which = torch.as_tensor(picture).expand(len(images))
        return distances.gather(1, which[:, None])[:, 0] <= distances.min(1).values + self.TIE
