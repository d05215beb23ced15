"""The stock pipeline of a family from a folder, the hub or a single file, with what it has of text encoders."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers.schedulers import KarrasDiffusionSchedulers

from unforget.errors import CannotRun, UsageError
from unforget.families import chat, encoders
from unforget.families.loading import Options, at, described
from unforget.families.parts import ANY, EXTRAS, TOKENIZERS, classes
from unforget.families.safety import check, check_editor, check_single
from unforget.families.spec import FamilySpec, is_inside, tokenizer
from unforget.families.view import view
from unforget.files.storage import open_tensors

EDITORS = "Give an instruction editor: FLUX.2-klein, FLUX.1-Kontext, Qwen-Image-Edit or InstructPix2Pix."
SMALL = 500_000_000
"""Weights up to which a network is computed in float32."""


def stock(spec: FamilySpec, source: str, options: Options) -> Any:
    """The loaded pipeline; parts that the row leaves out, and a network that was given, are not loaded."""
    parts = {**spec.passed, **({} if options.network is None else {spec.network: options.network})}
    opener = _from_single_file if Path(source).is_file() else _from_pretrained
    pipeline = opener(spec, source, options, parts)
    for name in spec.text_encoders:
        words, encoder = getattr(pipeline, tokenizer(name)), getattr(pipeline, name)
        most = getattr(getattr(encoder, "config", None), "max_position_embeddings", None)
        if words is not None and most and words.model_max_length > most:
            words.model_max_length = most  # it was saved without a limit
        chat.bound(words, tokenizer(name))
    if hasattr(pipeline, "tokenizer_max_length"):
        pipeline.tokenizer_max_length = pipeline.tokenizer.model_max_length
    return pipeline


def network_class(spec: FamilySpec) -> Any:
    """The class of its network."""
    return getattr(diffusers, spec.network_class)


def network_config(spec: FamilySpec, folder: Path) -> dict[str, Any]:
    """The network's configuration in a folder, or in the root of an old one."""
    flat = not (folder / spec.network).is_dir()
    found: dict[str, Any] = network_class(spec).load_config(folder, subfolder=None if flat else spec.network)
    return found


def dtype_of(spec: FamilySpec, config: Mapping[str, Any]) -> torch.dtype:
    """float32 for a small network, else bfloat16: float16 overflows in training and is slow on CPUs."""
    with init_empty_weights():
        size = sum(p.numel() for p in network_class(spec).from_config(config).parameters())
    return torch.float32 if spec.float32 or size <= SMALL else torch.bfloat16


def _from_pretrained(spec: FamilySpec, source: str, options: Options, parts: dict[str, Any]) -> Any:
    """The pipeline of a folder or hub id, without the optional text encoders where it has none or none is wanted.

    Stock `from_pretrained` refuses a folder without T5 unless told so; every part that is null in its index is.
    """
    kind = getattr(diffusers, spec.pipeline_class)
    folder = Path(source) if Path(source).is_dir() else _downloaded(spec, kind, source, options, parts)
    given = [n for n, part in parts.items() if part is not None]
    with view(folder, kind, classes(spec), pickled=options.allow_pickle, given=given) as seen:
        index = kind.load_config(seen)
        absent = [n for n in spec.text_encoders if index.get(n, [None])[0] is None]
        absent += [] if options.t5 else spec.optional
        absent += [tokenizer(n) for n in spec.text_encoders if n in absent or tokenizer(n) not in index]
        return kind.from_pretrained(
            seen, use_safetensors=None if options.allow_pickle else True, local_files_only=True,
            trust_remote_code=False, **_dtypes(spec, seen, options), **dict.fromkeys((*_extras(kind), *absent)),
            **parts,
        )  # fmt: skip


def _downloaded(spec: FamilySpec, kind: Any, source: str, options: Options, parts: Mapping[str, Any]) -> Path:
    """The hub's folder, looked at as one that lies here."""
    left = {n: None for n in spec.optional if not options.t5}
    safe = None if options.allow_pickle else True
    folder = _snapshot(kind, source, use_safetensors=safe, **dict.fromkeys(_extras(kind)), **left, **parts)
    check(folder, spec, options.allow_pickle, [*left, *parts])
    return folder


def _snapshot(kind: Any, source: str, **how: Any) -> Path:
    """The folder that the hub's cache has of a repository, with what a pipeline's class is made of."""
    repo, revision = at(source)
    return Path(kind.download(repo, revision=revision, **how))


def _extras(kind: Any) -> list[str]:
    """The parts of a pipeline's class that are never loaded."""
    return [name for name in EXTRAS if name in kind._get_signature_keys(kind)[0]]


def _dtypes(spec: FamilySpec, source: Path, options: Options) -> dict[str, Any]:
    """Precision of each part, as stock `from_pretrained` takes it."""
    if spec.float32:
        return {}
    network, rest = options.network_dtype, options.rest_dtype
    if options.network is not None:
        network, rest = None, options.network.dtype
    elif network is None or rest is None:
        # Not beside weights: SD3 computes a table of positions in float64.
        own = dtype_of(spec, network_config(spec, source))
        network, rest = network or own, rest or own
    vae = {spec.autoencoder: getattr(torch, spec.vae_dtype)} if spec.vae_dtype else {}
    return {"dtype": {spec.network: network, "default": rest, **vae}}


def _from_single_file(spec: FamilySpec, path: str, options: Options, parts: dict[str, Any]) -> Any:
    """The pipeline of one checkpoint file; `pipeline_config` is a diffusers folder of that model, or a hub id.

    What the file does not hold, as text encoders in Stability's smallest one of SD3 medium, and the autoencoder, too,
    in one of a network alone, comes from the folder, if it has the weights: stock `from_single_file` looks for text
    encoders there under names that they do not have. It also fails on a file without T5 unless told that there is none.
    """
    kind = getattr(diffusers, spec.pipeline_class)
    with _configured(spec, path, options) as config:
        how = {"config": str(config), "local_files_only": True}
        rest = options.rest_dtype or dtype_of(spec, network_config(spec, config))
        held = open_tensors(Path(path)).tensors
        given = _given(spec, config, [n for n in spec.text_encoders if not is_inside(spec, n, held)], options)
        for name, class_name in {spec.autoencoder: spec.autoencoders[0], **spec.text_encoders}.items():
            inside = is_inside(spec, name, held)
            here = name in given or any((config / name).glob("*.safetensors"))
            if name in spec.optional and not (options.t5 and (inside or here)):
                parts |= dict.fromkeys((name, tokenizer(name)))
            elif not inside:
                if not here:
                    sentence = f"'{path}' holds no {name}, nor does '{options.pipeline_config}'"
                    hint = f"Give a --pipeline-config DIR with the weights of its {name}"
                    more = ", or --text-encoder FILE." if name in spec.text_encoders else "."
                    raise CannotRun(sentence, hint + more)
                library = diffusers if name == spec.autoencoder else transformers
                kind_of = getattr(library, class_name)
                if name in given:
                    parts[name] = encoders.opened(given[name], kind_of, config / name, rest)
                else:
                    how_part = {"dtype": rest, "use_safetensors": True, "local_files_only": True}
                    parts[name] = kind_of.from_pretrained(config / name, **how_part)
        if options.network_dtype not in (None, rest) and spec.network not in parts:
            how_network = {"subfolder": spec.network, "dtype": options.network_dtype, **how}
            parts[spec.network] = network_class(spec).from_single_file(path, **how_network)
        pipeline = kind.from_single_file(path, dtype=rest, **how, **dict.fromkeys(_extras(kind)), **parts)
    for name in spec.text_encoders:
        if (encoder := getattr(pipeline, name)) is not None:
            encoder.eval()  # stock leaves T5 in training: it would drop a tenth of what it reads
    return pipeline


def _given(spec: FamilySpec, config: Path, lacking: Iterable[str], options: Options) -> dict[str, Path]:
    """The files of text encoders that a single file lacks, by part."""
    kinds = {name: getattr(transformers, spec.text_encoders[name]) for name in lacking if (config / name).is_dir()}
    configs = {name: kind.config_class.from_pretrained(config / name) for name, kind in kinds.items()}
    return encoders.matched(options.text_encoder, configs)


@contextmanager
def _configured(spec: FamilySpec, path: str, options: Options) -> Iterator[Path]:
    """What libraries see of the diffusers folder that says what a single file holds."""
    config = options.pipeline_config
    assert config is not None
    if not config.is_dir():
        config = described(str(config))
        check_single(Path(path), spec, config, options.text_encoder)
    with view(config, getattr(diffusers, spec.pipeline_class), classes(spec)) as seen:
        yield seen


def stock_editor(ref: str, name: str) -> Any:
    """A diffusers pipeline that takes a picture and an instruction, from a folder or hub id, by the name of its class.

    UsageError for one that does not; its parts may have the classes that its signature names.
    """
    named = getattr(diffusers, name, None)
    if not (isinstance(named, type) and issubclass(named, diffusers.DiffusionPipeline)):
        raise UsageError(f"'{ref}' is a {name}, which is no pipeline of diffusers", EDITORS)
    kind: Any = named
    if not {"image", "prompt"} <= set(inspect.signature(kind.__call__).parameters):
        raise UsageError(f"'{ref}' is a {name}, which takes no picture and instruction", EDITORS)
    without = dict.fromkeys(_extras(kind))
    folder = Path(ref) if Path(ref).is_dir() else _snapshot(kind, ref, use_safetensors=True, **without)
    allowed = signature(kind)
    check_editor(folder, allowed)
    if "requires_safety_checker" in kind._get_signature_keys(kind)[1]:
        without["requires_safety_checker"] = False
    with view(folder, kind, allowed) as seen:
        pipeline = kind.from_pretrained(
            seen, use_safetensors=True, local_files_only=True, trust_remote_code=False, **without
        )
    for name, part in pipeline.components.items():
        chat.bound(part, name)
    return pipeline


def signature(kind: Any) -> dict[str, tuple[str, ...]]:
    """The classes that the parts of a pipeline's class may have, by its annotations."""
    found = {}
    for name, types in kind._get_signature_types().items():
        names = [getattr(t, "__name__", "") for t in types]
        if "tokenizer" in name:
            names += [*ANY, *(n for reads in TOKENIZERS.values() for n in reads)]
        if "scheduler" in name:
            names += [n for t in types for n in getattr(t, "_compatibles", [])] + [
                s.name for s in KarrasDiffusionSchedulers
            ]
        found[name] = tuple(names)
    return found
