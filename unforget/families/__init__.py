"""Model families, and how a reference on the command line becomes a loaded one.

A new family is one file here, with its row `SPEC`, and its name in `ROWS`.
"""

from importlib import import_module

from unforget.families.beside import parts_apart
from unforget.families.loading import Hints, Options, asking, editor, examined, hints, home, load, spec_of
from unforget.families.memory import trim_memory
from unforget.families.spec import FamilySpec, check_scope, is_guided

ROWS = ("ddpm", "ldm", "sd", "sdxl", "sd3", "flux", "flux2", "z_image", "sana", "dit", "pixart")
FAMILIES: tuple[FamilySpec, ...] = tuple(import_module(f"{__name__}.{name}").SPEC for name in ROWS)
EMBEDDED = ("faces", "flags")
"""Models inside the package: no download."""
HUB_ALIASES = {alias: repo for spec in FAMILIES for alias, repo in spec.aliases.items()}

__all__ = [
    "FAMILIES", "EMBEDDED", "HUB_ALIASES", "FamilySpec", "Options", "Hints", "load", "spec_of", "examined", "home",
    "hints", "editor", "asking", "parts_apart", "check_scope", "is_guided", "trim_memory",
]  # fmt: skip
