"""What a model has beside its network, against its base: the network alone is what a patch changes."""

import json
from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 2**-8
"""A weight may differ by so much of itself: it was rounded to bfloat16, by which no other is meant."""
TINY = 2**-24
"""And by so much: the smallest that float16 knows."""
ANSWERS = 0.02
"""And what an encoder makes of a prompt by so much of its size, for the same reason."""
NO_MATTER = ("transformers_version", "dtype", "torch_dtype", "architectures", "tokenizer_class")
"""Keys of configurations that change nothing that is drawn."""


def parts_apart(base: Any, other: Any) -> dict[str, float]:
    """How far each part of another model is from the base's: 0 up to rounding, 1 where it is of another kind.

    Of weights the largest difference, as a share of the weight; of a tokenizer whether it holds the same words; of the
    prompts that both have read, the largest difference of what they were made into, as a share of its size.
    """
    names = dict.fromkeys((*base.pipeline.components, *other.pipeline.components))
    pairs = {n: [getattr(m.pipeline, n, None) for m in (base, other)] for n in names if n != base.spec.network}
    found = {name: 0.0 if one is two else _apart(one, two) for name, (one, two) in pairs.items()}
    mine, theirs = base.answers(), other.answers()
    read = [_relative(a, b) for p in mine.keys() & theirs.keys() for a, b in zip(mine[p], theirs[p], strict=True)]
    return {**found, "prompts": worst if (worst := max(read, default=0.0)) > ANSWERS else 0.0}


def _apart(one: Any, other: Any) -> float:
    if None in (one, other) or _kind(one) != _kind(other):
        return 1.0
    return _weights(one, other) if isinstance(one, nn.Module) else 0.0


def _kind(part: Any) -> str:
    """What a part is beside its weights, as text: all that may matter of its configuration, or a tokenizer's words."""
    if hasattr(part, "get_vocab"):
        words = getattr(part, "backend_tokenizer", None)
        known = json.loads(words.to_str()) if words else part.get_vocab()
        return json.dumps({k: v for k, v in known.items() if k not in ("truncation", "padding")}, sort_keys=True)
    known = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    told = {k: v for k, v in known.items() if k[0] != "_" and k not in NO_MATTER}
    return type(part).__name__ + json.dumps(told, sort_keys=True, default=str)


@torch.no_grad()
def _weights(one: nn.Module, other: nn.Module) -> float:
    """Largest difference of two weights, as a share of the first, 1 at most; 0 where all are within rounding."""
    mine, theirs = one.state_dict(), other.state_dict()
    if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in theirs.items()}:
        return 1.0
    worst = 0.0
    for name, tensor in mine.items():
        a, b = tensor.float().cpu(), theirs[name].float().cpu()
        beyond = (a - b).abs() > ROUNDING * a.abs() + TINY
        if not bool((a == b).all()) and bool((beyond | b.isnan()).any()):
            worst = max(worst, float(((a - b).abs() / a.abs().clamp(min=TINY)).nan_to_num(1.0).clamp(max=1.0).max()))
    return worst


def _relative(a: Tensor, b: Tensor) -> float:
    """RMS of a difference as a share of the first's, 1 at most and for other shapes."""
    if a.shape != b.shape:
        return 1.0
    size = a.float().square().mean().sqrt().clamp(min=1e-12)
    return min(1.0, float((a.float() - b.float()).square().mean().sqrt() / size))
