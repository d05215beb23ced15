"""What training starts from: surrogates, the images to retain, their neighbours; all encoded once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unforget.core import passes
from unforget.core.metrics import pairwise_rms, rms, shows
from unforget.core.passes import is_large
from unforget.core.registration import UNRELATED, carried, misfit
from unforget.core.types import UNCONDITIONAL, Family, Instance, Pool, Progress
from unforget.errors import CannotRun, UsageError
from unforget.files import cache, images
from unforget.files.storage import digest
from unforget.surrogate.canvas import Canvas
from unforget.surrogate.editors import automatic, candidates

NEIGHBOURS = 24  # retain images nearest to each target, which training visits more often
RETAINED, RETAINED_LARGE = 192, 64  # images to retain, unless the user says how many
LOOKALIKES, LOOKALIKES_LARGE = 24, 8  # images drawn for every prompt that is to retain what the target looks like
ALIKE = 4  # such prompts at most


@dataclass(frozen=True)
class RunInputs:
    """What a run is to do, read and checked; images are (C, H, W) in [-1, 1]."""

    targets: tuple[Tensor, ...]
    surrogates: tuple[Tensor, ...] = ()  # made when there are none, if the objective needs them
    prompts: tuple[str, ...] = ()  # under which the targets are forgotten; everywhere without any
    retain: Tensor | None = None  # (N, C, H, W); drawn from the base when None
    retain_prompts: tuple[str, ...] = ()
    retain_count: int | None = None
    sampler_steps: int = 20
    near_copy: float = 0.16
    allow_near_copy: bool = False  # whether a surrogate that was given may be one of its target
    min_distance: float = 0.2
    seed: int = 0
    salt: str = ""  # of the ids of images
    earlier: tuple[Instance, ...] = ()  # of the patches that the run begins with: shown again at the end
    needs_surrogate: bool = True

    def __post_init__(self) -> None:
        for k, (target, surrogate) in enumerate(zip(self.targets, self.surrogates, strict=False), 1):
            if torch.equal(target, surrogate):
                raise UsageError(f"surrogate {k} is its target", "Make one with `unforget edit-surrogate`.")
            if (near := float(rms(target[None], surrogate[None]))) < self.near_copy and not self.allow_near_copy:
                sentence = (
                    f"surrogate {k} is a near-copy of its target: their RMS is {near:.3f}, under {self.near_copy:g}"
                )
                raise UsageError(sentence, "Give another picture, or say --allow-near-copy.")
        if len({images.image_id(t) for t in self.targets}) < len(self.targets):
            raise UsageError("a target is given twice", "Give each picture once.")

    @property
    def replaces(self) -> bool:
        """Whether there is an image in the place of each target."""
        return bool(self.surrogates) or self.needs_surrogate


@dataclass(frozen=True)
class Prepared:
    """What training starts from."""

    instances: tuple[Instance, ...]  # as images, those of earlier patches too: to be shown at the end
    encoded: tuple[Instance, ...]  # what is to be forgotten: targets, and their variants in other places
    retain: Pool  # encoded
    neighbours: Pool  # encoded images near a target, which training visits more often
    prior_counts: Tensor  # of `encoded`: see `objectives.Context`


@dataclass(frozen=True)
class Drawer:
    """Draws from the base, or reads from the cache what it drew before for the same seed, prompts and steps."""

    base: Family
    seed: int
    steps: int
    progress: Progress

    def __call__(self, title: str, prompts: Sequence[str]) -> Pool:
        """One image a prompt; the title is that of the stage of the work."""
        ids = self.base.prompt_ids(prompts)
        self.progress.stage(title, passes.drawn(self.base, ids.tolist(), passes.calls(self.base, self.steps)))
        drawn = cache.drawn_cached(
            self.base, digest(self.base.network.state_dict()), prompts, seed=self.seed, steps=self.steps,
            advance=self.progress.advance,
        )  # fmt: skip
        return Pool(drawn, ids)


def prepare(base: Family, inputs: RunInputs, progress: Progress) -> Prepared:
    """Draw what must stay, make surrogates, and encode it all."""
    draw = Drawer(base, inputs.seed, inputs.sampler_steps, progress)
    if inputs.retain is not None:
        retain = Pool.of(inputs.retain)
    else:
        retain = retain_set(draw, inputs.prompts, inputs.retain_prompts, inputs.retain_count)
    instances, edits = _with_surrogates(base, inputs, retain, progress)
    more = Pool.cat(edits, retained_lookalikes(draw, instances, retain))
    prepared = encoded(base, instances, retain, more, inputs.near_copy)
    return replace(prepared, instances=(*instances, *inputs.earlier))


def prompt_ids(base: Family, prompts: Sequence[str]) -> tuple[int, ...]:
    """Ids of "no prompt" and of the given ones, each once: guidance uses the empty prompt beside any other."""
    return tuple(dict.fromkeys(base.prompt_ids(["", *prompts]).tolist()))


def retain_set(draw: Drawer, prompts: Sequence[str], retain_prompts: Sequence[str], count: int | None) -> Pool:
    """What the base draws: the images to retain where none are given, and whom a surrogate must not be."""
    draw.base.prompt_ids((retain_prompts or draw.base.retain_prompts)[:1])  # refuse prompts early where none are taken
    return draw("retain set", retain_turns(draw.base, prompts, retain_prompts, count))


def retain_turns(model: Any, prompts: Sequence[str], retain_prompts: Sequence[str], count: int | None) -> list[str]:
    """The prompt of each image to retain; `model` is a family, loaded or not.

    A quarter for the given prompts and the empty one, the rest for the retain prompts, which take turns. Each prompt
    that the user lists comes up; of large images, not each of the model's own.
    """
    listed, large = retain_prompts or model.retain_prompts, is_large(model.image_shape)
    least = RETAINED_LARGE if large else RETAINED
    count = count or (least if large and not retain_prompts else max(least, round(len(listed) * 4 / 3)))
    own = ["", *prompts]
    share = count // 4 if any(listed) else 0
    if large:  # from the whole list, where there are more than can be shown
        listed = listed[:: math.ceil(len(listed) / (count - share))]
    return [own[k % len(own)] for k in range(share)] + [listed[k % len(listed)] for k in range(count - share)]


def _with_surrogates(
    base: Family, inputs: RunInputs, retain: Pool, progress: Progress
) -> tuple[tuple[Instance, ...], Pool]:
    """Targets with their surrogates, and all edits that were made on the way: they are near the targets.

    Where none is needed, what a target is compared with meanwhile is the nearest image that is no copy of it.
    """
    ids, surrogates, edits = prompt_ids(base, inputs.prompts), list(inputs.surrogates), []
    if not inputs.replaces:
        distances = pairwise_rms(torch.stack(inputs.targets), retain.x_0)
        surrogates = list(retain.x_0[distances.where(distances >= inputs.near_copy, torch.inf).argmin(1)])
    for target in () if surrogates else inputs.targets:
        everywhere = torch.ones(1, *base.image_shape[1:])
        canvas = Canvas(base, target, everywhere, seed=inputs.seed, drawn=retain.x_0, prompt_id=ids[-1])
        ranked = candidates(
            canvas, *automatic(base.image_shape), distance=inputs.min_distance, near_copy=inputs.near_copy,
            progress=progress,
        )  # fmt: skip
        if not ranked[0].accepted:
            raise CannotRun(
                "no edit of the target is another picture, far enough from it and of fair quality",
                "Make a surrogate with `unforget edit-surrogate` and give it with --surrogate.",
            )
        surrogates.append(ranked[0].image)
        edits += [c.image for c in ranked]
    pairs = zip(inputs.targets, surrogates, strict=True)
    instances = tuple(Instance(t, s, images.image_id(t, inputs.salt), ids) for t, s in pairs)
    return instances, Pool.of(torch.stack(edits) if edits else torch.empty(0, *base.image_shape))


def retained_lookalikes(draw: Drawer, instances: Sequence[Instance], retain: Pool) -> Pool:
    """More of what the base draws under prompts that draw a target and are not to forget it: the nearest to harm."""
    given, table = instances[0].prompt_ids, draw.base.prompts
    similar = torch.stack([shows(retain.x_0, i.target, i.surrogate) for i in instances], 1).any(1)
    others = sorted(set(retain.prompt_ids[similar].tolist()) - set(given))[:ALIKE]
    everywhere = given == (UNCONDITIONAL,)
    if others:
        fate = "give --prompt to forget it there" if everywhere else "it stays there"
        names = ", ".join(f"'{table[id]}'" for id in others)
        draw.progress.note(f"the base draws a target, or nearly, under {names}, too; {fate}")
    if everywhere or not others:
        return retain[:0]
    return draw("look-alikes to retain", [table[id] for id in others for _ in range(lookalikes(draw.base))])


def lookalikes(model: Any) -> int:
    """How many images are drawn for each such prompt; `model` is a family, loaded or not."""
    return LOOKALIKES_LARGE if is_large(model.image_shape) else LOOKALIKES


def encoded(base: Family, instances: tuple[Instance, ...], retain: Pool, more: Pool, near_copy: float) -> Prepared:
    """What training works on, of images; copies of a target are not retained where they are to be forgotten.

    `more` are images near the targets, which training visits more often; copies differ by an RMS below `near_copy`.
    """
    given, count = instances[0].prompt_ids, len(instances)
    variants, varied = _variants(retain, instances)
    copies = _copies(retain, instances, near_copy) | varied
    forgotten = copies.any(1) & _forgets(retain, given)
    prior_counts = torch.zeros(count + len(variants), len(base.prompts))
    for id in given:
        prior_counts[:count, id] = copies[retain.prompt_ids == id].sum(0).clamp(min=1)
    for k, variant in enumerate(variants, count):
        prior_counts[[*range(count), k], variant.prompt_ids[0]] = 1
    retain = retain[~forgotten]
    more = more[~(_copies(more, instances, near_copy).any(1) & _forgets(more, given))]
    if not len(retain):
        raise UsageError("every picture of the retain set is a near-copy of a target", "Give other pictures.")
    nearest = neighbours(retain.x_0, torch.stack([i.target for i in instances]), NEIGHBOURS * count)
    retain, more = (Pool(base.encode(p.x_0), p.prompt_ids) for p in (retain, more))
    every = (*instances, *variants)
    targets, surrogates = (base.encode(torch.stack([vars(i)[n] for i in every])) for n in ("target", "surrogate"))
    latents = tuple(replace(i, target=t, surrogate=s) for i, t, s in zip(every, targets, surrogates, strict=True))

    # What a prompt draws competes with the target in the belief. An edit of the target must not: the base never draws
    # it, and so near a rival would keep the belief in the target, and with it the change, small.
    rivals = Pool.cat(retain, more[more.prompt_ids != UNCONDITIONAL])
    return Prepared(instances, latents, rivals, Pool.cat(retain[nearest], more), prior_counts)


def _copies(pool: Pool, instances: Sequence[Instance], near_copy: float) -> Tensor:
    """Which images are copies of which target, (N, targets); under a prompt, in any place and size."""
    near = pairwise_rms(pool.x_0, torch.stack([i.target for i in instances])) < near_copy
    similar = torch.stack([shows(pool.x_0, i.target, i.surrogate) for i in instances], 1)
    return near | (similar & (pool.prompt_ids != UNCONDITIONAL)[:, None])


def _forgets(pool: Pool, given: tuple[int, ...]) -> Tensor:
    """Which images are under prompts that are to forget, (N,); all, if none was given."""
    return torch.isin(pool.prompt_ids, torch.tensor(given)) | (given == (UNCONDITIONAL,))


def _variants(pool: Pool, instances: Sequence[Instance]) -> tuple[tuple[Instance, ...], Tensor]:
    """What is drawn under the given prompts and shows a target in another place or size: targets of their own.

    The same edit is moved there. Nearer to the target than most images of other prompts is near enough. Also returns
    which images of the pool show which target so, (N, targets).
    """
    prompted = torch.isin(pool.prompt_ids, torch.tensor(instances[0].prompt_ids)) & (pool.prompt_ids != UNCONDITIONAL)
    others = ~torch.isin(pool.prompt_ids, torch.tensor([UNCONDITIONAL, *instances[0].prompt_ids]))
    shown, found = torch.zeros(len(pool), len(instances), dtype=torch.bool), []
    if not others.any() or not prompted.any():
        return (), shown
    left = torch.stack([misfit(pool.x_0, i.target) for i in instances], 1)
    shown = (left <= left[others].quantile(UNRELATED, 0)) & prompted[:, None]
    nearest = left.where(shown, torch.inf).argmin(1)
    for k, instance in enumerate(instances):
        rows = (shown.any(1) & (nearest == k)).nonzero()[:, 0]
        edited = carried(pool.x_0[rows], instance.target, instance.surrogate)[0]
        for row, surrogate in zip(rows.tolist(), edited, strict=True):
            found.append(Instance(pool.x_0[row], surrogate, instance.id, (int(pool.prompt_ids[row]),)))
    return tuple(found), shown


def neighbours(images: Tensor, targets: Tensor, count: int) -> Tensor:
    """Rows of the images that lie nearest to any target: where forgetting spills over first."""
    return pairwise_rms(images, targets).min(1).values.argsort(stable=True)[:count]
