"""Contact sheets: labelled rows of images, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unforget.data import to_pil

Row = tuple[str, Sequence[tuple[Tensor, str]]]
CELL = 96
PAD = 8
TEXT = 14


def sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """Draw rows of (image (C, H, W), caption), each row under its own heading."""
    columns = max(len(cells) for _, cells in rows)
    width = max(PAD + columns * (CELL + PAD), 420)
    height = PAD + 2 * TEXT + sum(_height(cells) for _, cells in rows) + PAD
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    pen.text((PAD, PAD), title, "black", ImageFont.load_default(size=15))
    y = PAD + 2 * TEXT
    for heading, cells in rows:
        pen.text((PAD, y), heading, "#444444", font)
        for i, (image, caption) in enumerate(cells):
            x = PAD + i * (CELL + PAD)
            small = to_pil(image).convert("RGB")
            resample = Image.Resampling.NEAREST if small.width <= CELL else Image.Resampling.LANCZOS
            canvas.paste(small.resize((CELL, CELL), resample), (x, y + TEXT + 4))
            pen.text((x, y + TEXT + 6 + CELL), caption, "black", ImageFont.load_default(size=10))
        y += _height(cells)
    return canvas


def _height(cells: Sequence[tuple[Tensor, str]]) -> int:
    return TEXT + 6 + CELL + (TEXT if any(caption for _, caption in cells) else 0) + PAD
