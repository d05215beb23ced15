"""`--dry-run`: whether a command would run, on what, and what it would cost; nothing is drawn, trained or written."""

from typing import Any, cast

from unforget.api.common import editor_of, holding_outputs, options, recipe_of
from unforget.api.editing import read_canvas
from unforget.api.exporting import plan_export
from unforget.api.planning import plan_edit, plan_unlearn, plan_verify
from unforget.api.unlearning import read_inputs
from unforget.api.verifying import check_backends, check_candidate, read_instances
from unforget.config import EditConfig, ExportConfig, RecipeOptions, UnlearnConfig, VerifyConfig
from unforget.core import devices
from unforget.core.types import Family, Progress
from unforget.families.memory import blueprint
from unforget.files.patch import Stack, provenance
from unforget.unlearning.run_directory import check_start

GIB = 2**30


def rehearse(config: EditConfig | UnlearnConfig | VerifyConfig | ExportConfig) -> dict[str, Any]:
    """The settings, the device and whether its memory is enough (of an export: the disk), and the plan, as JSON.

    Pictures, patches, packages and outputs are checked as in the run, with the same errors.
    """
    if isinstance(config, ExportConfig):
        notes: list[str] = []
        with holding_outputs(config):
            plan = plan_export(config, Progress(note=notes.append))
        return {**config.model_dump(mode="json"), **plan, "would_run": True, "notes": notes}
    with holding_outputs(config):
        said: dict[str, Any] = {}
        if isinstance(config, EditConfig):
            read_canvas(config, _outline(config), editor_of(config), Progress())
            plan = plan_edit(config)
        elif isinstance(config, UnlearnConfig):
            check_start(config.folder, resume=config.resume, force=config.force)
            said = {"recipe": recipe_of(config).model_dump(mode="json")}
            stack = Stack.load(config.patch, config.scale)
            read_inputs(config, _outline(config), stack, "", Progress())
            plan = plan_unlearn(config)
        else:
            made = [provenance(path) for path in config.patch]
            check_candidate(config)
            check_backends(config)
            read_instances(config, _outline(config), "", made, Progress())
            plan = plan_verify(config)
    device = options(config).device
    room, peak = devices.room(device)[0], plan["memory_gib"]["peak"]
    settings = config.model_dump(mode="json", exclude=set(RecipeOptions.model_fields))
    return {
        **settings, **said, "would_run": not room or peak * GIB <= room, "computes_on": devices.spoken(device),
        "free_gib": round(room / GIB, 1) if room else None, **plan,
    }  # fmt: skip


def _outline(config: EditConfig | UnlearnConfig | VerifyConfig) -> Family:
    """A model that is not loaded, which knows the shape of its images and its prompts."""
    return cast(Family, blueprint(config.model, options(config)))
