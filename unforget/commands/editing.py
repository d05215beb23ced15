"""`edit_surrogate`: a picture near the target that is another instance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unforget import data, prepare
from unforget.commands.common import load, read, writable
from unforget.config import EditConfig
from unforget.domain import Listener
from unforget.editors import Canvas
from unforget.errors import UsageError
from unforget.sheets import candidate_sheet
from unforget.storage import digest


@dataclass(frozen=True)
class Edited:
    """What `edit_surrogate` made: the surrogate's file, the sheet of all candidates, and their scores, best first."""

    output: Path
    sheet: Path
    picked: int
    candidates: list[dict[str, Any]]


def edit_surrogate(config: EditConfig, listener: Listener | None = None) -> Edited:
    """Make candidates for a target's surrogate, rank them, write the best one and a contact sheet."""
    listener = listener or Listener()
    shown = config.output.with_suffix(".sheet.png")
    writable(config.output, config.force)
    family = load(config)
    target = read(config.target, family, config, listener)
    donor = read(config.donor, family, config, listener) if config.donor else None
    mask = prepare.mask(config, family)
    drawn = prepare.drawn(family, digest(family.network.state_dict()), config, listener)
    row = prepare.conditions(family, config.prompt)[-1]
    canvas = Canvas(family, target, mask, donor, config.seed, drawn.x_0, row, listener.note)
    ranked = prepare.candidates(canvas, config.editor, config, listener)
    number = config.pick or 1
    if number > len(ranked):
        raise UsageError(f"there is no candidate {number}, only {len(ranked)}", f"Give --pick 1 to {len(ranked)}.")
    data.write_image(ranked[number - 1].image, config.output)
    data.write_image(candidate_sheet(target, ranked, number), shown)
    if not ranked[number - 1].accepted:
        listener.note("the candidate is too near the target or of another quality; look at the sheet before using it")
    rows = [{"pick": i, **{k: v for k, v in asdict(c).items() if k != "image"}} for i, c in enumerate(ranked, 1)]
    return Edited(config.output, shown, number, rows)
