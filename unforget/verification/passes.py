"""What `verify` costs: network passes of each probe, and the memory of what is kept, before anything is drawn."""

from collections.abc import Sequence

import torch

from unforget.core.passes import Count
from unforget.verification.context import Drawn, VerifyContext
from unforget.verification.near_copies import EmbeddedImages
from unforget.verification.probes.base import Probe

CALIBRATING = "calibrating draws"


def passes(suite: Sequence[Probe], context: VerifyContext) -> dict[str, Count]:
    """Network passes of the calibrating draws, and of each probe besides what those before it have drawn.

    The least is when the base draws the target every time and the candidate never. What the cache holds is counted.
    """
    policy, floors = context.policy, set[tuple[float, int]]()
    drawn: dict[Drawn, Count] = {("base", context.retain_prompt_ids): Count.of(policy.paired)}
    plan = {CALIBRATING: Count.of(context.passes(context.retain_turns(policy.paired).tolist()))}
    for probe in suite:
        total = probe.cost(context)
        for key, count in probe.shared(context):
            before = drawn.get(key, Count())
            drawn[key] = before | count
            total += Count(*(context.drawn_passes(key, *ends) for ends in _ends(before, drawn[key])))
        for timestep, prompt_id in set(probe.floors(context)) - floors:
            total += context.repeated([(context.instances[0], prompt_id)], _controls(context), [timestep])
            floors.add((timestep, prompt_id))
        plan[probe.kind] = total
    return plan


def _ends(before: Count, after: Count) -> tuple[tuple[int, int], tuple[int, int]]:
    return (before.least, after.least), (before.most, after.most)


def _controls(context: VerifyContext) -> int:
    """Images of a floor; fewer, if the base repeats most of what it draws."""
    return min(context.policy.controls, context.policy.paired)


def kept_bytes(suite: Sequence[Probe], context: VerifyContext) -> int:
    """Bytes of the draws that are kept at least: what they are compared by, and those of the base that are whole."""
    drawn: dict[Drawn, int] = {("base", context.retain_prompt_ids): context.policy.paired}
    for key, count in (shared for probe in suite for shared in probe.shared(context)):
        drawn[key] = max(drawn.get(key, 0), count.least)
    one = torch.zeros(1, *context.base.image_shape)
    kept = EmbeddedImages.of(context.backends, one).tensors
    return sum(drawn.values()) * sum(t.nbytes for t in kept) + context.policy.paired * one.numel()
