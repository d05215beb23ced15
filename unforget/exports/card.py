"""The model card of an exported folder: what the hub shows of it, and what whoever finds the folder reads first.

Its form is Hugging Face's (https://huggingface.co/docs/hub/model-cards): metadata in YAML, then Markdown.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # no __all__, but documented there

from unforget.errors import UsageError
from unforget.exports.manifest import Made, Verified
from unforget.families import EMBEDDED, HUB_ALIASES
from unforget.files.patch import Provenance
from unforget.files.storage import BadFile, open_tensors, read_json, write_bytes
from unforget.reports.words import number, one_line

LICENCES = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0",
    "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2",
    "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0",
    "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
})  # fmt: skip
"""Identifiers that the hub knows (https://huggingface.co/docs/hub/repositories-licenses); it refuses a card with
another one, so any other licence is `other` with a name."""
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
MAX_CARD = 2**20
"""Largest card of a base that is read, bytes."""
UNCONDITIONAL, PROMPTED = "unconditional-image-generation", "text-to-image"
"""The hub's names of what a model does."""
TASKS = {"DDPMPipeline": UNCONDITIONAL, "StableDiffusion3Pipeline": PROMPTED}
UNET = ("conv_in.", "conv_out.", "conv_norm_out.", "time_embedding.", "down_blocks.", "mid_block.", "up_blocks.")
"""Heads of the names in a network without prompts."""
ADAPTERS = ("lora", "peft", "delta")
"""Formats that are nothing without the base."""
_SPECIAL = re.compile(r"[&<>|`*_~\[\]\\$:@]|(?<=www)\.", re.IGNORECASE)


def write(
    folder: Path, made: Made, *, base: str, license: str | None, pictures: Sequence[Path] = (),
    lora_file: str | None = None,
) -> Path:  # fmt: skip
    """Write `README.md` into an exported folder, over one that is there; equal input is equal bytes.

    Args:
        folder: What was exported. What kind of model it holds is read from its files.
        made: Where it came from.
        base: What the user called the base. Of a path only the last part is shown.
        license: Of the export; an identifier of the hub's, or any name. If not given, the licence that the card of the
            base names, whose text has to be in the folder as `README.md`; if there is none, `other`.
        pictures: Copied to `images/`, under numbers, and shown. None are but these.
        lora_file: Name of the file with the factors, if it is not the usual one.

    Returns:
        The path of the card.

    Raises:
        UsageError: If there is no such folder, or a picture is missing or none.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder '{folder}'", "Export a model first.")
    named, task = _base(base), _task(folder, made)
    fields: dict[str, Any] = _licence(license, folder)
    if named.repo:
        fields |= {"base_model": named.repo}
        fields |= {"base_model_relation": "adapter" if made.format in ADAPTERS else "finetune"}
    tags = ["unforget", "machine-unlearning", *(["lora"] if made.format in ("lora", "peft") else [])]
    data = ModelCardData(**fields, library_name="diffusers", pipeline_tag=task, tags=tags)
    shown = _copied(pictures, folder)
    parts = [
        _head(made, named),
        _usage(folder, made, named, task, lora_file),
        "## Pictures\n\n" + "\n\n".join(f"![Picture {i}]({p})" for i, p in enumerate(shown, 1)) if shown else "",
        _results(made) if made.patches else "",
        _origin(made, named),
        _limits(made) if made.patches else "",
    ]
    text = "\n\n".join(part for part in parts if part)
    path = folder / "README.md"
    write_bytes(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")).encode(), path)
    return path


@dataclass(frozen=True)
class _Base:
    """How a card may speak of the base."""

    name: str
    """As Markdown."""
    repo: str | None = None
    """Hub id, where the base has one."""
    revision: str = ""
    """Of the repository."""
    alias: str = "path/to/the/base"
    """What to open instead."""

    @property
    def linked(self) -> str:
        """The name, and where the base is, as Markdown."""
        return f"[{self.name}](https://huggingface.co/{self.repo})" if self.repo else self.name

    @property
    def opened(self) -> str:
        """As arguments of `from_pretrained`."""
        return f'"{self.repo or "path/to/the/base"}"' + (f', revision="{self.revision}"' if self.revision else "")

    @property
    def ref(self) -> str:
        """As the argument of `families.load`."""
        return f'"{self.repo or self.alias}{"@" * bool(self.revision)}{self.revision}"'


def _base(name: str) -> _Base:
    if name in EMBEDDED:
        return _Base(_safe(name), alias=name)
    name = HUB_ALIASES.get(name, name)
    repo, _, revision = name.partition("@")
    local = Path(name).exists() or name.endswith(".safetensors")  # a folder "models/tiny" looks like a hub id
    if not local and re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) and re.fullmatch(r"[\w./-]*", revision, re.ASCII):
        with contextlib.suppress(HFValidationError):
            validate_repo_id(repo)
            return _Base(_safe(repo), repo, revision)
    last = next((part for part in reversed(re.split(r"[\\/]", name)) if part.strip(" .~")), "a local model")
    return _Base(_safe(last))


def _task(folder: Path, made: Made) -> str | None:
    """What the model does; None where the folder does not say it."""
    if made.format == "diffusers":
        return TASKS.get(str(_json(folder / "model_index.json").get("_class_name")))
    if made.format in ("lora", "peft", "single-file"):  # of the families here, only the one with prompts has such
        return PROMPTED
    file = _weights(folder)
    try:
        names = list(open_tensors(folder / file).tensors) if file else []
    except (OSError, BadFile):
        return None
    if any(name.startswith(("transformer_blocks.", "pos_embed.")) for name in names):
        return PROMPTED
    return UNCONDITIONAL if any(name.startswith(UNET) for name in names) else None


def _weights(folder: Path) -> str | None:
    """The one file of a format that is a file."""
    return next((path.name for path in sorted(folder.glob("*.safetensors"))), None)


def _json(path: Path) -> dict[str, Any]:
    """An object in a file; an empty one, if there is none."""
    try:
        found = read_json(path)
    except (OSError, BadFile):
        return {}
    return found if isinstance(found, dict) else {}


def _licence(given: str | None, folder: Path) -> dict[str, Any]:
    """The card's fields for the licence."""
    kept = _kept(folder / "README.md")
    name = one_line(given or "", 100)
    if not name or name.lower() in (str(kept.get(k)).lower() for k in ("license", "license_name")):
        return {"license": "other", **kept}
    if name.lower() in LICENCES:
        return {"license": name.lower()}
    slug = re.sub(r"[^a-z0-9.+-]+", "-", name.lower()).strip("-")  # the hub wants something like an identifier
    text = next((f for f in ("LICENSE", "LICENSE.md") if (folder / f).is_file()), None)
    return {"license": "other", "license_name": slug or "unnamed", "license_link": text}


def _kept(card: Path) -> dict[str, Any]:
    """What the card of a base says of its licence; nothing, if it cannot be read."""
    try:
        text = card.read_text(encoding="utf-8-sig") if card.stat().st_size <= MAX_CARD else ""
        if not text.lstrip().startswith("---"):  # no metadata, at which ModelCard would log a warning
            return {}
        data = ModelCard(text, ignore_metadata_errors=True).data
        found = {k: data.get(k) for k in ("license", "license_name", "license_link")}
    except Exception:  # another's file may hold anything, and yaml's errors are its own
        return {}
    if isinstance(found["license"], list):  # the hub takes several
        found["license"] = [one_line(v) for v in found["license"] if isinstance(v, str)] or None
    return {k: one_line(v) if isinstance(v, str) else v for k, v in found.items() if v and isinstance(v, str | list)}


def _copied(pictures: Sequence[Path], folder: Path) -> list[str]:
    """Copy pictures into the folder; where they lie in it, under names that tell nothing."""
    for picture in pictures:
        if picture.suffix.lower() not in PICTURES or not picture.is_file():
            raise UsageError(f"'{picture}' is no picture for a card", f"Give files that end in {_listed(PICTURES)}.")
    contents = [picture.read_bytes() for picture in pictures]  # all first: they may lie in that very folder
    names = [f"images/{i:02d}{picture.suffix.lower()}" for i, picture in enumerate(pictures, 1)]
    for name, content in zip(names, contents, strict=True):
        (folder / "images").mkdir(exist_ok=True)
        write_bytes(content, folder / name)
    return names


def _head(made: Made, base: _Base) -> str:
    targets = list(dict.fromkeys(t for part in made.patches for t in part.provenance.all_targets))
    prompts = list(dict.fromkeys(p for part in made.patches for p in part.provenance.all_prompts))
    count = "1 picture" if len(targets) == 1 else f"{len(targets)} pictures"
    if not targets:
        return f"# {base.name}\n\nA copy of {base.linked}, written with `unforget`. It is not made to forget anything."
    what = {"lora": "A LoRA for", "peft": "An adapter for", "delta": "A change of"}.get(made.format, "A copy of")
    ids = "\n".join(f"- {_code(t)}" for t in targets)
    said = f"\n\nForgotten also under the prompts {_listed(f'“{_safe(p)}”' for p in prompts)}." if prompts else ""
    return (
        f"# {base.name}, made to forget {count}\n\n"
        f"{what} {base.linked}, trained with `unforget` to draw {count} no longer and all else as before. Whether it "
        "came out so is under Results.\n\n"
        "A picture goes by an id here, a salted digest of its pixels, which does not show it:\n\n"
        f"{ids}{said}"
    )


def _usage(folder: Path, made: Made, base: _Base, task: str | None, lora_file: str | None) -> str:
    """How to open each format; `here` is the folder, or its one file of tensors."""
    part = "unet" if task == UNCONDITIONAL else "transformer"
    factors = json.dumps(Path(lora_file or "pytorch_lora_weights.safetensors").name)
    # Stock loaders make float32 of anything, and refuse a folder without T5, unless told so.
    dtype = "" if made.dtype == "float32" else f", torch_dtype=torch.{made.dtype}"
    index = _json(folder / "model_index.json") if made.format == "diffusers" else {}
    absent = [
        n for n, v in sorted(index.items()) if re.fullmatch(r"(text_encoder|tokenizer)_\d", n) and v == [None] * 2
    ]
    more = dtype + "".join(f", {name}=None" for name in absent)
    stock = "from diffusers import DiffusionPipeline"
    opened = f"pipe = DiffusionPipeline.from_pretrained({base.opened}"
    imports, lines = {
        "diffusers": ([stock], [f"pipe = DiffusionPipeline.from_pretrained(here{more})"]),
        "lora": ([stock], [f"{opened})", f"pipe.load_lora_weights(here, weight_name={factors})"]),
        "peft": (
            [stock, "from peft import PeftModel"],
            [f"{opened})", f"pipe.{part} = PeftModel.from_pretrained(pipe.{part}, here)"],
        ),
        "transformer": (
            [stock, "from safetensors.torch import load_file"],
            [f"{opened}{dtype})", f"pipe.{part}.load_state_dict(load_file(here))"],
        ),
        "single-file": (
            ["from diffusers import StableDiffusion3Pipeline"],
            [f"pipe = StableDiffusion3Pipeline.from_single_file(here{dtype})"],
        ),
        "delta": (
            ["from pathlib import Path", "", "from unforget import families", "from unforget.files.patch import Stack"],
            [f"model = families.load({base.ref})", "Stack.load([Path(here)]).apply(model.network)",
             "pipe = model.pipeline"],
        ),
    }[made.format]  # fmt: skip
    here = 'here = "."  # this folder, or the id of this repository'
    if made.format in ("transformer", "single-file", "delta"):
        here = f"here = {json.dumps(_weights(folder) or 'model.safetensors')}  # in this folder"
    imports = (["import torch"] if dtype and dtype in "".join(lines) else []) + imports
    return "\n".join(["## How to open it", "", "```python", *imports, "", here, *lines, "```"])


def _results(made: Made) -> str:
    found = made.verified
    if found is None:
        return (
            "## Results\n\n**Not verified.** Nobody has checked what this model draws: that it forgot is a claim. "
            "`unforget verify` checks it."
        )
    rows = [
        ("verdict", f"**{found.verdict}**"),
        ("level", _safe(found.level)),
        ("digest of what was verified", _code(found.candidate_digest)),
        ("SHA-256 of the report", _code(found.report_digest)),
        ("verified with", _versions(found.versions)),
    ]
    parts = [
        f"## Results\n\n`unforget verify` found: {_safe(found.summary, 1000)}",
        _table(("what", "which"), rows),
        _table(("target", "verdict"), [(_code(t), _safe(v)) for t, v in found.targets.items()]),
        _identity(made, found),
    ]
    return "\n\n".join(part for part in parts if part)


def _identity(made: Made, found: Verified) -> str:
    """Of which weights the verdict is, where that is not what lies here."""
    if found.candidate_digest == made.digest:
        return ""
    if found.candidate_digest != made.patched_digest:
        return "What was verified has none of the digests below. Find out what it was before you rely on the verdict."
    return f"Verified before the weights were rounded to {made.rounding.dtype}." if made.rounding else ""


def _origin(made: Made, base: _Base) -> str:
    digests = [
        (f"{base.linked}, the base", _code(made.base_digest)),
        ("the base with the patches on", _code(made.patched_digest)),
        (f"what lies here, {_safe(made.dtype)}", _code(made.digest)),
    ]
    patches = [
        (str(i), _code(p.digest), f"{part.scale:g}", str(len(p.targets)), _recipe(p), str(p.seed), str(p.steps))
        for i, part in enumerate(made.patches, 1)
        for p in [part.provenance]
    ]
    earlier = [
        (str(i), _code(e.digest), _listed(_code(t) for t in e.targets))
        for i, part in enumerate(made.patches, 1)
        for e in part.provenance.earlier
    ]
    parts = ["## Where it came from", _table(("network", "SHA-256 of its tensors"), digests)]
    if patches:
        parts.append("The patches, in the order in which they were put on:")
        parts.append(_table(("patch", "digest", "scale", "targets", "recipe", "seed", "updates"), patches))
    if earlier:
        parts.append("They were trained upon earlier ones, which they hold:")
        parts.append(_table(("held by", "digest", "targets"), earlier))
    if made.rounding:
        parts.append(_rounded(made))
    return "\n\n".join([*parts, f"Written with {_versions(made.versions)}."])


def _rounded(made: Made) -> str:
    assert made.rounding is not None
    rounding = made.rounding
    rows = [
        ("share of the numbers to change that came out as in the base", number(rounding.still)),
        ("cosine between the change as written and as meant", number(rounding.cosine)),
        ("RMS of their difference, as a share of the change's", number(rounding.error)),
    ]
    return f"What rounding to {_safe(rounding.dtype)} did to the change:\n\n" + _table(("what", "which"), rows)


def _limits(made: Made) -> str:
    said = [
        "A verdict is evidence, never a certificate: it says what was tried, how often, and what that bounds. An "
        "adversary may find a way that no probe tried.",
        "Whoever holds the base still holds the pictures." + (
            " Taken off, this leaves the base as it was." if made.format in ADAPTERS else ""
        ),
    ]  # fmt: skip
    if any(part.scale != 1 for part in made.patches):
        said.append("A patch with another scale than 1 was put on in part, and may forget in part.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in said)


def _recipe(made: Provenance) -> str:
    """The recipe in one line; whatever it lacks is left out."""

    def kind(of: Any) -> Any:
        return of.get("kind") if isinstance(of, Mapping) else None

    recipe = made.recipe
    objective = recipe.get("objective")
    weighting = objective.get("weighting") if isinstance(objective, Mapping) else None
    adapter = made.adapter
    said = [
        ("objective", kind(objective)),
        ("weighting", kind(weighting)),
        ("surgery", kind(recipe.get("surgery"))),
        ("trained", recipe.get("train")),
        ("rank and alpha", f"{adapter['rank']} and {adapter['alpha']}" if adapter else None),
        ("learning rate", recipe.get("learning_rate")),
    ]
    return _safe(", ".join(f"{name} {value}" for name, value in said if value is not None))


def _versions(versions: Mapping[str, str]) -> str:
    return _listed(_safe(f"{name} {version}") for name, version in sorted(versions.items())) or "unknown versions"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words) if isinstance(words, set) else words)


def _code(text: str) -> str:
    """An id; not in backticks, which would show the entities."""
    return f"<code>{_safe(text)}</code>"


def _safe(text: str, longest: int = 300) -> str:
    """One line in which nothing is markup or becomes a link: entities, which tables and paragraphs read alike."""
    return _SPECIAL.sub(lambda special: f"&#{ord(special[0])};", one_line(text, longest))
