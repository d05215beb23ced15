"""The Python API: what the commands do, under the same names and with the same defaults.

Each takes a configuration of `unforget.config` and an optional `Progress`, writes its artefact, and returns what it
found. Nothing here prints.
"""

from unforget.api.editing import Edited, edit_surrogate
from unforget.api.exporting import Exported, export
from unforget.api.unlearning import EXIT_UNLEARN, Unlearned, memory_plan, recipe_of, unlearn
from unforget.api.verifying import compare, verify

__all__ = [
    "EXIT_UNLEARN", "Edited", "Exported", "Unlearned", "compare", "edit_surrogate", "export", "memory_plan",
    "recipe_of", "unlearn", "verify",
]  # fmt: skip
