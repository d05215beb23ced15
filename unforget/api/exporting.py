"""`export`: base plus patches in a form that stock loaders open, written a tensor at a time and opened again."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from unforget import families
from unforget.api.common import holding_outputs, options, versions
from unforget.config import ExportConfig, run_folder
from unforget.core.types import Progress
from unforget.errors import CannotRun
from unforget.exports import card, hub, placement
from unforget.exports.exporter import ExportRequest, ready, write_export
from unforget.exports.formats import FORMATS
from unforget.exports.manifest import ExportManifest, Verified
from unforget.files.patch import Stack
from unforget.files.storage import BadFile


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and what that says of itself."""

    output: Path
    manifest: ExportManifest
    url: str | None = None
    """Where it was uploaded to."""


def export(config: ExportConfig, progress: Progress | None = None) -> Exported:
    """Write base plus patches and open it again by the stock loader: same weights, same image.

    UsageError if what is asked for does not go together, or a file is not what it should be; CannotRun if the base is
    another one, rounding loses the change, or the export does not read back.
    """
    with holding_outputs(config):
        return _exported(config, progress or Progress())


def _request(config: ExportConfig, progress: Progress) -> ExportRequest:
    """What is to be exported, its inputs read; UsageError for a place whose content would be lost."""
    inputs = [Path(config.model), *config.patch, *filter(None, [config.report])]
    placement.check_replaceable(config.output, inputs)
    if config.push_to_hub is not None:
        hub.check(config.push_to_hub)
    if config.threads:
        torch.set_num_threads(config.threads)
    return ExportRequest(
        config.model, options(config, progress=progress), Stack.load(config.patch, config.scale), config.format,
        config.dtype, config.max_shard_size, config.seed, config.force_rounding,
        Verified.of(config.report) if config.report else None, run_folder(config.patch[-1]) / "verify.json",
        versions(),
    )  # fmt: skip


def _images(config: ExportConfig) -> list[Path]:
    """The pictures of the card; UsageError if one cannot be shown."""
    return [] if config.card_images is None else card.pictures(config.card_images)


@contextmanager
def _reading(config: ExportConfig) -> Iterator[None]:
    try:
        yield
    except BadFile as error:
        raise CannotRun(f"cannot read the model '{config.model}': {error}", "Get the model again.") from None


def plan_export(config: ExportConfig, progress: Progress) -> dict[str, Any]:
    """What an export would write and the room for it, as JSON: the export itself, up to where it writes.

    Errors are those of `export`; CannotRun if the base would have to be downloaded.
    """
    if not _lies_here(config.model):
        hint = "`unforget export` gets them, and says the same before it writes."
        raise CannotRun(f"the weights of '{config.model}' are not here to be compared with the patches", hint)
    request, _ = _request(config, progress), _images(config)
    with _reading(config), placement.scratch(config.output) as out:
        made = ready(request, out, progress)
        told = made.manifest.model_dump(mode="json", include={"rounding", "verified", "base_digest", "patched_digest"})
        free = shutil.disk_usage(out.parent).free
        return {**told, "dtype": made.manifest.dtype, "bytes": made.bytes, "free_bytes": free}


def _lies_here(model: str) -> bool:
    """Whether the weights are on this disk, and not on the hub alone."""
    try:
        home = families.home(model)
    except LocalEntryNotFoundError:
        return False
    return home is None or any(path.suffix in (".safetensors", ".bin") for path in home.rglob("*"))


def _exported(config: ExportConfig, progress: Progress) -> Exported:
    request, images = _request(config, progress), _images(config)
    with _reading(config), placement.atomic_export(config.output) as out:
        manifest, row = write_export(request, out, progress)
        if config.card and FORMATS[config.format].is_folder:
            home = families.home(config.model)
            card.write(out, manifest, row, base_card=home and home / "README.md", images=images)
    if config.push_to_hub is None:
        return Exported(config.output, manifest)
    message = f"{manifest.base}, {len(manifest.patches)} patch(es), by unforget {manifest.versions['unforget']}"
    url = hub.push(config.output, config.push_to_hub, private=config.private, message=message)
    return Exported(config.output, manifest, url)
