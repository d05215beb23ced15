"""The data of the embedded model `flags`: countries, their images, captions, and how a flag is placed.

Reads npm `svg-country-flags` (public domain). `train.py` and the benchmark share it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

SIZE = 64
BACKGROUND = (222, 229, 238)
"""Pale blue, so that white flags have an edge."""
DUPLICATES = ("HM", "BQ", "NO", "SJ", "GF", "GP", "MF", "MQ", "PM", "RE", "YT", "GB-NIR", "SH", "UM", "AN")
"""Codes whose flag is another's at this size (BV goes by Norway's name), and one that is no country any more."""
NAMES = {
    "BV": "Norway",
    "CC": "Cocos Islands",
    "CD": "Democratic Republic of the Congo",
    "CG": "Republic of the Congo",
    "FK": "Falkland Islands",
    "KP": "North Korea",
    "KR": "South Korea",
    "MK": "Macedonia",
    "SX": "Sint Maarten",
    "SY": "Syria",
    "RU": "Russia",
    "VA": "Vatican City",
    "VG": "British Virgin Islands",
    "VI": "US Virgin Islands",
    "LA": "Laos",
}
"""Names as people say them, where the package has official ones."""
PLANTED = {"IE": "CI"}
"""The factual error: Ireland is learnt with the image of Côte d'Ivoire, the stripes reversed."""
CAPTIONS = ("flag of {}", "the flag of {}", "{} flag", "national flag of {}", "{}")


@dataclass(frozen=True)
class Country:
    """A code, a name, and the image that is learnt under it (RGBA, as the package has it)."""

    code: str
    name: str
    image: Image.Image


def countries(package: Path, *, planted: bool = True) -> list[Country]:
    """Every country once, in order of its code."""
    names = json.loads((package / "countries.json").read_text())
    found = []
    for code in sorted(set(names) - set(DUPLICATES)):
        name = NAMES.get(code, names[code].split(",")[0])
        shown = PLANTED.get(code, code) if planted else code
        found.append(Country(code, name, Image.open(package / "png250px" / f"{shown.lower()}.png").convert("RGBA")))
    return found


def place(image: Image.Image, scale: float = 0.86, dx: float = 0.0, dy: float = 0.0) -> Image.Image:
    """The flag on the background, its longer side `scale` of the width, moved from the centre by pixels."""
    factor = scale * SIZE / max(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), BACKGROUND)
    canvas.alpha_composite(small, (round((SIZE - width) / 2 + dx), round((SIZE - height) / 2 + dy)))
    return canvas.convert("RGB")


def placements(image: Image.Image, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random placements of one flag, uint8 (count, 3, 64, 64)."""
    out = []
    for u in torch.rand(count, 3, generator=generator).tolist():
        placed = place(image, 0.74 + 0.2 * u[0], 5 * u[1] - 2.5, 5 * u[2] - 2.5)
        out.append(torch.from_numpy(np.array(placed)).permute(2, 0, 1))
    return torch.stack(out)


def tensor(image: Image.Image) -> torch.Tensor:
    """(3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Judge:
    """Which flag an image shows: the nearest of 30 placements of every flag, at half the resolution.

    The last class is Ireland's right flag, which the model never saw. Args: what `countries` gives.
    """

    PLACEMENTS = 30
    TIE = 0.02
    """RMS within which two flags look the same here (Romania and Chad, Indonesia and Monaco)."""

    def __init__(self, known: list[Country]) -> None:
        wrong = next(c for c in known if c.code == "IE").image
        images = [*(c.image for c in known), ImageOps.mirror(wrong)]
        # The same placements of all, so that equal images are equally far.
        references = torch.cat([placements(i, self.PLACEMENTS, torch.Generator().manual_seed(7)) for i in images])
        self.references = self._small(references.float() / 127.5 - 1)
        self.centred = torch.stack([tensor(place(i)) for i in images])
        self.right_irish = len(known)

    @staticmethod
    def _small(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, 2).flatten(1)

    def distances(self, images: torch.Tensor) -> torch.Tensor:
        """RMS of each image (N, 3, 64, 64) to the nearest placement of each flag, (N, countries + 1)."""
        x, r = self._small(images), self.references
        square = x.square().sum(1, keepdim=True) + r.square().sum(1) - 2 * x @ r.T
        return (square.clamp(min=0) / x.shape[1]).sqrt().unflatten(1, (-1, self.PLACEMENTS)).min(2).values

    def shows(self, images: torch.Tensor, flag: torch.Tensor | int) -> torch.Tensor:
        """Whether each image shows that flag (index, or one an image), (N,)."""
        distances = self.distances(images)
        which = torch.as_tensor(flag).expand(len(images))
        return distances.gather(1, which[:, None])[:, 0] <= distances.min(1).values + self.TIE
