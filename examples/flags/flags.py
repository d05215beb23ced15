"""The data of the bundled model `flags`: countries, their images and captions, from npm `svg-country-flags` (public
domain)."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

from pictures import Judge, Named, placements

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


def countries(package: Path, *, planted: bool = True) -> list[Named]:
    """Every country once, in order of its code."""
    names = json.loads((package / "countries.json").read_text())
    found = []
    for code in sorted(set(names) - set(DUPLICATES)):
        name = NAMES.get(code, names[code].split(",")[0])
        shown = PLANTED.get(code, code) if planted else code
        found.append(Named(code, name, Image.open(package / "png250px" / f"{shown.lower()}.png").convert("RGBA")))
    return found


def learnt(package: Path, count: int, generator: torch.Generator) -> tuple[list[Named], list[list[str]], torch.Tensor]:
    """Countries, the captions of each, and `count` placements of its flag, uint8 (countries, count, 3, 64, 64)."""
    known = countries(package)
    captions = [[form.format(c.name) for form in CAPTIONS] for c in known]
    return known, captions, torch.stack([placements(c.image, count, generator) for c in known])


def judge(known: list[Named]) -> Judge:
    """Of what `countries` gives; the last class is Ireland's right flag, which the model never saw."""
    wrong = next(c for c in known if c.code == "IE").image
    return Judge([*(c.image for c in known), ImageOps.mirror(wrong)])
