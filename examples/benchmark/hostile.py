"""Damage that knows what a file means: values of another type or size where one stands, parts in one another's places,
names that are taken, pictures of odd kinds, and things in a file's place that are no file. For `fuzz.py`."""

import functools
import io
import json
import os
import random
import socket
import struct
import tomllib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from unforget.files.storage import checksummed, digest, open_tensors, write_tensors

nan, inf = float("nan"), float("inf")
ODD = [
    None, True, False, 0, -1, 1, 3, 2**20, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 5e-324, nan, inf, -inf,
    "", "0", "x" * 70_000, "\0", "\ud800", "\u202e", "../../x", "/etc/passwd", "float16", "{{", "%s", [], {}, [[]],
    [None], ["x"], [1] * 4000, {"": 1}, {"a": {"a": []}}, [-1], [0, 0], [[1, 2], [3]],
]  # fmt: skip
TEMPLATES = [
    "", "{{", "{{ x.y.z }}", "{{ raise_exception('no') }}", "{{ messages.__class__.__mro__ }}",
    "{{ 'x' * 3000000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x", "{{ 'x'.center(2000000000) }}",
    "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "{{ 9 ** 9 ** 9 }}",
    "{% for m in messages %}{{ m.content }} {% endfor %}" * 400, "{{ range(10**9) | list }}", "{{ lipsum(n=99999) }}",
    "{{ '%02000000000d' % 1 }}", "{% include '/etc/passwd' %}", "{{ ('a' * 30 + '!') | wordwrap(1) }}", "\ud800",
]  # fmt: skip
GROWING = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "xxxxxxxx"}] * 12,
}
SLOW = {"Regex": "(.*)*(.*)*(.*)*!"}
TOKENIZERS: list[tuple[str, Any]] = [
    ("normalizer", GROWING), ("normalizer", {"type": "Replace", "pattern": SLOW, "content": ""}),
    ("normalizer", {"type": "Prepend", "prepend": "x" * 900_000}), ("normalizer", {"type": "Precompiled",
     "precompiled_charsmap": "AAAA"}),
    ("pre_tokenizer", {"type": "Split", "pattern": SLOW, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?<=a"}, "behavior": "Removed", "invert": True}),
    ("pre_tokenizer", {"type": "Metaspace", "replacement": "", "prepend_scheme": "never", "split": True}),
    *(("padding", {"strategy": {"Fixed": n}, "direction": "Right", "pad_to_multiple_of": m, "pad_id": 2**31,
    "pad_type_id": 0, "pad_token": "x"})
      for n, m in ((10**5, None), (10**9, None), (2**40, None), (8, 2**30), (8, 0))),
    *(("truncation", {"direction": "Right", "max_length": n, "strategy": "LongestFirst", "stride": s}) for n, s in ((0,
    0), (1, 8), (2, 1))),
    ("post_processor", {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 90_000,
     "pair": [],
                        "special_tokens": {"x": {"id": "x", "ids": [2**31] * 9, "tokens": ["x"] * 9}}}),
    ("post_processor", {"type": "BertProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 0]}),
    ("model", {"type": "BPE", "vocab": {}, "merges": []}), ("model", {"type": "Unigram", "vocab": [["x", -1e308]],
     "unk_id": 7}),
    ("model", {"type": "Unigram", "vocab": [], "unk_id": None}), ("model", {"type": "WordPiece", "vocab": {"x": 0},
     "unk_token": "y",
     "continuing_subword_prefix": "", "max_input_chars_per_word": 0}), ("model", {"type": "WordLevel",
     "vocab": {"x": 2**32 - 1}, "unk_token": "x"}),
    *(("added_tokens", [{"id": i, "content": c, "single_word": False, "lstrip": True, "rstrip": True, "normalized": n,
    "special": s}
                        for i, c, n, s in many])
      for many in ([(2**32 - 1, "a", True, False)], [(5, "", True, True)], [(k, f"t{k}", False,
          True) for k in range(20_000)], [(3, "red", 0, 1)])),
]  # fmt: skip
NAMES = ["silu", "nope", "gelu", "mish"]
ENDS = [0, -1, 1, 1.5, 1e-300, 1e300, nan, "x", None]
KNOWN: dict[str, list[Any]] = {
    "_class_name": [n for n in dir(diffusers) if n.endswith("Scheduler")] + ["UNet2DModel", "AutoModel",
    "AutoencoderKL"],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction", "x", "raw"],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "x"],
    "timestep_spacing": ["leading", "trailing", "linspace", "x"], "final_sigmas_type": ["zero", "sigma_min", "x"],
    "num_train_timesteps": [0, 1, 2, 10, 999, 1001, 2**20], "beta_start": ENDS, "beta_end": ENDS,
    "trained_betas": [[], [0.1], [2] * 10, [0.0] * 1000, [nan] * 1000, [[0.1] * 10] * 10], "steps_offset": [-5, 1000,
    10**6],
    "shift": ENDS, "flow_shift": ENDS, "base_shift": ENDS, "max_shift": [1e4, -1e4, nan], "shift_terminal": [0, 1, 2,
    -1],
    "base_image_seq_len": [4096, 0], "use_dynamic_shifting": [True, False], "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True], "use_beta_sigmas": [True], "use_flow_sigmas": [True], "invert_sigmas": [True],
    "stochastic_sampling": [True], "time_shift_type": ["linear", "x"], "solver_order": [0, 4, 100, -1],
    "algorithm_type": ["dpmsolver", "sde-dpmsolver++", "x"], "solver_type": ["heun", "bh1", "x"],
    "thresholding": [True],
    "rescale_betas_zero_snr": [True], "set_alpha_to_one": [True], "variance_type": ["learned", "x"],
    "clip_sample_range": [0, nan],
    "sample_max_value": [0, nan], "dynamic_thresholding_ratio": [0, 2, -1], "euler_at_final": [True],
    "skip_prk_steps": [False],
    "model_max_length": [0, -1, 1, 2, 1e30, 2**62, "x", 8.5], "padding_side": ["left", "middle"],
    "truncation_side": ["left", "x"],
    **{f"{n}_token": ["nope", "", None, {}, {"content": "z", "__type": "AddedToken"}] for n in ("pad", "eos", "bos",
    "unk")},
    "tokenizer_class": ["BertTokenizer", "AutoTokenizer", "CLIPTokenizer", "T5Tokenizer", "x"],
    "chat_template": TEMPLATES,
    "extra_special_tokens": [["a", "b"], {"a": "b"}, 7], "scaling_factor": ENDS, "shift_factor": ENDS,
    "latents_mean": [[0.0], "x"],
    "act_fn": NAMES, "hidden_act": NAMES, "norm_num_groups": [0, -1, 3, 7], "dtype": ["float64", "float16", "int8",
    "x", "str"],
    "vocab_size": [1, 4, 10**6], "eos_token_id": [-1, 10**6, [1, 2], None, 0], "max_position_embeddings": [1, 2, 7,
    10**6],
    "guidance": [1, 1e308, 0, nan, "x"], "retain_prompts": [[""], ["\0"], ["x " * 40_000], ["a"] * 4000, "x", [1]],
    "sample_size": [1, 2, 3, 7, [16, 8], [16], 8192], "block_out_channels": [[8], [8, 16, 32], [16, 8], []],
    "in_channels": [1, 3, 4, 6, 0], "out_channels": [1, 3, 6], "_diffusers_version": ["99.0", "x", 1],
    "num_layers": [1, 3, 512],
    "tie_word_embeddings": [True, False], "force_upcast": [True], "rope_theta": ENDS, "layer_norm_eps": ENDS,
    "pad_token_id": [-1, 99],
    "axes_lens": [[1, 1, 1], [2**20] * 3], "axes_dims": [[8, 0, 0], [1, 2, 5]], "axes_dims_rope": [[8, 0, 0], [3, 3,
    2]],
}  # fmt: skip
Damage = Callable[[bytes, random.Random, list[bytes]], tuple[str, bytes]]
"""A name and what is left, of the content of a file, a source of chance, and other files of that kind."""


def spots(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any, int]]:
    """Every place in JSON: what holds it, its key there, and how deep it lies."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key, depth
            yield from spots(value[key], depth + 1)


def edit(value: Any, draw: random.Random, others: list[Any]) -> str:
    """Change a table in one place, and say how."""
    found = list(spots(value))
    shallow = [s for s in found if s[2] < 2]
    inside, key, _ = draw.choice(shallow if draw.random() < 0.7 else found)
    known = [k for k in value if k in KNOWN]
    how = draw.choice(("odd", "odd", "known", "known", "known", "delete", "rename", "add", "swap", "graft"))
    if {"normalizer", "pre_tokenizer"} <= set(value) and how == "known":
        key, value[key] = draw.choice(TOKENIZERS)
    elif how == "known" and (known or "_diffusers_version" in value):
        key = draw.choice(known if known and draw.random() < 0.7 else sorted(KNOWN))
        value[key] = draw.choice(KNOWN[key])
    elif how == "delete":
        del inside[key]
    elif how == "rename" and isinstance(inside, dict):
        inside[draw.choice([*KNOWN, "", f"{key} ", str(key).upper()])] = inside.pop(key)
    elif how == "add" and isinstance(inside, dict):
        inside[draw.choice(["x", *KNOWN])] = draw.choice(ODD)
    elif how == "swap":
        other, second, _ = draw.choice(found)
        if other[second] is not inside and inside[key] is not other:
            inside[key], other[second] = json.loads(json.dumps([other[second], inside[key]]))
    elif how == "graft" and (more := list(spots(draw.choice(others or [None])))):
        inside[key] = more[0][0] if draw.random() < 0.3 else draw.choice(more)[0]
    else:
        how, inside[key] = "odd", draw.choice(ODD)
    return f"{how} {str(key)[:20]}"


def table(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """JSON, its checksums put right in most cases, so that what is inside is read."""
    if others and draw.random() < 0.08:
        return "another file", draw.choice(others)
    value, more = json.loads(content), [json.loads(o) for o in others[:20]]
    said = [edit(value, draw, more) for _ in range(draw.choice((1, 1, 1, 2, 4))) if value]
    value = value if said else {draw.choice(list(KNOWN)): draw.choice(ODD)}
    if draw.random() < 0.8:
        value = resealed(value)
    text = json.dumps(value)
    if isinstance(value, dict) and value and draw.random() < 0.08:
        said, text = (
            [*said, "twice"],
            f"{{{json.dumps(draw.choice(list(value)))}: {json.dumps(draw.choice(ODD))}, {text[1:]}",
        )
    return "; ".join(said) or "a key", text.encode()


def resealed(value: Any) -> Any:
    """A table of ours with checksums that fit."""
    if isinstance(value, dict) and isinstance(value.get("made"), dict) and "checksum" in value["made"]:
        value = {**value, "made": checksummed(value["made"])}
    return checksummed(value) if isinstance(value, dict) and "checksum" in value else value


def settings(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """TOML with other values, and keys of other commands."""
    from unforget import config

    value, said = tomllib.loads(content.decode()), []
    inside = value.get("verify", value.get("tool", {}).get("unforget", {}).get("verify", value))
    kinds = (config.UnlearnConfig, config.VerifyConfig, config.ExportConfig, config.EditConfig)
    names = sorted(
        {n for k in kinds for n in k.model_fields} - {"output", "report", "junit", "html", "summary", "save_images"}
    )
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice([*inside, *names, "x", "verify", "tool"])
        odd = draw.choice(
            [o for o in ODD if o is not None] + ["target.png", 0.9, ["target.png"], [250, 400], 16, "quick"]
        )
        (inside if draw.random() < 0.9 else value)[name] = odd
        said.append(f"{name} = {str(odd)[:20]}")
    return "; ".join(said), "\n".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()).encode(
        "utf-8", "surrogatepass"
    )


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value if v is not None) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value)


def lines(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """Text: merges, prompts, logs, cards, templates."""
    rows, k = content.decode().split("\n"), draw.randrange(content.count(b"\n") + 1)
    long = draw.choice(
        ("a" * 2_000_000, "a " * 300_000, "\u0301" * 50_000, "\0", "\ud800", "((((", "\u202e", *TEMPLATES)
    )
    how, left = draw.choice((
        ("a long or odd row", [*rows[:k], long, *rows[k:]]), ("only that", [long]), ("reversed", rows[::-1]),
         ("a row less", rows[:k] + rows[k + 1 :]),
        ("many rows", rows * (1 + 200_000 // len(content))), ("a row twice", [*rows[:k], rows[k], *rows[k:]]),
         ("words apart", [" ".join(r) for r in rows]),
        ("a bomb in YAML", ["---", "a0: &a0 xxxxxxxxxx",
         *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)), "license: *a8", "---"]),
        ("a bomb in a licence", ["---", "license: [&a0 [xxxx]",
         *(f", &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)), "]", "---"]),
        ("many lines", ["---", *[""] * 900_000, "license: mit", "---"]),
    ))  # fmt: skip
    return how, "\n".join(left).encode("utf-8", "surrogatepass")


def header(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """Safetensors whose header says something else of the same bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    found, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [n for n in found if n != "__metadata__"]
    one, two = draw.choice(names), draw.choice(names)
    a, b = found[one], found[two]
    said, shape = found.get("__metadata__", {}), a["shape"]
    halves = {"F32": ["I32", "F16", "BF16", "F64", "U32", "C64"], "F16": ["BF16", "I16", "F32"], "BF16": ["F16", "I16"]}
    if how := draw.choice((
        "dtype", "permuted", "flattened", "offsets swapped", "overlap", "empty", "names swapped", "extra", "scalar",
        "odd name",
        "metadata", "doubled", "ones", "half", "all renamed", "prefix", "odd value", "as 16 bits",
    )):  # fmt: skip
        if how == "dtype":
            a["dtype"] = draw.choice([*halves.get(a["dtype"], ["U8"]), "F8_E4M3", "BOOL", "F4", "E8M0", ""])
        elif how == "permuted":
            a["shape"] = draw.sample(shape, len(shape))
        elif how == "flattened":
            a["shape"] = [torch.Size(shape).numel()]
        elif how == "offsets swapped":
            a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
        elif how == "overlap":
            a["data_offsets"] = b["data_offsets"]
        elif how == "empty":
            a.update(shape=[0, *shape[1:]], data_offsets=[a["data_offsets"][0]] * 2)
        elif how == "names swapped":
            found[one], found[two] = b, a
        elif how == "extra":
            size = 4 * draw.choice((0, 1, 2**16))
            more = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(rest), len(rest) + size]}
            found[draw.choice(("x", "", "a" * 60_000, f"{one}.absmax", "lora_A.weight", one.upper()))] = more
            rest += bytes(size)
        elif how == "scalar":
            a["shape"] = []
        elif how == "odd name":
            found[draw.choice(("\0", "\u202e", "::error::x", "../x", "\n", "\ud800", "weight", "x" * 3000))] = (
                found.pop(one)
            )
        elif how == "metadata":
            found["__metadata__"] = draw.choice(
                (None, [], {"format": None}, {"format": "tf"}, {**said, "a": {}}, {str(k): "x" for k in range(20_000)})
            )
        elif how == "doubled":
            a["shape"] = [2 * n for n in shape]
        elif how == "ones":
            a["shape"] = [*shape, *[1] * draw.choice((1, 2, 12, 100))]
        elif how == "half" and shape:
            a["shape"] = [shape[0] // 2, 2, *shape[1:]]
        elif how in ("all renamed", "prefix"):
            cut = draw.choice(("model.", "transformer.", "unet.", "module.", "text_model."))
            found = {n if n == "__metadata__" else cut + n if how == "prefix" else n[::-1]: v for n, v in found.items()}
        elif how == "as 16 bits":
            for n in names:
                found[n].update(
                    dtype="BF16",
                    shape=[*found[n]["shape"][:-1], 2 * found[n]["shape"][-1]] if found[n]["shape"] else [2],
                )
        else:
            a[draw.choice(("dtype", "shape", "data_offsets", "x"))] = draw.choice(ODD)
    text = json.dumps(found).encode()
    return f"{how} {one[:30]}", struct.pack("<Q", len(text)) + text + rest


def values(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """A sound safetensors file of other tensors; digest and checksum of ours put right."""
    home = Path(os.environ["TMPDIR"]) / "values.safetensors"
    home.write_bytes(content)
    opened = open_tensors(home)
    tensors, said = opened.load(), dict(opened.metadata)
    one, two = draw.choice(list(tensors)), draw.choice(list(tensors))
    t = tensors[one]
    made = {
        "zeros": lambda: torch.zeros_like(t), "huge": lambda: torch.full_like(t,
        3e38 if t.dtype == torch.float32 else 100), "ones": lambda: t[None],
        "turned": lambda: t.mT.contiguous() if t.ndim > 1 else t.flip(0), "empty": lambda: t[:0] if t.ndim else t,
        "scalar": lambda: t.flatten()[0],
        "double": lambda: t.double(), "half": lambda: t.half(), "whole": lambda: t.long(),
        "bytes": lambda: t.to(torch.uint8), "another": lambda: tensors[two],
        "longer": lambda: torch.cat([t, t]) if t.ndim else t, "tiny": lambda: t * 1e-38,
        "fp8": lambda: t.float().to(torch.float8_e4m3fn),
        "NaN": lambda: t * nan if t.is_floating_point() else t,
        "negative": lambda: -t.abs() - 1 if t.dtype != torch.uint8 else t,
    }  # fmt: skip
    if (how := draw.choice([*made, *made, "less", "more", "none", "said", "said", "said"])) in made:
        tensors[one] = made[how]()
    elif how == "less":
        del tensors[one]
    elif how == "more":
        tensors[draw.choice(("x", f"{one}.x", one.replace("weight", "bias")))] = torch.ones(2)
    elif how == "none":
        tensors = {}
    for key in ("unforget", "unforget.run", "unforget.made"):
        if key in said:
            value = json.loads(said[key])
            if how == "said":
                how += " " + edit(value, draw, [])
            if "digest" in value and draw.random() < 0.9:
                value["digest"] = digest(tensors)
            said[key] = json.dumps(resealed(value))
    write_tensors(tensors, said, home)
    return f"{how} {one[:30]}", home.read_bytes()


def tensors(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """Any of both, or another file."""
    if others and draw.random() < 0.05:
        return "another file", draw.choice(others)
    try:
        return (header if draw.random() < 0.55 else values)(content, draw, others)
    except (RuntimeError, ValueError, IndexError):  # torch has no such change of this one
        return header(content, draw, others)


def picture(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """Sound pictures of odd kinds, and pictures that are not what they say."""
    if draw.random() < 0.06:  # as large as may be, of next to no bytes
        mode = draw.choice(("RGB", "RGBA", "I;16", "LA", "P"))
        Image.new(mode, size := draw.choice(((8192, 8192), (8192, 4096), (5000, 5000)))).save(
            out := io.BytesIO(), "PNG"
        )
        return f"{mode} of {size[0]}x{size[1]}", out.getvalue()
    if draw.random() < 0.05:
        plain = Image.new("P", (16, 16))
        plain.save(
            out := io.BytesIO(), "GIF", save_all=True, append_images=[Image.new("P", (16, 16), 1)], duration=[9, 8]
        )
        left = out.getvalue()
        last = left.rindex(b"\x21\xf9")
        return "many frames", left[:last] + left[last:-1] * 200_000 + b";"
    side = draw.choice(((16, 16),) * 4 + ((1, 1), (1, 16), (16, 1), (1, 8192), (17, 16)))
    mode = draw.choice(
        ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
    )
    plain = Image.frombytes("RGB", (16, 16), random.Random(0).randbytes(768)).resize(side)
    image = Image.new(mode, side) if mode in ("PA", "I;16", "I", "F", "LAB", "HSV") else plain.convert(mode)
    form = draw.choice(("PNG", "PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "PPM", "TGA", "JPEG2000", "PDF"))
    how, more = draw.choice((
        ("plain", {}), ("profile", {"icc_profile": draw.choice((b"", b"x" * 3000, b"\0" * 128,
         b"\0\0\0\x80ADBE" + b"\xff" * 500))}),
        ("exif", {"exif": draw.choice((b"", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 900,
         b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0"))}),
        ("frames", {"save_all": True, "append_images": [image] * 3}), ("transparent",
         {"transparency": 0 if mode in ("L", "P") else b"\0" * 6}),
    ))  # fmt: skip
    out = io.BytesIO()
    try:
        image.save(out, form, **more)
    except Exception:  # what that format has no place for
        plain.save(out := io.BytesIO(), form := "PNG")
    left = out.getvalue()
    if form == "PNG" and draw.random() < 0.6:
        how, left = draw.choice(list(chunks(left, draw)))
    elif draw.random() < 0.3:
        k, many = draw.randrange(len(left)), draw.randrange(1, 40)
        how, left = draw.choice(
            (
                (f"{how}, trailing", left + content),
                (f"{how}, a piece twice", left[: k + many] + left[k:]),
                (f"{how}, a piece less", left[:k] + left[k + many :]),
            )
        )
    return f"{mode} {form} {side[0]}x{side[1]} {how}", left


def chunks(png: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """A PNG with other chunks, each with its right checksum."""
    found, k = [], 8
    while k < len(png):
        (n,) = struct.unpack(">I", png[k : k + 4])
        found.append((png[k + 4 : k + 8], png[k + 8 : k + 8 + n]))
        k += n + 12

    def joined(parts: list[tuple[bytes, bytes]]) -> bytes:
        return png[:8] + b"".join(
            struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in parts
        )

    head, data = found[0][1], b"".join(c for t, c in found if t == b"IDAT")
    bomb = _bomb()
    for t, c in ((b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"eXIf",
        b"\xff" * 99), (b"tRNS", b"\0" * 99),
                 (b"PLTE", b"\0" * 7), (b"acTL", b"\0\0\0\2\0\0\0\0"), (b"gAMA", b"\0\0\0\0"), (b"pHYs", b"\0"),
                  (b"fdAT", b"x"), (b"IHDR", head), (b"cHRM", b"\0" * 31)):  # fmt: skip
        yield f"{t.decode()} chunk", joined([found[0], (t, c), *found[1:]])
    yield "data cut", joined([found[0], (b"IDAT", data[: len(data) // 2]), found[-1]])
    yield "data of a bomb", joined([found[0], (b"IDAT", bomb), found[-1]])
    yield "no data", joined([found[0], found[-1]])
    yield "no end", joined(found[:-1])
    yield "many texts", joined([found[0], *[(b"tEXt", b"k%d\0v" % i) for i in range(20_000)], *found[1:]])
    for at, byte in ((8, 16), (8, 3), (9, 0), (9, 3), (9, 6), (10, 1), (12, 1)):
        yield f"header byte {at} = {byte}", joined([(b"IHDR", head[:at] + bytes([byte]) + head[at + 1 :]), *found[1:]])


@functools.cache
def _bomb() -> bytes:
    return zlib.compress(bytes(2**28), 9)


def other(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """Of formats that others define: pieces in one another's places."""
    i, j = sorted(draw.sample(range(len(content)), 2))
    k = min(len(content), j + draw.randrange(1, 200))
    return draw.choice((
        ("pieces swapped", content[:i] + content[j:k] + content[i:j] + content[k:]), ("a piece twice",
         content[:k] + content[i:]),
        ("a piece less", content[:i] + content[j:]), *([("another file", draw.choice(others))] if others else []),
        ("a byte", content[:i] + bytes([content[i] ^ 1 << draw.randrange(8)]) + content[i + 1 :]),
    ))  # fmt: skip


def in_its_place(path: Path, draw: random.Random) -> str:
    """Put something where the file was that is none, or cannot be read."""
    content = path.read_bytes()
    path.unlink()
    how = draw.choice(
        (
            "folder",
            "pipe",
            "socket",
            "loop",
            "to itself",
            "zero",
            "dangling",
            "outside",
            "memory",
            "huge",
            "closed",
            "gone",
            "full",
            "moved",
        )
    )
    if how == "folder":
        path.mkdir()
        (path / "x").write_bytes(content)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif how == "loop":
        path.symlink_to(f"{path.name}.x")
        path.with_name(f"{path.name}.x").symlink_to(path.name)
    elif how in ("huge", "closed"):
        path.write_bytes(content)
        if how == "huge":
            os.truncate(path, 2**40)
        else:
            path.chmod(0)
    elif how != "gone":
        places = {
            "to itself": path.name,
            "zero": "/dev/zero",
            "dangling": "x/y",
            "outside": "/etc/hostname",
            "memory": "/proc/self/mem",
            "full": "/dev/full",
        }
        if how == "moved":
            (path.with_name(f"{path.name}.y")).write_bytes(content)
        path.symlink_to(places.get(how, f"{path.name}.y"))
    return how
