"""What goes into a run: where to edit, whom the base draws, surrogates, and the pictures to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unforget.config import EditConfig, UnlearnConfig
from unforget.core.metrics import pairwise_rms, rms, shows
from unforget.core.objectives import Context
from unforget.core.types import Family, Instance, Pool, Predict, Progress
from unforget.errors import CannotRun, UsageError
from unforget.files import cache, images, storage
from unforget.surrogate.editors import Candidate, Canvas, Editor, SDEdit, carried, rank

NEIGHBOURS = 24
"""Pictures beside each target that training visits more often."""


def mask(config: EditConfig, family: Family) -> Tensor:
    """Where to edit, (1, H, W) in [0, 1]: the mask, the box, a soft ellipse for a donor, or everywhere."""
    _, height, width = family.image_shape
    if config.mask is not None:
        mask = images.read_image(config.mask, (1, height, width), resize=config.resize)
        return (mask + 1) / 2
    if config.box is not None:
        x, y, w, h = config.box
        if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
            raise UsageError(f"the box {x},{y},{w},{h} leaves the {width}x{height} picture", "Give x,y,width,height.")
        mask = torch.zeros(1, height, width)
        mask[:, y : y + h, x : x + w] = 1
        return mask
    if config.method == "donor":
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        ellipse: Tensor = ((1 - (columns / 0.55).square() - (rows / 0.65).square()) / 0.35).clamp(0, 1)
        return ellipse[None]
    return torch.ones(1, height, width)


def prompt_ids(base: Family, prompts: Sequence[str]) -> tuple[int, ...]:
    """Rows of the empty prompt and of the given ones, each once: guidance uses the empty one beside any other."""
    return tuple(dict.fromkeys(base.prompt_ids(["", *prompts]).tolist()))


def drawn(base: Family, base_digest: str, config: EditConfig | UnlearnConfig, progress: Progress) -> Pool:
    """What the base draws: the retain set where none is given, and whom a surrogate must not be.

    A quarter for the given prompts and the empty one, the rest for the retain prompts, which take turns.
    """
    listed = storage.read_lines(config.retain_prompts) if config.retain_prompts else base.retain_prompts
    base.prompt_ids(listed[:1])  # refuse prompts early where the model takes none
    count = config.retain_count or max(192, round(len(listed) * 4 / 3))
    own = ["", *config.prompt]
    share = count // 4 if any(listed) else 0
    prompts = [own[k % len(own)] for k in range(share)] + [listed[k % len(listed)] for k in range(count - share)]
    progress.stage("retain set", count)
    images = cache.drawn_cached(
        base, base_digest, prompts, seed=config.seed, steps=config.sampler_steps, advance=progress.advance
    )
    return Pool(images, base.prompt_ids(prompts))


def candidates(
    canvas: Canvas, editor: Editor, config: EditConfig | UnlearnConfig, progress: Progress
) -> list[Candidate]:
    """What an editor makes of the target, ranked, best first."""
    progress.stage("surrogate candidates", 1)
    found = rank(editor(canvas), canvas, distance=config.min_distance, near_copy=config.near_copy)
    progress.advance(1)
    return found


def distinct(targets: Sequence[Tensor], surrogates: Sequence[Tensor]) -> None:
    """Refuse a surrogate that is its target, and a target that is given twice."""
    for k, (target, surrogate) in enumerate(zip(targets, surrogates, strict=False), 1):
        if torch.equal(target, surrogate):
            raise UsageError(f"surrogate {k} is its target", "Make one with `unforget edit-surrogate`.")
    ids = [images.image_id(t) for t in targets]
    if len(set(ids)) < len(ids):
        raise UsageError("a target is given twice", "Give each picture once.")


def instances(
    base: Family,
    targets: list[Tensor],
    given: list[Tensor],
    kept: Pool,
    config: UnlearnConfig,
    progress: Progress,
    salt: str = "",
) -> tuple[tuple[Instance, ...], Tensor]:
    """Targets with their surrogates, and the edits that were made on the way: pictures beside the targets."""
    edits: list[Tensor] = []
    rows = prompt_ids(base, config.prompt)
    for target in targets if not given else []:
        canvas = Canvas(
            base, target, torch.ones(1, *base.image_shape[1:]), seed=config.seed, drawn=kept.x_0, prompt_id=rows[-1]
        )
        ranked = candidates(canvas, SDEdit(), config, progress)
        if not ranked[0].accepted:
            ranked = candidates(canvas, SDEdit(strengths=(0.75, 0.8, 0.85)), config, progress) + ranked
        best = next((c for c in ranked if c.accepted), None)
        if best is None:
            raise CannotRun(
                "no edit of the target is another picture, far enough from it and of fair quality",
                "Make a surrogate with `unforget edit-surrogate` and give it with --surrogate.",
            )
        given.append(best.image)
        edits += [c.image for c in ranked]
    found = tuple(Instance(t, s, images.image_id(t, salt), rows) for t, s in zip(targets, given, strict=True))
    return found, torch.stack(edits) if edits else torch.empty(0, *base.image_shape)


MISFIT = 0.5
"""Largest RMS between a variant and the moved target, as a share of that between target and surrogate."""
NAMESAKES = 24
"""Pictures drawn for every prompt that is to keep what the target looks like."""


def namesakes(
    base: Family, base_digest: str, instances: Sequence[Instance], kept: Pool, config: UnlearnConfig, progress: Progress
) -> Pool:
    """More of what the base draws under prompts that draw a target and are not to forget it: the nearest to harm.

    Without given prompts there are none: the picture is to go wherever it comes up.
    """
    given = instances[0].prompt_ids
    looks = torch.stack([shows(kept.x_0, i.target, i.surrogate) for i in instances], 1).any(1)
    rows = sorted(set(kept.prompt_ids[looks].tolist()) - set(given))
    if not rows:
        return kept[:0]
    names = ", ".join(f"'{base.prompts[r]}'" for r in rows[:4])
    fate = "it stays there" if len(given) > 1 else "give --prompt to forget it there"
    progress.note(f"the base draws a target, or nearly, under {names}, too; {fate}")
    if len(given) == 1:
        return kept[:0]
    prompts = [base.prompts[r] for r in rows[:4] for _ in range(NAMESAKES)]
    progress.stage("what must stay", len(prompts))
    images = cache.drawn_cached(
        base, base_digest, prompts, seed=config.seed, steps=config.sampler_steps, advance=progress.advance
    )
    return Pool(images, base.prompt_ids(prompts))


def context(
    base: Family, instances: tuple[Instance, ...], kept: Pool, beside: Pool, near_copy: float
) -> tuple[Context, Pool]:
    """What training may consult, and the pool beside the targets, both encoded. Copies of a target are not kept.

    Args:
        base: The base.
        instances: Targets with their surrogates.
        kept: What the base draws.
        beside: More pictures near the targets, which training visits more often.
        near_copy: RMS under which two pictures are the same.

    Under a prompt that is not to forget a target, a copy of it is kept if prompts were given, and else is not.
    """
    targets = torch.stack([i.target for i in instances])
    given = torch.tensor(instances[0].prompt_ids)
    copies = _copies(kept, instances, near_copy)
    lost = copies.any(1) & _gone(kept, given)
    variants = _variants(kept[lost & (kept.prompt_ids > 0)], instances)
    keep, beside = kept[~lost], beside[~(_copies(beside, instances, near_copy).any(1) & _gone(beside, given))]
    if not len(keep):
        raise UsageError("every picture of the retain set is a near-copy of a target", "Give other pictures.")
    counts = torch.zeros(len(instances) + len(variants), len(base.prompts))
    for row in given.tolist():
        counts[: len(instances), row] = copies[kept.prompt_ids == row].sum(0).clamp(min=1)
    for k, variant in enumerate(variants, len(instances)):
        counts[k, variant.prompt_ids[0]] = 1
        counts[: len(instances), variant.prompt_ids[0]] = 1
    pool, more = (Pool(base.encode(p.x_0), p.prompt_ids) for p in (keep, beside))
    nearest = pool[neighbours(keep.x_0, targets, NEIGHBOURS * len(instances))]
    gone = (*instances, *variants)
    latents = zip(*(base.encode(torch.stack([vars(i)[n] for i in gone])) for n in ("target", "surrogate")), strict=True)
    encoded = tuple(replace(i, target=t, surrogate=s) for i, (t, s) in zip(gone, latents, strict=True))

    # What a prompt draws competes with the target in the belief. An edit of the target must not: the base never draws
    # it, and so near a rival would keep the belief in the target, and with it the change, small.
    rivals = Pool.cat(pool, more[more.prompt_ids > 0])
    return Context(base.schedule, answers(base), encoded, rivals, counts), Pool.cat(nearest, more)


def answers(base: Family) -> Predict:
    """What the base says, without gradients."""

    @torch.no_grad()
    def answer(x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
        return base.predict(x_t, timestep, prompt_ids)

    return answer


def _copies(pool: Pool, instances: Sequence[Instance], near_copy: float) -> Tensor:
    """Which pictures are copies of which target, (N, targets); under a prompt, in any place and size."""
    near = pairwise_rms(pool.x_0, torch.stack([i.target for i in instances])) < near_copy
    sided = torch.stack([shows(pool.x_0, i.target, i.surrogate) for i in instances], 1)
    return near | (sided & (pool.prompt_ids > 0)[:, None])


def _variants(pool: Pool, instances: Sequence[Instance]) -> tuple[Instance, ...]:
    """Pictures that show a target in another place or size, as targets of their own: the same edit, moved there."""
    found = []
    for picture, row in zip(pool.x_0, pool.prompt_ids.tolist(), strict=True):
        nearest = min(instances, key=lambda i: float(rms(picture, i.target)))
        edited, misfit = carried(picture, nearest.target, nearest.surrogate)
        if misfit <= MISFIT * float(rms(nearest.target, nearest.surrogate)):
            found.append(Instance(picture, edited, nearest.id, (row,)))
    return tuple(found)


def _gone(pool: Pool, given: Tensor) -> Tensor:
    """Which pictures are under prompts that are to forget; all, if none was given."""
    return torch.isin(pool.prompt_ids, given) | (len(given) == 1)


def neighbours(pictures: Tensor, targets: Tensor, count: int) -> Tensor:
    """Rows of the pictures that lie nearest to any target: where forgetting spills over first."""
    return pairwise_rms(pictures, targets).min(1).values.argsort(stable=True)[:count]
