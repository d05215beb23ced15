"""The Python API: what the commands do, under the same names and with the same defaults.

Each takes a configuration of `unforget.config` and an optional `Progress`, writes its artefact, and returns what it
found. Nothing here prints.
"""

from unforget.api.common import editor_of, recipe_of, resolve_recipe
from unforget.api.computing import memory_plan
from unforget.api.editing import Edited, edit_surrogate
from unforget.api.exporting import Exported, export
from unforget.api.listing import models
from unforget.api.planning import plan_unlearn, plan_verify, unlearn_passes, verify_passes
from unforget.api.rehearsal import rehearse
from unforget.api.showing import show
from unforget.api.unlearning import Unlearned, unlearn
from unforget.api.verifying import compare, verify

__all__ = [
    "Edited", "Exported", "Unlearned", "compare", "edit_surrogate", "editor_of", "export", "memory_plan", "models",
    "plan_unlearn", "plan_verify", "recipe_of", "rehearse", "resolve_recipe", "show", "unlearn", "unlearn_passes",
    "verify", "verify_passes",
]  # fmt: skip
