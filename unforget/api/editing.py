"""`edit_surrogate`: a picture near the target that is another instance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unforget.api.common import editor_of, load, read, writable
from unforget.config import EditConfig
from unforget.core.types import Progress
from unforget.errors import UsageError
from unforget.files import images
from unforget.files.storage import digest
from unforget.reports.contact_sheet import candidate_sheet
from unforget.surrogate.editors import Canvas
from unforget.unlearning import prepare


@dataclass(frozen=True)
class Edited:
    """What `edit_surrogate` made: the surrogate's file, the sheet of all candidates, and their scores, best first."""

    output: Path
    sheet: Path
    picked: int
    candidates: list[dict[str, Any]]


def edit_surrogate(config: EditConfig, progress: Progress | None = None) -> Edited:
    """Make candidates for a target's surrogate, rank them, write the best one and a contact sheet."""
    progress = progress or Progress()
    shown = config.output.with_suffix(".sheet.png")
    writable(config.output, config.force)
    family = load(config)
    target = read(config.target, family, config, progress)
    donor = read(config.donor, family, config, progress) if config.donor else None
    mask = prepare.mask(config, family)
    drawn = prepare.drawn(family, digest(family.network.state_dict()), config, progress)
    row = prepare.prompt_ids(family, config.prompt)[-1]
    canvas = Canvas(family, target, mask, donor, config.seed, drawn.x_0, row, progress.note)
    ranked = prepare.candidates(canvas, editor_of(config), config, progress)
    number = config.pick or 1
    if number > len(ranked):
        raise UsageError(f"there is no candidate {number}, only {len(ranked)}", f"Give --pick 1 to {len(ranked)}.")
    images.write_image(ranked[number - 1].image, config.output)
    images.write_image(candidate_sheet(target, ranked, number), shown)
    if not ranked[number - 1].accepted:
        progress.note("the candidate is too near the target or of another quality; look at the sheet before using it")
    rows = [{"pick": i, **{k: v for k, v in asdict(c).items() if k != "image"}} for i, c in enumerate(ranked, 1)]
    return Edited(config.output, shown, number, rows)
