"""What a pipeline's folder may hold: its parts, the classes that each may have, and the files that it is read from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unforget.errors import CannotRun
from unforget.families.spec import FamilySpec, tokenizer
from unforget.files.storage import BadFile, Opened, open_tensors, read_json

PLAIN = re.compile(r"[A-Za-z0-9_]+(?:[.-][A-Za-z0-9_]+)*")
"""File names and names of parts: nothing that leads elsewhere."""
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""Names of weights, by where a part's class comes from; another name would be a module of the folder's own."""
PICKLED = {"diffusers": "diffusion_pytorch_model", "transformers": "pytorch_model"}
INDEX = "model_index.json"
HINTS = "unforget.json"
"""File in which a folder says of itself what stock pipelines have no place for."""
LORA, PEFT, PEFT_CONFIG = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter, where diffusers or kohya, or PEFT wrote it."""
TOKENIZERS = {
    "CLIP": ("CLIPTokenizer", "CLIPTokenizerFast"), "T5": ("T5Tokenizer", "T5TokenizerFast"),
    "Qwen": ("Qwen2Tokenizer", "Qwen2TokenizerFast"), "Gemma": ("GemmaTokenizer", "GemmaTokenizerFast"),
}  # fmt: skip
"""By what the name of a text encoder's class begins with."""
ANY = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""What transformers calls a tokenizer that is one file; which name it writes is its version's."""
EXTRAS = {
    "safety_checker": ("StableDiffusionSafetyChecker",),
    "feature_extractor": (
        "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor",
        "SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil",
    ),
    "image_encoder": ("CLIPVisionModelWithProjection", "SiglipVisionModel"),
}  # fmt: skip
"""Parts that are never loaded; a copy of the folder has them, too."""
WORDS = (
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
    "tokenizer.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""A tokenizer's files of content, which names nothing but words."""
_TOKENIZER = (*WORDS, "tokenizer_config.json", "special_tokens_map.json")
FILES = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": _TOKENIZER,
    "processor": (
        *_TOKENIZER, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "chat_template.json",
    ),
    "model": ("config.json",),
}  # fmt: skip
"""All that a library reads of a part besides its weights, by its kind."""
LFS = b"version https://git-lfs.github.com/spec/"

Classes = Mapping[str, tuple[str, ...]]
"""The classes that each part may have."""


@dataclass(frozen=True)
class Part:
    """One that a folder's index lists, of a class that it may have."""

    name: str
    library: str
    class_name: str
    folder: Path
    """The pipeline's."""

    @property
    def home(self) -> Path:
        """Where its files lie: old DDPM repositories are flat, and diffusers takes a part without a folder for such."""
        flat = not (self.folder / self.name).is_dir() and (self.folder / "config.json").is_file()
        return self.folder if flat else self.folder / self.name

    @property
    def loaded(self) -> bool:
        """Whether a library is ever asked for it."""
        return self.name not in EXTRAS

    @property
    def kind(self) -> str:
        """Key of `FILES`."""
        words = {"Scheduler": "scheduler", "Tokenizer": "tokenizer", "Processor": "processor", "Extractor": "processor"}
        fast = "tokenizer" if self.class_name in ANY else "model"
        return next((kind for word, kind in words.items() if word in self.class_name), fast)

    def files(self) -> list[Path]:
        """Those of its files, besides weights, that a library may read; BadFile for a link out of the model.

        The hub's cache consists of links, and people link weights and whole parts: those are followed.
        """
        found = [self.home / name for name in FILES[self.kind] if (self.home / name).is_file()]
        for file in found:
            if not is_own(file, self.folder, self.home):
                raise BadFile(f"'{self.name}/{file.name}' is a link that leads out of the folder")
            check_pointer(file)
        return found

    def weights(self, *, pickled: bool = False) -> dict[str, Path]:
        """The files that hold its weights, by the names under which its library reads them first; none if it has none.

        Raises:
            BadFile: If there are several variants and no plain one, or a shard's name leads elsewhere.
            CannotRun: If a shard is missing.
        """
        library = "transformers" if self.library not in STEMS else self.library
        stem, suffix = (PICKLED[library], "bin") if pickled else (STEMS[library], "safetensors")
        if self.kind != "model" or (file := stored(self.home, stem, suffix)) is None:
            return {}
        if file.suffix != ".json":
            return {f"{stem}.{suffix}": file}
        return {f"{stem}.{suffix}.index.json": file, **{s: self.home / s for s in shards(file)}}


def classes(spec: FamilySpec) -> dict[str, tuple[str, ...]]:
    """The classes that the parts of a family may have."""
    import diffusers

    found = {spec.network: (spec.network_class, *spec.network_also)}
    found["scheduler"] = (spec.sampler, *spec.schedulers, *getattr(diffusers, spec.sampler)._compatibles)
    if spec.autoencoder:
        found[spec.autoencoder] = spec.autoencoders
    for name, encoder in spec.text_encoders.items():
        reads = next(names for begin, names in TOKENIZERS.items() if encoder.startswith(begin))
        found |= {name: (encoder,), tokenizer(name): (*reads, *ANY)}
    return found


def listed(folder: Path, allowed: Classes) -> list[Part]:
    """The parts in a folder's index that are not null; BadFile for one that is unknown or of a class of its own."""
    index, found = read_json(folder / INDEX), []
    if not isinstance(index, dict):
        raise BadFile(f"{INDEX} is not a table")
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        if not PLAIN.fullmatch(name) or len(value) != 2:
            raise BadFile(f"{INDEX} describes '{name[:40]}' wrongly")
        library, class_name = value
        if library is None or class_name is None:
            continue
        known = {**EXTRAS, **allowed}.get(name)
        if library not in (*STEMS, *(["stable_diffusion"] if name in EXTRAS else [])) or (
            known and class_name not in known
        ):
            raise BadFile(
                f"'{name}' is to be made by '{library}.{class_name}', which is code of its own or no such part"
            )
        if known is None:
            raise BadFile(f"{INDEX} lists '{name[:40]}', which is no part of such a model")
        found.append(Part(name, library, class_name, folder))
    return found


def is_own(file: Path, *folders: Path) -> bool:
    """Whether a file lies in one of the folders, wherever its links lead, or beside them in the hub's cache."""
    roots = [folder.resolve() for folder in folders]
    roots += [root.parents[1] / "blobs" for root in roots if root.parent.name == "snapshots"]
    return file.is_file() and any(file.resolve().is_relative_to(root) for root in roots)


def stored(home: Path, stem: str, suffix: str = "safetensors") -> Path | None:
    """The one file of weights, or index of shards, that is read: the plain one, or that of the only variant.

    Of both, diffusers reads the index, and transformers the file. BadFile if there are only variants, and several.
    """
    name = re.compile(rf"{stem}(?:\.(?P<file>\w+))?\.{suffix}|{stem}\.{suffix}\.index(?:\.(?P<index>\w+))?\.json")
    found: dict[str, dict[bool, Path]] = {}
    for file in sorted(home.iterdir()) if home.is_dir() else ():
        if (match := name.fullmatch(file.name)) and file.is_file():
            found.setdefault(match["file"] or match["index"] or "", {})[file.suffix == ".json"] = file
    if not found:
        return None
    if "" not in found and len(found) > 1:
        raise BadFile(f"'{home.name}' holds weights in the variants {', '.join(found)}: keep one of them")
    one, first = found.get("") or next(iter(found.values())), stem == STEMS["diffusers"]
    return one[first] if first in one else one[not first]


def shards(index: Path) -> list[str]:
    """The files that an index of weights names; BadFile if one leads elsewhere, CannotRun if one is missing."""
    check_pointer(index)
    found = sorted(set(_weight_map(index).values()))
    for shard in found:
        if not PLAIN.fullmatch(shard):
            raise BadFile(f"'{index.name}' names the file '{shard[:40]}'")
        if not (index.parent / shard).is_file():
            raise CannotRun(f"'{index.parent}' misses the shard {shard}", "Download the model again.")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(name): str(shard) for name, shard in dict(read_json(index, most=2**24)["weight_map"]).items()}
    except (KeyError, TypeError, ValueError):
        raise BadFile(f"'{index.name}' names no shards") from None


def opened(home: Path, stem: str) -> Opened | None:
    """The safetensors of a part, from its file or shards; None if there are no such.

    BadFile if they are not what they say, CannotRun if a shard is missing.
    """
    file = stored(home, stem)
    if file is None:
        return None
    check_pointer(file)
    if file.suffix != ".json":
        return open_tensors(file)
    files = [home / shard for shard in shards(file)]
    for shard in files:
        check_pointer(shard)
    found = [open_tensors(shard) for shard in files]
    tensors = {name: lazy for one in found for name, lazy in one.tensors.items()}
    if set(tensors) != set(_weight_map(file)):
        raise BadFile(f"'{file.name}' and its shards disagree")
    return Opened(found[0].metadata if found else {}, tensors)


def check_pointer(file: Path) -> None:
    """CannotRun for what git leaves where a large file was not fetched."""
    with file.open("rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise CannotRun(
                f"'{file.name}' is a git-lfs pointer, not the file itself", "Run `git lfs pull` in its folder."
            )
