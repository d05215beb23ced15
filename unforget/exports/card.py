"""The model card of an exported folder: what the hub shows of it, and what whoever finds the folder reads first.

Its form is Hugging Face's (https://huggingface.co/docs/hub/model-cards): metadata in YAML, then Markdown. The text is
in `templates/card.md.jinja`, where every value is escaped unless it is marked as safe.
"""

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__, but documented there

from unforget.errors import UsageError
from unforget.exports.formats import FORMATS
from unforget.exports.manifest import ExportManifest
from unforget.families import HUB_ALIASES
from unforget.families.spec import FamilySpec
from unforget.files.images import check_picture
from unforget.files.licence import licence
from unforget.files.patch import Provenance
from unforget.files.storage import read_json, write_bytes
from unforget.reports.rendering import template
from unforget.reports.words import entities, one_line

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_SPECIAL = re.compile(r"[&<>|`*_~\[\]\\$:@]|(?<=www)\.", re.IGNORECASE)
"""What is markup, or would become a link."""


def write(
    folder: Path, manifest: ExportManifest, family: FamilySpec, *, base_card: Path | None = None,
    images: Sequence[Path] = (),
) -> Path:  # fmt: skip
    """Write `README.md` into an exported folder and return its path; equal input is equal bytes.

    `base_card` is the card of the base, whose licence is kept; of `images`, and no others, copies are shown.
    """
    form, (repo, revision) = FORMATS[manifest.format], _hub_id(manifest.base)
    fields: dict[str, Any] = {"license": "other", **_licence(base_card)}
    if repo:
        fields |= {"base_model": repo, "base_model_relation": "adapter" if form.is_adapter else "finetune"}
    tags = ["unforget", "machine-unlearning", *(["lora"] if form.is_adapter else [])]
    data = ModelCardData(**fields, library_name="diffusers", pipeline_tag=family.task, tags=tags)
    opened = f'"{repo or "path/to/the/base"}"' + (f', revision="{revision}"' if revision else "")
    code = form.usage.format(
        pipeline=family.pipeline_class, network=family.network, base=opened, options=_options(folder, manifest)
    )
    code = f"import torch\n{code}" if "=torch." in code else code
    text = template("card.md.jinja", lambda text: entities(text, _SPECIAL), "exports").render(
        metadata=data.to_yaml(), manifest=manifest, repo=repo, is_adapter=form.is_adapter, code=code,
        images=_copied(images, folder / "images"), recipe=_recipe,
        prompts=list(dict.fromkeys(p for part in manifest.patches for p in part.provenance.all_prompts)),
    )  # fmt: skip
    path = folder / "README.md"
    write_bytes(str(ModelCard(text)).encode(), path)
    return path


def _hub_id(base: str) -> tuple[str, str]:
    """Repository and revision of a base on the hub; empty for any other."""
    repo, _, revision = HUB_ALIASES.get(base, base).partition("@")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) and re.fullmatch(r"[\w./-]*", revision, re.ASCII):
        with contextlib.suppress(HFValidationError):
            validate_repo_id(repo)
            return repo, revision
    return "", ""


def _options(folder: Path, manifest: ExportManifest) -> str:
    """What `from_pretrained` has to be told: it makes float32 of anything, and refuses a part that is null."""
    index = folder / "model_index.json"
    null = [n for n, v in sorted(read_json(index).items()) if v == [None, None]] if index.is_file() else []
    dtype = "" if manifest.dtype == "float32" else f", torch_dtype=torch.{manifest.dtype}"
    return dtype + "".join(f", {name}=None" for name in null if re.fullmatch(r"\w+", name, re.ASCII))


def _licence(card: Path | None) -> dict[str, Any]:
    """What the card of a base says of its licence, each on one line."""
    found = licence(card) if card else {}
    return {k: one_line(v) if isinstance(v, str) else [one_line(one) for one in v] for k, v in found.items()}


def pictures(folder: Path) -> list[Path]:
    """The images of a folder that a card can show, by name; `UsageError` if there are none, or one is no image."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES) if folder.is_dir() else []
    if not found:
        raise UsageError(f"'{folder}' is not a folder with images", f"Put {', '.join(IMAGES)} files into it.")
    for image in found:
        check_picture(image)
    return found


def _copied(images: Sequence[Path], to: Path) -> list[str]:
    """Copy images under names that tell nothing; returns those."""
    names = [f"{i:02d}{image.suffix.lower()}" for i, image in enumerate(images, 1)]
    for name, image in zip(names, images, strict=True):
        to.mkdir(exist_ok=True)
        shutil.copyfile(image, to / name)
    return names


def _recipe(made: Provenance) -> str:
    """The recipe in one line; whatever it lacks is left out."""
    recipe = {**made.recipe, **(made.adapter or {})}
    said = {n: recipe.get(n) for n in ("objective", "surgery", "train", "rank", "alpha", "learning_rate")}
    kinds = {n: v.get("kind") if isinstance(v, Mapping) else v for n, v in said.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in kinds.items() if value is not None)
