"""What goes into a run: where to edit, whom the base draws, surrogates, and the pictures to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unforget import data
from unforget.config import EditConfig, UnlearnConfig
from unforget.domain import Family, Instance, Listener, Pool
from unforget.editors import Candidate, Canvas, Editor, SDEdit, rank
from unforget.errors import CannotRun, UsageError
from unforget.metrics import margin, pairwise_rms
from unforget.objectives import Context

NEIGHBOURS = 24
"""Pictures beside each target that training visits more often."""


def mask(config: EditConfig, family: Family) -> Tensor:
    """Where to edit, (1, H, W) in [0, 1]: the mask, the box, a soft ellipse for a donor, or everywhere."""
    _, height, width = family.picture
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


def conditions(base: Family, prompts: Sequence[str]) -> tuple[int, ...]:
    """Rows of the empty prompt and of the given ones, each once: guidance uses the empty one beside any other."""
    return tuple(dict.fromkeys(base.condition(["", *prompts]).tolist()))


def drawn(base: Family, base_digest: str, config: EditConfig | UnlearnConfig, listener: Listener) -> Pool:
    """What the base draws: the retain set where none is given, and whom a surrogate must not be.

    A quarter for the given prompts and the empty one, the rest for the retain prompts, which take turns.
    """
    listed = data.read_lines(config.retain_prompts) if config.retain_prompts else base.retain_prompts
    base.condition(listed[:1])  # refuse prompts early where the model takes none
    count = config.retain_count or max(192, round(len(listed) * 4 / 3))
    own = ["", *config.prompt]
    share = count // 4 if any(listed) else 0
    prompts = [own[k % len(own)] for k in range(share)] + [listed[k % len(listed)] for k in range(count - share)]
    listener.stage("retain set", count)
    images = data.drawn_cached(
        base, base_digest, prompts, seed=config.seed, steps=config.sampler_steps, advance=listener.advance
    )
    return Pool(images, base.condition(prompts))


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
    base: Family, targets: list[Tensor], given: list[Tensor], kept: Pool, config: UnlearnConfig, listener: Listener
) -> tuple[tuple[Instance, ...], Tensor]:
    """Targets with their surrogates, and the edits that were made on the way: pictures beside the targets."""
    edits: list[Tensor] = []
    rows = conditions(base, config.prompt)
    for target in targets if not given else []:
        canvas = Canvas(
            base, target, torch.ones(1, *base.picture[1:]), seed=config.seed, drawn=kept.x_0, condition=rows[-1]
        )
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
    found = tuple(Instance(t, s, data.image_id(t), rows) for t, s in zip(targets, given, strict=True))
    return found, torch.stack(edits) if edits else torch.empty(0, *base.picture)


SIDED = -0.5
"""Margin up to which a picture drawn under a prompt of the target counts as the target in another place or size."""


def context(
    base: Family, instances: tuple[Instance, ...], kept: Pool, edits: Tensor, near_copy: float, listener: Listener
) -> tuple[Context, Pool]:
    """What training may consult, and the pool beside the targets, both encoded. Copies of a target are not kept.

    A copy that the base draws under another prompt than those to be forgotten is kept if prompts were given (it is
    right there), and else is not.
    """
    targets = torch.stack([i.target for i in instances])
    near = pairwise_rms(kept.x_0, targets) < near_copy
    asked = torch.tensor([[int(c) in i.conditions for i in instances] for c in kept.condition])
    sided = torch.stack([margin(kept.x_0, i.target, i.surrogate) <= SIDED for i in instances], 1)
    copies = near | (sided & asked & (kept.condition > 0)[:, None])
    _tell(base, kept, near & ~asked, len(instances[0].conditions) > 1, listener)
    dropped = (copies & asked).any(1)
    if len(instances[0].conditions) == 1:
        dropped |= near.any(1)
    beside = edits[(pairwise_rms(edits, targets) >= near_copy).all(1)]
    keep = kept[~dropped]
    if not len(keep):
        raise UsageError("every picture of the retain set is a near-copy of a target", "Give other pictures.")
    counts = torch.zeros(len(instances), len(base.prompts))
    for k, instance in enumerate(instances):
        for row in instance.conditions:
            counts[k, row] = (copies[:, k] & (kept.condition == row)).sum().clamp(min=1)
    pool = Pool(base.encode(keep.x_0), keep.condition)
    nearest = pool[neighbours(keep.x_0, targets, NEIGHBOURS * len(instances))]
    encoded = tuple(
        replace(i, target=t, surrogate=s)
        for i, t, s in zip(
            instances, base.encode(targets), base.encode(torch.stack([i.surrogate for i in instances])), strict=True
        )
    )

    @torch.no_grad()
    def answer(x_t: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        return base.predict(x_t, index, condition)

    found = Context(base.schedule, answer, encoded, pool, counts)
    return found, Pool.cat(nearest, Pool.of(base.encode(beside)))


def _tell(base: Family, kept: Pool, elsewhere: Tensor, prompted: bool, listener: Listener) -> None:
    """Say under which other prompts the base draws a target."""
    rows = sorted(set(kept.condition[elsewhere.any(1)].tolist()))
    if rows:
        names = ", ".join(f"'{base.prompts[r]}'" for r in rows[:4])
        fate = "it stays there" if prompted else "give --prompt to forget it there"
        listener.note(f"the base also draws a target under {names}; {fate}")


def neighbours(pictures: Tensor, targets: Tensor, count: int) -> Tensor:
    """Rows of the pictures that lie nearest to any target: where forgetting spills over first."""
    return pairwise_rms(pictures, targets).min(1).values.argsort(stable=True)[:count]
