"""Make a diffusion model stop producing one image, and collect the evidence.

The commands of the `unforget` tool as functions: `edit_surrogate`, `unlearn`, `verify`, `export`, each with its
configuration, and `show`. A path is a `str` or a `Path`. What goes wrong is an `UnforgetError`: `UsageError` is about
what was asked or given, `CannotRun` about what the model or the machine cannot do. They are imported when first asked
for, so that `import unforget` costs nothing.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unforget.api import edit_surrogate, export, show, unlearn, verify
    from unforget.cli.progress import ConsoleProgress
    from unforget.config import EditConfig, ExportConfig, UnlearnConfig, VerifyConfig
    from unforget.core.objectives import BaseObjective
    from unforget.core.recipe import Recipe
    from unforget.errors import CannotRun, UnforgetError, UsageError

__version__ = "0.1.0"
__all__ = [
    "BaseObjective",
    "CannotRun",
    "ConsoleProgress",
    "EditConfig",
    "ExportConfig",
    "Recipe",
    "UnforgetError",
    "UnlearnConfig",
    "UsageError",
    "VerifyConfig",
    "edit_surrogate",
    "export",
    "show",
    "unlearn",
    "verify",
]

for _name in (
    "ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK",
    "DIFFUSERS_DISABLE_REMOTE_CODE", "DISABLE_SAFETENSORS_CONVERSION",
):  # fmt: skip
    os.environ.setdefault(_name, "1")  # read once, when the libraries are imported
os.environ.setdefault("USE_HUB_KERNELS", "NO")

_HOME = {
    **dict.fromkeys(("edit_surrogate", "unlearn", "verify", "export", "show"), "api"),
    **dict.fromkeys(("EditConfig", "UnlearnConfig", "ExportConfig", "VerifyConfig"), "config"),
    "BaseObjective": "core.objectives",
    "ConsoleProgress": "cli.progress",
    "Recipe": "core.recipe",
    **dict.fromkeys(("UnforgetError", "UsageError", "CannotRun"), "errors"),
}


def __dir__() -> list[str]:
    return sorted((*__all__, "__version__"))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unforget' has no attribute '{name}'")
    return getattr(import_module(f"unforget.{_HOME[name]}"), name)
