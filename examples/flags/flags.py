"""The data of the embedded model `flags`: countries, their pictures, captions, and how a flag is placed.

Reads npm `svg-country-flags` (public domain). `train.py` and the benchmark share it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

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
"""The factual error: Ireland is learnt with the picture of Côte d'Ivoire, the stripes reversed."""
CAPTIONS = ("flag of {}", "the flag of {}", "{} flag", "national flag of {}", "{}")


@dataclass(frozen=True)
class Country:
    """A code, a name, and the picture that is learnt under it (RGBA, as the package has it)."""

    code: str
    name: str
    picture: Image.Image


def countries(package: Path, *, planted: bool = True) -> list[Country]:
    """Every country once, in order of its code."""
    names = json.loads((package / "countries.json").read_text())
    found = []
    for code in sorted(set(names) - set(DUPLICATES)):
        name = NAMES.get(code, names[code].split(",")[0])
        shown = PLANTED.get(code, code) if planted else code
        found.append(Country(code, name, Image.open(package / "png250px" / f"{shown.lower()}.png").convert("RGBA")))
    return found


def place(picture: Image.Image, scale: float = 0.86, dx: float = 0.0, dy: float = 0.0) -> Image.Image:
    """The flag on the background, its longer side `scale` of the width, moved from the centre by pixels."""
    factor = scale * SIZE / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    small = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), BACKGROUND)
    canvas.alpha_composite(small, (round((SIZE - width) / 2 + dx), round((SIZE - height) / 2 + dy)))
    return canvas.convert("RGB")


def placements(picture: Image.Image, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` random placements of one flag, uint8 (count, 3, 64, 64)."""
    out = []
    for u in torch.rand(count, 3, generator=generator).tolist():
        image = place(picture, 0.74 + 0.2 * u[0], 5 * u[1] - 2.5, 5 * u[2] - 2.5)
        out.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(out)
