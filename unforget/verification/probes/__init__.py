"""Probes, one class a file; a new one is a file named after its kind, and its line in `KINDS`. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING

from unforget.errors import UsageError

if TYPE_CHECKING:
    from unforget.config import VerifyConfig
    from unforget.verification.probes.base import Probe

LEVELS = ("quick", "standard", "deep")
KINDS: tuple[str, ...] = (
    "reconstruct",
    "sample",
    "must_retain",
    "replay",
    "retention",
    "neighbours",
    "partial_denoise",
    "transforms",
    "paraphrase",
    "quantization",
    "noise_search",
    "relearning",
)
"""Every probe, in the order they run."""


def load() -> tuple[type[Probe], ...]:
    """The classes of `KINDS`: `noise_search` is `NoiseSearch` in noise_search.py."""
    modules = {kind: import_module(f"{__name__}.{kind}") for kind in KINDS}
    return tuple(getattr(module, kind.title().replace("_", "")) for kind, module in modules.items())


def chosen(level: str, require: Collection[str] = ()) -> tuple[str, ...]:
    """Kinds of the probes that run at a level, and of those that are required, in order.

    Raises:
        UsageError: If a required probe is not known.
    """
    for kind in require:
        if kind not in KINDS:
            raise UsageError(f"there is no probe '{kind}'", f"Give one of {', '.join(KINDS)}.")
    up_to = LEVELS[: LEVELS.index(level) + 1]
    return tuple(probe.kind for probe in load() if probe.level in up_to or probe.kind in require)


def suite(config: VerifyConfig, *, prompted: bool) -> tuple[Probe, ...]:
    """The probes of a configuration; `prompted` says whether the targets have prompts of their own.

    Raises:
        UsageError: If a required probe has nothing to work on.
    """
    kinds = chosen(config.level, config.require)
    made = {cls.kind: cls.from_policy(config, prompted) for cls in load() if cls.kind in kinds}
    for cls in load():
        if cls.kind in config.require and made[cls.kind] is None:
            raise UsageError(f"the policy requires the probe {cls.kind}, which needs {cls.needs}", f"Give {cls.needs}.")
    return tuple(probe for probe in made.values() if probe is not None)
