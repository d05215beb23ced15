"""`export`: base plus patches in a form that stock loaders open, written a tensor at a time and opened again."""

from dataclasses import dataclass
from pathlib import Path

import torch

from unforget import families
from unforget.api.common import holding_outputs, options, versions
from unforget.config import ExportConfig, run_folder
from unforget.core.types import Progress
from unforget.errors import CannotRun
from unforget.exports import card, hub, placement
from unforget.exports.exporter import ExportRequest, write_export
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


def _exported(config: ExportConfig, progress: Progress) -> Exported:
    inputs = [Path(config.model), *config.patch, *filter(None, [config.report])]
    placement.check_replaceable(config.output, inputs)
    images = [] if config.card_images is None else card.pictures(config.card_images)
    if config.threads:
        torch.set_num_threads(config.threads)
    request = ExportRequest(
        config.model, options(config, progress=progress), Stack.load(config.patch, config.scale), config.format,
        config.dtype, config.max_shard_size, config.seed, config.force_rounding,
        Verified.of(config.report) if config.report else None, run_folder(config.patch[-1]) / "verify.json",
        versions(),
    )  # fmt: skip
    try:
        with placement.atomic_export(config.output) as out:
            manifest, row = write_export(request, out, progress)
            if config.card and FORMATS[config.format].is_folder:
                home = families.home(config.model)
                card.write(out, manifest, row, base_card=home and home / "README.md", images=images)
    except BadFile as error:
        raise CannotRun(f"cannot read the model '{config.model}': {error}", "Get the model again.") from None
    if config.push_to_hub is None:
        return Exported(config.output, manifest)
    message = f"{manifest.base}, {len(manifest.patches)} patch(es), by unforget {manifest.versions['unforget']}"
    url = hub.push(config.output, config.push_to_hub, private=config.private, message=message)
    return Exported(config.output, manifest, url)
