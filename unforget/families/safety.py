"""A model folder is looked at before any library opens it: classes, names, keys, sizes and numbers that no model has.

What a folder says decides what is read, what runs and how much memory is taken, and it may come from anywhere. So every
part must be of a class that the family has, no configuration may ask for code or name another place, and every tensor
that a configuration asks for must be in its file with that shape. This is found out on torch's meta device, where
tensors take no memory, and given up once more is built than a file holds. Libraries then open a `view` of what was
looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as registrations

from unforget.errors import CannotRun, UsageError
from unforget.families.encoders import PROJECTION, matched, tensors_of
from unforget.families.parts import EXTRAS, PEFT_CONFIG, STEMS, WORDS, Classes, Part, classes, listed, opened
from unforget.families.spec import Setting, is_inside
from unforget.families.words import LARGEST, check_words
from unforget.files.storage import BadFile, Lazy, open_tensors, read_json

if TYPE_CHECKING:
    from unforget.families.spec import FamilySpec

MOST = 2**20  # largest whole number in a configuration; vocabularies have a tenth of it
FEW = {
    "num_layers": 512, "num_hidden_layers": 512, "layers_per_block": 64, "pos_embed_max_size": 1024, "extra_ids": 1024,
}  # fmt: skip
"""Numbers whose cost is more than their own size."""
UNLIMITED = ("model_max_length", "rope_theta", "theta", "max_pixels", "min_pixels", "longest_edge", "shortest_edge")
"""Numbers that nothing is made of; libraries write 1e30 where there is no limit."""
SIDE = 8192  # largest `sample_size`
SPARE = 1.05  # how many numbers a transformer may ask for, as a share of those in a single file
PIECES = 50_000  # most modules, parameters and buffers of a part; a large transformer has a tenth of them
TABLES = 2**24  # most numbers in tables that are computed, where the weights are no more
CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate", "trust_remote_code")
"""Keys that diffusers or transformers run a folder's or the hub's code for."""
PLACES = (
    "base_model_name_or_path", "transformers_weights", "fast_tokenizer_files", "init_inputs", "gguf_file",
    "audio_tokenizer", "audio_tokenizer_name_or_path",
)  # fmt: skip
"""Keys by which they open something else than the files that are looked at here."""
KERNELS = ("attn_implementation", "experts_implementation")
"""Ends of keys that may name a repository with compiled code."""
QUANTISED = "Give it in float32, bfloat16 or float16: load it with its library, `dequantize()` it and save it again."
SCALES = (
    "scale_weight", "weight_scale", "scale_input", "input_scale", "absmax", "quant_map", "SCB", "qweight", "qzeros",
)  # fmt: skip
"""Ends of names of tensors beside weights that are not what they say without them."""


def check(
    folder: Path, spec: FamilySpec, allow_pickle: bool, given: Collection[str] = (), *, described: bool = False
) -> None:
    """Refuse a diffusers folder, nested or flat, that is not what it says; parts that are `given` are not read.

    Pickled weights, where allowed, are left to torch's restricted unpickler. Where a folder is only `described`, its
    weights are not here yet.
    """
    with sound(folder):
        allowed = classes(spec)
        for part in listed(folder, allowed):
            for name, value in check_tables(part).items():
                if part.loaded and (said := value.get("_class_name", part.class_name)) not in allowed[part.name]:
                    raise BadFile(f"'{part.name}/{name}' is of a '{str(said)[:40]}'")
            if part.loaded and part.kind == "model" and part.name not in given:
                made = _described(part) if described else _check_weights(part, allow_pickle)
                if part.name == spec.network:
                    check_driven(spec, made, str(folder))


def check_editor(folder: Path, allowed: Classes) -> None:
    """Refuse a folder of any pipeline whose parts may have those classes."""
    with sound(folder):
        for part in listed(folder, allowed):
            check_tables(part)
            if part.loaded and part.kind == "model":
                _check_weights(part, False)


def check_single(file: Path, spec: FamilySpec, config: Path, encoders: Collection[Path] = ()) -> None:
    """Refuse a single file, a diffusers folder for it whose configuration asks for more than the file holds, or files
    of text encoders."""
    try:
        tensors = open_tensors(file).tensors
        parts = {part.name: part for part in listed(config, classes(spec))}
        tables = {name: check_tables(part) for name, part in parts.items()}
        if missing := {spec.network, spec.autoencoder, *spec.text_encoders} - {"", *spec.optional, *parts}:
            raise BadFile(f"'{config}' describes no {min(missing)}")
        made = {
            n: _made(parts[n], t["config.json"], PIECES)
            for n, t in tables.items()
            if "config.json" in t and n not in EXTRAS
        }
        beside = [n for n in spec.text_encoders if n in made and not is_inside(spec, n, tensors)]
        given = matched(encoders, {n: made[n].config for n in beside})
        for name in made.keys() - {spec.network}:
            if name in given:
                # A square projection may be left out: it is the identity then.
                named = made[name].named_parameters()
                identity = {n: Lazy.of(t) for n, t in named if n == PROJECTION and t.shape[0] == t.shape[1]}
                _check_fits(parts[name], made[name], identity | tensors_of(given[name]))
            elif not is_inside(spec, name, tensors):
                found = opened(parts[name].home, STEMS[parts[name].library])
                if found is not None:
                    _check_fits(parts[name], made[name], found.tensors)
        network = made[spec.network]
    except (BadFile, OSError, KeyError) as error:
        reason = error if isinstance(error, BadFile) else f"'{config}' is no diffusers folder"
        hint = "Get it again, or give another --pipeline-config."
        raise UsageError(f"'{file}' cannot be opened: {reason}", hint) from None
    wanted = sum(p.numel() for p in network.parameters())
    held = sum(math.prod(t.shape) for t in tensors.values())
    if wanted > SPARE * held:
        sentence = f"'{config}' asks for {wanted:,} numbers, '{file}' holds {held:,}"
        raise CannotRun(sentence, "Give the model's --pipeline-config.")
    check_driven(spec, network, str(file))


@contextmanager
def sound(folder: Path) -> Iterator[None]:
    """Say of a folder what was found in one of its files."""
    try:
        yield
    except BadFile as error:
        raise UsageError(f"the model in '{folder}' is no sound one: {error}", "Get it again from its source.") from None
    except OSError as error:
        raise CannotRun(f"cannot read the model in '{folder}': {error.strerror}", "Check its files.") from None


def check_tables(part: Part) -> dict[str, Any]:
    """The configurations of a part by their files' names, without what asks for code, quantised weights, an adapter or
    another place; BadFile or CannotRun for those."""
    if (part.home / PEFT_CONFIG).is_file():
        hint = "Fuse it into its model (`merge_and_unload`, `fuse_lora`) and save that, or give the model it is for."
        raise CannotRun(f"'{part.name}' is an adapter (adapter_config.json), not a model", hint)
    files, found = part.files(), {}
    for file in files:
        where = f"{part.name}/{file.name}"
        if file.name not in WORDS:
            found[file.name] = table = read_json(file)
            if not isinstance(table, dict):
                raise BadFile(f"{where} is not a table")
            _check_value(table, where)
        elif file.stat().st_size > LARGEST:
            raise BadFile(f"'{where}' has more than {LARGEST} bytes")
        elif file.name == "tokenizer.json":
            check_words(file, where)
    if part.kind == "tokenizer" and not files:
        raise CannotRun(f"'{part.home}' holds no tokenizer", "Get the model again.")
    return found


def _check_value(value: Any, where: str, key: str = "", depth: int = 0) -> None:
    """Refuse what no configuration holds, before anything is made from it."""
    if depth > 16:
        raise BadFile(f"{where} is nested too deeply")
    if value and key in CODE:
        raise BadFile(f"{where} asks for code of its own ({key})")
    if value and key in PLACES:
        raise BadFile(f"{where} names another place ({key})")
    if key.endswith(KERNELS) and not isinstance(value, bool) and value not in (None, "eager", "sdpa"):
        raise BadFile(f"{where} asks for code from elsewhere ({key})")
    if value and key == "quantization_config":
        method = value.get("quant_method", "") if isinstance(value, dict) else ""
        raise CannotRun(f"{where} describes quantised weights {str(method)[:24]}".rstrip(), QUANTISED)
    if isinstance(value, Mapping):
        for inner, item in value.items():
            _check_value(item, where, str(inner), depth + 1)
    elif isinstance(value, list):
        if len(value) > 4096:
            raise BadFile(f"{where} has a list of {len(value)} entries")
        for item in value:
            _check_value(item, where, key, depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool) and key not in UNLIMITED:
        most = FEW.get(key, SIDE if key == "sample_size" else MOST)
        least = 1 if (key in FEW and key != "extra_ids") or key.endswith(("_dim", "_size", "_channels")) else -MOST
        if not least <= value <= most:
            raise BadFile(f"{where} says {key} = {str(value)[:24]}")


def _config(part: Part) -> Any:
    if not (part.home / "config.json").is_file():
        raise CannotRun(f"'{part.home}' has no config.json", "Get the model again.")
    return read_json(part.home / "config.json")


def _described(part: Part) -> Any:
    """A part without content, where nobody knows what its file holds."""
    made = _made(part, _config(part), PIECES)
    _check_tables(part, made, sum(p.numel() for p in made.parameters()))
    return made


def _check_weights(part: Part, allow_pickle: bool) -> Any:
    """Compare what a part's configuration asks for with what its file holds; returns it without content."""
    config = _config(part)
    found = opened(part.home, STEMS[part.library])
    if found is not None:
        made = _made(part, config, min(PIECES, 8 * len(found.tensors) + 1024))
        _check_fits(part, made, found.tensors)
        return made
    if not any(part.home.glob("*.bin")):
        hint = f"Expected {STEMS[part.library]}.safetensors in it."
        raise CannotRun(f"'{part.home}' holds no weights", hint)
    if not allow_pickle:
        hint = "Convert them to safetensors, or say --allow-pickle if you trust where they come from."
        raise UsageError(f"'{part.home}' holds pickled weights only, which can run code when opened", hint)
    return _made(part, config, PIECES)


def _check_fits(part: Part, made: Any, tensors: Mapping[str, Lazy]) -> None:
    """Every tensor of a part is in its file, as what it stands for, and computed tables take no more than they."""
    check_scales(tensors, f"'{part.name}'")
    there = {_named(n, part.library): t for n, t in tensors.items()}
    stored = set(made.state_dict())
    own = [*made.named_parameters(), *((n, t) for n, t in made.named_buffers() if n in stored)]  # each tensor once
    tied: Any = getattr(made, "_tied_weights_keys", None) or {}  # transformers 5.0 ties them after the meta device
    for name, tensor in own:
        known = [n for n in (name, dict(tied).get(name, name)) if _named(n, part.library) in there]
        wanted, lazy = tuple(tensor.shape), there[_named(known[0], part.library)] if known else None
        if lazy is None:
            raise CannotRun(f"'{part.name}' lacks '{_named(name, part.library)}'", "Get the model again.")
        if lazy.shape != wanted and not (len(lazy.shape) == len(wanted) + 2 and lazy.shape[:-2] == wanted):
            raise CannotRun(f"'{part.name}' has '{name}' as {lazy.shape}, wanted {wanted}", "Get the model again.")
        if tensor.is_floating_point() and (lazy.dtype.itemsize == 1 or not lazy.dtype.is_floating_point):
            raise CannotRun(f"'{part.name}' has '{name}' as {str(lazy.dtype)[6:]}, which is quantised", QUANTISED)
    _check_tables(part, made, sum(math.prod(t.shape) for t in tensors.values()))


def _check_tables(part: Part, made: Any, held: int) -> None:
    """BadFile where what is computed takes more than the weights do, which are `held` numbers."""
    stored = set(made.state_dict())
    computed = sum(t.numel() for n, t in made.named_buffers() if n not in stored)
    if computed > max(TABLES, held):
        raise BadFile(f"the configuration of '{part.name}' asks for tables of {computed:,} numbers")


def check_scales(tensors: Collection[str], name: str) -> None:
    """CannotRun for weights that come with scales, which stock loaders leave out in silence."""
    if any(n.endswith(SCALES) or "scaled_fp8" in n or "quant_state" in n for n in tensors):
        raise CannotRun(f"{name} holds scaled or quantised weights (such as scaled fp8)", QUANTISED)


OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""Names of attention in files older than diffusers 0.15, which it translates; 1 x 1 convolutions then."""


def _named(name: str, library: str) -> str:
    """A tensor's name, whichever version of a library wrote it."""
    if library == "transformers":
        return name.replace("text_model.", "")
    for old, new in OLD.items():
        name = name.replace(old, new)
    return name


def _made(part: Part, config: Any, most: int) -> Any:
    """A part without content, as a configuration describes it; CannotRun once it has more than `most` pieces."""
    library, class_name = part.library, part.class_name
    try:
        kind = getattr(import_module(library), class_name)
        with _at_most(most, part.name), torch.device("meta"):
            return kind.from_config(config) if library == "diffusers" else kind(kind.config_class.from_dict(config))
    except CannotRun:
        raise
    except Exception as error:  # whatever a library makes of a configuration that is none
        raise BadFile(f"the configuration describes no {class_name}: {reason(error)[:120]}") from None


@contextmanager
def _at_most(most: int, name: str) -> Iterator[None]:
    """Give up building modules when there are too many, whatever asked for them."""
    count = 0

    def seen(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CannotRun(f"the configuration of '{name}' asks for more than its file holds", "Get the model again.")

    kinds: tuple[Callable[..., Any], ...] = (
        registrations.register_module_module_registration_hook,
        registrations.register_module_parameter_registration_hook,
        registrations.register_module_buffer_registration_hook,
    )
    hooks = [register(seen) for register in kinds]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_driven(spec: FamilySpec, network: Any, name: str) -> None:
    """UsageError for a network that the family cannot ask as it does, found by asking it on the meta device."""
    from unforget.families.memory import FusedAttention

    hint = f"Give a {spec.title} that draws pictures from noise alone."
    try:
        why, config = spec.unfit(network.config), network.config
        if not why:
            channels, size = spec.latent(config)
            shapes = (channels, *((size, size) if isinstance(size, int) else size)), *spec.conditioning_shapes(config)
            x_t, *told = (torch.empty(2, *s, device="meta") for s in shapes)
            with torch.no_grad(), FusedAttention():
                answer = spec.call(network, x_t, torch.zeros(2, device="meta"), told, Setting((64, 64), spec.guidance))
            if answer.shape != x_t.shape:
                why = f"answers {tuple(answer.shape[1:])} at {tuple(x_t.shape[1:])}"
    except Exception as error:  # whatever a network of another kind misses
        raise UsageError(f"'{name}' cannot be asked as a {spec.title}: {reason(error)[:200]}", hint) from None
    if why:
        raise UsageError(f"'{name}' {why}", hint)


def reason(error: BaseException) -> str:
    """The first line of what a library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
