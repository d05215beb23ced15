"""What goes into a run: where to edit, whom the base draws, surrogates, and the pictures to keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unforget import data
from unforget.config import EditConfig, UnlearnConfig
from unforget.domain import Family, Instance, Listener
from unforget.editors import Candidate, Canvas, Editor, SDEdit, rank
from unforget.errors import CannotRun, UsageError
from unforget.metrics import pairwise_rms
from unforget.objectives import Context

NEIGHBOURS = 24
"""Pictures beside each target that training visits more often."""


def mask(config: EditConfig, family: Family) -> Tensor:
    """Where to edit, (1, H, W) in [0, 1]: the mask, the box, a soft ellipse for a donor, or everywhere."""
    _, height, width = family.shape
    if config.mask is not None:
        mask = data.read_image(config.mask, (1, height, width), resize=config.resize)
        return (mask + 1) / 2
    if config.box is not None:
        x, y, w, h = config.box
        if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
            raise UsageError(f"the box {x},{y},{w},{h} leaves the {width}x{height} picture", "Give x,y,width,height.")
        mask = torch.zeros(1, height, width)
        mask[:, y : y + h, x : x + w] = 1
        return mask
    if config.editor.kind == "donor":
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        ellipse: Tensor = ((1 - (columns / 0.55).square() - (rows / 0.65).square()) / 0.35).clamp(0, 1)
        return ellipse[None]
    return torch.ones(1, height, width)


def drawn(base: Family, base_digest: str, config: EditConfig | UnlearnConfig, listener: Listener) -> Tensor:
    """What the base draws: the retain set where none is given, and whom a surrogate must not be."""
    listener.stage("retain set", config.retain_count)
    return data.drawn_cached(
        base, base_digest, config.retain_count, seed=config.seed, steps=config.sampler_steps, advance=listener.advance
    )


def candidates(
    canvas: Canvas, editor: Editor, config: EditConfig | UnlearnConfig, listener: Listener
) -> list[Candidate]:
    """What an editor makes of the target, ranked, best first."""
    listener.stage("surrogate candidates", 1)
    found = rank(editor(canvas), canvas, distance=config.min_distance, near_copy=config.near_copy)
    listener.advance(1)
    return found


def distinct(targets: Sequence[Tensor], surrogates: Sequence[Tensor]) -> None:
    """Refuse a surrogate that is its target, and a target that is given twice."""
    for k, (target, surrogate) in enumerate(zip(targets, surrogates, strict=False), 1):
        if torch.equal(target, surrogate):
            raise UsageError(f"surrogate {k} is its target", "Make one with `unforget edit-surrogate`.")
    ids = [data.image_id(t) for t in targets]
    if len(set(ids)) < len(ids):
        raise UsageError("a target is given twice", "Give each picture once.")


def instances(
    base: Family, targets: list[Tensor], given: list[Tensor], kept: Tensor, config: UnlearnConfig, listener: Listener
) -> tuple[tuple[Instance, ...], Tensor]:
    """Targets with their surrogates, and the edits that were made on the way: pictures beside the targets."""
    edits: list[Tensor] = []
    for target in targets if not given else []:
        canvas = Canvas(base, target, torch.ones(1, *base.shape[1:]), seed=config.seed, drawn=kept)
        ranked = candidates(canvas, SDEdit(), config, listener)
        if not ranked[0].accepted:
            ranked = candidates(canvas, SDEdit(strengths=(0.75, 0.8, 0.85)), config, listener) + ranked
        best = next((c for c in ranked if c.accepted), None)
        if best is None:
            raise CannotRun(
                "no edit of the target is far enough from it and of fair quality",
                "Make a surrogate with `unforget edit-surrogate` and give it with --surrogate.",
            )
        given.append(best.image)
        edits += [c.image for c in ranked]
    found = tuple(Instance(t, s, data.image_id(t)) for t, s in zip(targets, given, strict=True))
    return found, torch.stack(edits) if edits else torch.empty(0, *base.shape)


def context(
    base: Family, instances: tuple[Instance, ...], kept: Tensor, edits: Tensor, near_copy: float
) -> tuple[Context, Tensor]:
    """What training may consult, and the pictures beside the targets. Near-copies of a target are not kept."""
    targets = torch.stack([i.target for i in instances])
    copies = (pairwise_rms(kept, targets) < near_copy).sum(0).clamp(min=1)
    keep, beside = (p[(pairwise_rms(p, targets) >= near_copy).all(1)] for p in (kept, edits))
    if not len(keep):
        raise UsageError("every picture of the retain set is a near-copy of a target", "Give other pictures.")
    near = torch.cat([neighbours(keep, instances, NEIGHBOURS), beside])

    @torch.no_grad()
    def answer(x_t: Tensor, index: Tensor) -> Tensor:
        return base.predict(x_t, index)

    return Context(base.schedule, answer, instances, keep, copies), near


def neighbours(keep: Tensor, instances: tuple[Instance, ...], count: int) -> Tensor:
    """Pictures to keep that lie nearest to any target: where forgetting spills over first."""
    if not len(keep):
        return keep
    distance = pairwise_rms(keep, torch.stack([i.target for i in instances])).min(1).values
    return keep[distance.argsort(stable=True)[: count * len(instances)]]
