"""Contact sheets: labelled rows of images, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unforget.core.types import Instance
from unforget.files.images import to_pil
from unforget.surrogate.ranking import Candidate
from unforget.verification.context import Which
from unforget.verification.probes import Finding

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


def candidate_sheet(target: Tensor, ranked: Sequence[Candidate], picked: int) -> Image.Image:
    """All candidates for a surrogate, best first, the picked one starred."""
    cells = [
        (c.image, f"{'*' if i == picked else ''}{i}: {c.distance:.2f} {c.typicality:.2f}")
        for i, c in enumerate(ranked, 1)
    ]
    rows: list[Row] = [("target", [(target, "")])]
    for k in range(0, len(cells), 8):
        rows.append(("candidates, best first: distance to the target, typicality" if k == 0 else "", cells[k : k + 8]))
    return sheet("Surrogate candidates", rows)


def evidence_rows(instances: Sequence[Instance], findings: Sequence[Finding]) -> list[Row]:
    """Targets, surrogates, what base and candidate made of them, and same-seed pairs."""
    rows: list[Row] = []
    for k, instance in enumerate(instances):
        rows.append(
            (f"target {k + 1} and its surrogate", [(instance.target, "target"), (instance.surrogate, "surrogate")])
        )
        rows += [_pairs(f) for f in findings if f.target == instance.id and f.probe in HEADINGS and f.images]
    rows += [
        (f"same seed, {which}", [(image, "") for image in f.images[which][:8]])
        for f in findings
        if f.probe == "retention"
        for which in WHICH
    ]
    return rows


HEADINGS = {
    "reconstruct": "noised to t = {timestep:g} and back",
    "partial_denoise": "begun by the base, finished from t = {timestep:g}",
    "replay": "the seed that made it",
    "neighbours": "others beside it, from t = {timestep:g}",
    "noise_search": "start noise sought for it",
}
WHICH: tuple[Which, ...] = ("base", "patched")


def _pairs(f: Finding) -> Row:
    under = f" under '{f.prompt}'" if f.prompt else ""
    heading = HEADINGS[f.probe].format(timestep=f.timestep)
    cells = [(image, which) for which in WHICH for image in f.images.get(which, ())[:4]]
    return f"{heading}{under}: base, then patched", cells
