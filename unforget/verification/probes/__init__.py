"""Probes, one class a file; a new one is a file named after its kind, and its name in `KINDS`. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING

from unforget.errors import UsageError

if TYPE_CHECKING:
    from unforget.config import VerifyConfig
    from unforget.verification.probes.base import Probe

QUICK = ("parts", "reconstruct", "sample", "replaced", "must_retain", "replay", "retention", "neighbours")
STANDARD = (*QUICK, "partial_denoise", "transforms", "paraphrase", "quantization", "resemblance")
KINDS: tuple[str, ...] = (*STANDARD, "noise_search", "prompt_search", "relearning")
LEVELS: dict[str, tuple[str, ...]] = {"quick": QUICK, "standard": STANDARD, "deep": KINDS}
"""The probes of each level, in the order they run."""


def load() -> tuple[type[Probe], ...]:
    """The classes of `KINDS`: `noise_search` is `NoiseSearch` in noise_search.py."""
    modules = {kind: import_module(f"{__name__}.{kind}") for kind in KINDS}
    return tuple(getattr(module, kind.title().replace("_", "")) for kind, module in modules.items())


def chosen(level: str, require: Collection[str] = ()) -> tuple[str, ...]:
    """Kinds of the probes that run at a level, and of those that are required, in order; `UsageError` if unknown."""
    for kind in require:
        if kind not in KINDS:
            raise UsageError(f"there is no probe '{kind}'", f"Give one of {', '.join(KINDS)}.")
    return tuple(kind for kind in KINDS if kind in LEVELS[level] or kind in require)


def suite(config: VerifyConfig, *, prompted: bool) -> tuple[Probe, ...]:
    """The probes of a configuration, for targets with or without prompts.

    Raises:
        UsageError: If a required probe has nothing to work on.
    """
    kinds = chosen(config.level, config.require)
    made = {cls: cls.from_policy(config, prompted) for cls in load() if cls.kind in kinds}
    for cls, probe in made.items():
        if probe is None and cls.kind in config.require:
            raise UsageError(f"the policy requires the probe {cls.kind}, which needs {cls.needs}", f"Give {cls.needs}.")
    return tuple(probe for probe in made.values() if probe is not None)
