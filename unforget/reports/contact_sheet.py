"""Contact sheets: labelled rows of images, for people to look at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from unforget.core.types import Instance
from unforget.files.images import to_pil
from unforget.surrogate.ranking import Candidate
from unforget.verification import probes
from unforget.verification.context import ROLES, Finding, known_surrogate
from unforget.verification.report import Check, Place

Row = tuple[str, Sequence[tuple[Tensor, str]]]
"""Heading, and images (C, H, W) with their captions; a row without a heading belongs to the one above."""
CELL = (96, 256)
"""Least and most pixels of a cell's side; between them an image has its own size."""
PAD = 8
TEXT = 14


def sheet(title: str, rows: Sequence[Row]) -> Image.Image:
    """Draw rows of (image (C, H, W), caption), each row under its own heading."""
    columns = max(len(cells) for _, cells in rows)
    cell = _cell(rows)
    width = max(PAD + columns * (cell + PAD), 420)
    height = PAD + 2 * TEXT + sum(_height(row, cell) for row in rows) + PAD
    canvas = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    pen.text((PAD, PAD), title, "black", ImageFont.load_default(size=15))
    y = PAD + 2 * TEXT
    for heading, cells in rows:
        pen.text((PAD, y), heading, "#444444", font)
        top = y + _above(heading)
        for i, (image, caption) in enumerate(cells):
            x = PAD + i * (cell + PAD)
            whole = to_pil(image).convert("RGB")
            resample = Image.Resampling.NEAREST if max(whole.size) <= cell else Image.Resampling.LANCZOS
            canvas.paste(ImageOps.contain(whole, (cell, cell), resample), (x, top))
            pen.text((x, top + 2 + cell), caption, "black", ImageFont.load_default(size=10))
        y += _height((heading, cells), cell)
    return canvas


def _cell(rows: Sequence[Row]) -> int:
    """Side of a cell, in pixels: that of the largest image, within bounds."""
    least, most = CELL
    return min(max(least, *(side for _, cells in rows for image, _ in cells for side in image.shape[-2:])), most)


def _above(heading: str) -> int:
    return TEXT + 4 if heading else 0


def _height(row: Row, cell: int) -> int:
    return _above(row[0]) + 2 + cell + (TEXT if any(caption for _, caption in row[1]) else 0) + PAD


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


def evidence_rows(
    instances: Sequence[Instance], findings: Sequence[Finding], checks: Sequence[Check] = ()
) -> list[Row]:
    """Targets, surrogates, what base and candidate made of them, and same-seed pairs.

    A row whose `checks` are all informational says that it does not decide.
    """
    headings = {probe.kind: probe.heading for probe in probes.load() if probe.heading}
    rows: list[Row] = []
    for k, instance in enumerate(instances):
        cells = [(instance.target, "target"), *((image, "surrogate") for image in known_surrogate(instance))]
        rows.append((f"target {k + 1}{' and its surrogate' if cells[1:] else ''}", cells))
        for f in findings:
            if f.target == instance.id and f.images and f.probe in headings:
                outcomes = {c.outcome for c in checks if (c.target, c.name) == (f.target, Place(**f.place).name)}
                under = f" under '{f.prompt}'" if f.prompt else ""
                aside = " (does not decide)" if outcomes == {"informational"} else ""
                rows += _pair(
                    f, f"{headings[f.probe].format(timestep=f.timestep and round(f.timestep))}{under}{aside}", 4
                )
    return rows + [row for f in findings if f.probe == "retention" for row in _pair(f, "same seeds", 8)]


def _pair(f: Finding, heading: str, most: int) -> list[Row]:
    """The base's images, and below them the candidate's of the same noise."""
    roles = [role for role in ROLES if len(f.images.get(role, ()))]
    return [(heading if i == 0 else "", [(image, r) for image in f.images[r][:most]]) for i, r in enumerate(roles)]
