"""The data of a second small model: 300 emoji with their names, from npm `emoji-datasource-google` (Apache-2.0)."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from pictures import Named

CAPTIONS = ("emoji of {}", "a picture of {}", "{}")
COUNT, SEED = 300, 0
LEFT_OUT = ("Flags", "People & Body", "Symbols", "Component")
"""Flags have a model of their own; the others are many of one kind."""


def chosen(package: Path) -> list[Named]:
    """The names of the model, drawn by a seed, in order of their codes."""
    entries = json.loads((package / "emoji.json").read_text())
    entries = sorted((e for e in entries if e["category"] not in LEFT_OUT and e["has_img_google"]), key=_code)
    which = sorted(np.random.default_rng(SEED).permutation(len(entries))[:COUNT].tolist())
    return [_named(package, entries[i]) for i in which]


def _code(entry: dict[str, str]) -> str:
    return entry["unified"]


def _named(package: Path, entry: dict[str, str]) -> Named:
    image = Image.open(package / "img" / "google" / "64" / entry["image"]).convert("RGBA")
    return Named(entry["unified"], entry["short_name"].replace("_", " ").replace("-", " "), image)
