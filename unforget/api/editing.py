"""`edit_surrogate`: a picture near the target that is another instance."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unforget.api.common import editor_of, holding_outputs, load, read
from unforget.config import EditConfig
from unforget.config.commands import command_line
from unforget.core.types import Family, Progress
from unforget.errors import UsageError
from unforget.files import images, storage
from unforget.files.storage import write_bytes
from unforget.reports.contact_sheet import candidate_sheet
from unforget.reports.html import picker
from unforget.surrogate.canvas import Canvas, box_mask, ellipse_mask
from unforget.surrogate.editors import Editor, candidates, check
from unforget.surrogate.ranking import Candidate
from unforget.unlearning.prepare import Drawer, prompt_ids, retain_set


@dataclass(frozen=True)
class Edited:
    """What `edit_surrogate` made."""

    output: Path
    """The surrogate, PNG."""
    sheet: Path
    """All candidates, to look at."""
    picked: int
    """Which of them it is, from 1."""
    candidates: list[dict[str, Any]]
    """Best first; distance to the target in RMS of pixels in [-1, 1]."""


def edit_surrogate(config: EditConfig, progress: Progress | None = None) -> Edited:
    """Make candidates for a target's surrogate, rank them, write the best one and a contact sheet.

    UsageError if a file or an option is wrong, or there is no candidate of the number `pick`; CannotRun if the model
    cannot be loaded. A near-copy is a UsageError unless `allow_near_copy`; one that is not accepted otherwise is
    written all the same, with a note.
    """
    with holding_outputs(config):
        return _edited(config, progress or Progress())


def _edited(config: EditConfig, progress: Progress) -> Edited:
    family, editor = load(config, progress), editor_of(config)
    canvas = read_canvas(config, family, editor, progress)
    listed = storage.read_lines(config.retain_prompts) if config.retain_prompts else ()
    draw = Drawer(family, config.seed, config.sampler_steps, progress)
    drawn = retain_set(draw, config.prompt, listed, config.retain_count).x_0
    id = prompt_ids(family, config.prompt)[-1]
    canvas = replace(canvas, drawn=drawn, prompt_id=id)
    ranked = candidates(canvas, editor, distance=config.min_distance, near_copy=config.near_copy, progress=progress)
    number = config.pick or 1
    if number > len(ranked):
        raise UsageError(f"there is no candidate {number}, only {len(ranked)}", f"Give --pick 1 to {len(ranked)}.")
    picked = ranked[number - 1]
    if (near := picked.nearest()) < config.near_copy and not config.allow_near_copy:
        sentence = f"candidate {number} is a near-copy of the target, or of what the base draws: RMS {near:.3f}"
        raise UsageError(sentence, "Give another --pick, --strength or --method, or say --allow-near-copy.")
    images.write_image(picked.image, config.output)
    images.write_image(candidate_sheet(canvas.target, ranked, number), config.sheet)
    if config.html is not None:
        write_bytes(picker(canvas.target, ranked, number, partial(_taking, config)).encode(), config.html)
    if not picked.accepted:
        progress.note("the candidate is too near the target or of another quality; look at the sheet before using it")
    rows = [{"pick": i, **{k: v for k, v in asdict(c).items() if k != "image"}} for i, c in enumerate(ranked, 1)]
    return Edited(config.output, config.sheet, number, rows)


def read_canvas(config: EditConfig, family: Family, editor: Editor, progress: Progress) -> Canvas:
    """The pictures that were given, read and checked, before anything is drawn; UsageError if one does not fit."""
    target = read(config.target, family, config, progress)
    donor = read(config.donor, family, config, progress) if config.donor else None
    mask = _mask(config, family, soft=editor.kind == "donor")
    canvas = Canvas(family, target, mask, donor, config.seed, note=progress.note)
    check(editor, canvas)
    return canvas


def _taking(config: EditConfig, number: int, candidate: Candidate) -> str:
    """The command that takes a candidate: the one that was given, with another --pick."""
    fields = [name for name in EditConfig.model_fields if name not in ("pick", "force", "allow_near_copy")]
    allowed = " --allow-near-copy" if candidate.nearest() < config.near_copy else ""
    return f"{command_line(config, fields, pick=number)} --force{allowed}"


def _mask(config: EditConfig, family: Family, *, soft: bool) -> Tensor:
    """Where to edit, (1, H, W) in [0, 1]: the given mask or box, else a soft ellipse or everywhere."""
    _, height, width = family.image_shape
    if config.mask is not None:
        return (images.read_image(config.mask, (1, height, width), resize=config.resize) + 1) / 2
    if config.box is not None:
        return box_mask(config.box, height, width)
    return ellipse_mask(height, width) if soft else torch.ones(1, height, width)
