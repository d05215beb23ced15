"""Damage every kind of file that the tool reads, and see what it answers.

    python examples/benchmark/malformed.py [--each 12]

For every kind of file a sound one is made, and damaged in many ways: cut short at random places, filled with noise
or zeros, wrong sizes and types, huge headers, deep nesting, NaN, numbers that no model has, names that lead elsewhere.
Each damaged file goes through the real command in a process of its own. It must end by itself within the time limit,
without a traceback, with exit code 2 or 3, and take at most twice the file's size more memory than the same command
takes on the sound file (plus a mebibyte, under which the allocator's own noise lies).
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", COLUMNS="200")
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch
from conftest import tiny_pipeline, tiny_sd3
from tables import row, table
from test_similarity import Mean, mean_colour_onnx

from unforget import cli
from unforget.cli import app
from unforget.families import layouts
from unforget.families.layouts import sd3 as sd3_layout
from unforget.files import images
from unforget.files.patch import Patch, Provenance
from unforget.files.storage import digest, write_tensors
from unforget.unlearning import trainer

LIMIT = 30
"""Seconds."""
SLACK = 2**20
"""Bytes; the allocator rounds up by as much."""


class Case:
    """A kind of file: where it lies in a folder of sound files, and the command that reads it."""

    def __init__(self, name: str, path: str, command: list[str], damage: str) -> None:
        self.name, self.path, self.command, self.damage = name, path, command, damage


DDPM, SD3 = ["--model", "ddpm"], ["--model", "prompted"]
UNLEARN = [
    "unlearn", "-t", "target.png", "-s", "surrogate.png", "--retain-count", "8", "--max-train-steps", "2",
    "-o", "x.patch",
]  # fmt: skip
FEW = ["--retain-count", "8", "--max-train-steps", "2"]
RESUME = [*UNLEARN, *DDPM, "--resume"]
EXPORT = ["export", "--force", "-o", "out", "--patch"]
VERIFY = ["verify", "--force", *DDPM, "--level", "quick", "--target", "target.png"]
BACKEND = [*VERIFY, "--patch", "a.patch", "--similarity"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
CASES = [
    Case("image (PNG)", "target.png", [*UNLEARN, *DDPM, "--force"], "image"),
    Case("image (JPEG)", "target.jpg", ["unlearn", "-t", "target.jpg", *FEW, *DDPM, "--force"], "image"),
    Case("mask", "mask.png", ["edit-surrogate", *DDPM, "-t", "target.png", "--mask", "mask.png"], "image"),
    Case("patch: verify", "a.patch", [*VERIFY, "--patch", "a.patch"], "ours"),
    Case("patch: export", "a.patch", [*EXPORT, "a.patch", *DDPM], "ours"),
    Case("patch: unlearn upon", "a.patch", [*UNLEARN, *DDPM, "--force", "--patch", "a.patch"], "ours"),
    Case("patch: show", "a.patch", ["show", "a.patch"], "tensors"),
    Case("DDPM weights", f"ddpm/unet/{WEIGHTS}", [*EXPORT, "a.patch", *DDPM], "tensors"),
    Case("DDPM index", "ddpm/model_index.json", [*EXPORT, "a.patch", *DDPM], "json"),
    Case("DDPM network", "ddpm/unet/config.json", [*EXPORT, "a.patch", *DDPM], "json"),
    Case("DDPM scheduler", "ddpm/scheduler/scheduler_config.json", [*EXPORT, "a.patch", *DDPM], "json"),
    Case("SD3 weights", f"prompted/transformer/{WEIGHTS}", [*EXPORT, "b.patch", *SD3], "tensors"),
    Case("SD3 shards", f"sharded/transformer/{WEIGHTS}.index.json", [*EXPORT, "b.patch", "--model", "sharded"], "json"),
    Case("SD3 index", "prompted/model_index.json", [*EXPORT, "b.patch", *SD3], "json"),
    Case("SD3 network", "prompted/transformer/config.json", [*EXPORT, "b.patch", *SD3], "json"),
    Case("SD3 autoencoder", "prompted/vae/config.json", [*EXPORT, "b.patch", *SD3], "json"),
    Case("SD3 autoencoder's weights", f"prompted/vae/{WEIGHTS}", [*EXPORT, "b.patch", *SD3], "tensors"),
    Case("SD3 text encoder", "prompted/text_encoder/config.json", [*EXPORT, "b.patch", *SD3], "json"),
    Case("SD3 text weights", "prompted/text_encoder/model.safetensors", [*EXPORT, "b.patch", *SD3], "tensors"),
    Case("SD3 tokenizer", "prompted/tokenizer/tokenizer.json", [*EXPORT, "b.patch", *SD3], "json"),
    Case("SD3 hints", "prompted/unforget.json", [*EXPORT, "b.patch", *SD3], "json"),
    Case(
        "single file", "sd3.safetensors",
        [*EXPORT, "b.patch", "--model", "sd3.safetensors", "--pipeline-config", "prompted"], "tensors",
    ),
    Case("candidate", f"other/unet/{WEIGHTS}", [*VERIFY, "--candidate", "other"], "tensors"),
    Case("policy", "unforget.toml", [*VERIFY, "--patch", "a.patch"], "toml"),
    Case("configuration", "config.toml", [*UNLEARN, *DDPM, "--force", "--config", "config.toml"], "toml"),
    Case("report", "report.json", [*EXPORT, "a.patch", *DDPM, "--report", "report.json"], "json"),
    Case("run: manifest", "x.run/run.json", RESUME, "json"),
    Case("run: prepared", "x.run/prepared.safetensors", RESUME, "ours"),
    Case("run: checkpoint", "x.run/checkpoint.safetensors", RESUME, "ours"),
    Case("similarity: ONNX", "m.onnx", [*BACKEND, "sscd=m.onnx"], "bytes"),
    Case("similarity: TorchScript", "m.pt", [*BACKEND, "sscd=m.pt"], "bytes"),
]  # fmt: skip


def sound(folder: Path) -> None:
    """Write one sound file of every kind."""
    for k, name in enumerate(("target", "surrogate")):
        pixels = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(k)) * 2 - 1
        images.write_image(pixels, folder / f"{name}.png")
        images.to_pil(pixels).save(folder / f"{name}.jpg", quality=95)
    images.write_image(torch.ones(1, 16, 16), folder / "mask.png")
    ddpm, sd3 = tiny_pipeline(), tiny_sd3()
    ddpm.save_pretrained(folder / "ddpm")
    tiny_pipeline(seed=1).save_pretrained(folder / "other")
    sd3.save_pretrained(folder / "prompted")
    shutil.copytree(folder / "prompted", folder / "sharded")
    shutil.rmtree(folder / "sharded" / "transformer")
    sd3.transformer.save_pretrained(folder / "sharded" / "transformer", max_shard_size="20KB")
    for name in ("prompted", "sharded"):
        hints = {"guidance": 2.0, "retain_prompts": ["a red square"]}
        (folder / name / "unforget.json").write_text(json.dumps(hints))
    state = ddpm.unet.state_dict()
    made = Provenance(
        base="ddpm", base_digest=digest(state), targets=["0" * 16], surrogates=["1" * 16], recipe={}, seed=0, steps=1,
        versions={},
    )  # fmt: skip
    Patch({n: t + 0.01 for n, t in state.items() if "mid_block" in n}, made).save(folder / "a.patch")
    state = sd3.transformer.state_dict()
    made = made.model_copy(update={"base": "sd3", "base_digest": digest(state)})
    Patch({n: t + 0.01 for n, t in state.items() if "attn.to_q" in n}, made).save(folder / "b.patch")
    layout = sd3_layout.transformer(sd3.transformer.state_dict()) | sd3_layout.vae(sd3.vae.state_dict())
    tensors = {**sd3.transformer.state_dict(), **sd3.vae.state_dict()}
    names = layouts.grouped(layout)
    single = {n: layouts.to_original([(layout[d], tensors[d]) for d in inner]) for n, inner in names.items()}
    write_tensors(single, {}, folder / "sd3.safetensors")
    (folder / "m.onnx").write_bytes(mean_colour_onnx())
    torch.jit.script(Mean()).save(str(folder / "m.pt"))
    (folder / "unforget.toml").write_text('[verify]\nlevel = "quick"\nmax_rate = 0.2\npaired = 16\ndraws = 2\n')
    (folder / "config.toml").write_text("seed = 1\nsampler-steps = 2\nmax-train-steps = 2\n")


def begun(folder: Path) -> None:
    """A report, and a run that was stopped after its second update."""

    kept = trainer._row

    def stop(step, *rest):
        if step.number == 2:
            raise KeyboardInterrupt
        return kept(step, *rest)

    trainer._row = stop
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            app([*VERIFY, "--patch", "a.patch", "--report", "report.json"])
        with contextlib.suppress(SystemExit):
            app([*UNLEARN, "--model", "ddpm", "--checkpointing-steps", "1"])
    trainer._row = kept
    assert (folder / "x.run" / "checkpoint.safetensors").is_file()


def damaged(case: Case, content: bytes, draw: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    """Names of damages, and what they leave."""
    if case.damage != "toml":  # what is left of settings may be settings
        yield "empty", b""
        for k in range(each):
            # What comes last in an image may be no part of it.
            most = len(content) // 2 if case.damage == "image" else len(content) - 16
            yield f"cut {k}", content[: draw.randrange(1, max(2, most))]
    yield "noise", draw.randbytes(len(content))
    yield "zeros", bytes(len(content))
    if case.damage not in ("image", "bytes"):  # decoders stop at the end of an image
        yield "doubled", content + content
    kinds = {"tensors": tensors, "ours": ours, "json": table_of, "toml": settings, "image": image}
    if case.damage in kinds:
        yield from kinds[case.damage](content, draw, each)


def image(content: bytes, draw: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    if content[:4] == b"\x89PNG":
        for width, height in ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (0, 16), (16, 17), (8192, 8192)):
            head = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
            yield f"{width}x{height}", content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]
        yield "text of a gibibyte", content[:33] + struct.pack(">I", 2**30) + b"zTXt" + content[33:]
    yield "another format", b"GIF89a" + content[6:]
    yield "svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"


def tensors(content: bytes, draw: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [n for n in header if n != "__metadata__"]

    def again(change: Callable[[dict], object], data: bytes = rest) -> bytes:
        copy = json.loads(json.dumps(header))
        change(copy)
        text = json.dumps(copy).encode()
        return struct.pack("<Q", len(text)) + text + data

    for size in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        yield f"header of {size}", struct.pack("<Q", size) + content[8:]
    yield "nested header", struct.pack("<Q", 100_000) + b"[" * 100_000 + rest
    yield "huge header", struct.pack("<Q", 2**23) + b" " * 2**23 + rest
    name = draw.choice(names)
    yield "huge shape", again(lambda h: h[name].update(shape=[2**40]))
    yield "overflowing shape", again(lambda h: h[name].update(shape=[2**33, 2**33]))
    yield "negative shape", again(lambda h: h[name].update(shape=[-1]))
    yield "offsets beyond", again(lambda h: h[name].update(data_offsets=[0, 2**45]))
    yield "wrong type", again(lambda h: h[name].update(dtype="I8"))
    yield "unknown type", again(lambda h: h[name].update(dtype="F128"))
    yield "a tensor less", again(lambda h: h.pop(name))
    yield "a tensor by another name", again(lambda h: h.update({f"{name}.x": h.pop(name)}))
    yield "numbers as metadata", again(lambda h: h.update(__metadata__={"unforget": 1}))
    swapped = again(lambda h: h[name].update(shape=[*reversed(h[name]["shape"]), 1]))
    yield "wrong shape", swapped
    for k in range(each // 2):
        tensor = draw.choice([n for n in names if header[n]["dtype"] in ("F32", "F16", "BF16") and header[n]["shape"]])
        begin = header[tensor]["data_offsets"][0]
        bad = bytearray(rest)
        width = 4 if header[tensor]["dtype"] == "F32" else 2
        bad[begin : begin + width] = b"\xff" * width
        yield f"NaN {k}", content[: 8 + length] + bytes(bad)


def ours(content: bytes, draw: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    """What else is wrong with a file that this tool wrote."""
    yield from tensors(content, draw, each)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, said in (
        ("no", {}),
        ("cut", {"unforget": "{", "unforget.run": "["}),
        ("nested", {"unforget": "[" * 9999}),
    ):
        text = json.dumps({**header, "__metadata__": said}).encode()
        yield f"{name} metadata", struct.pack("<Q", len(text)) + text + content[8 + length :]


def table_of(content: bytes, draw: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    yield "nested", b"[" * 200_000
    yield "nested tables", b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    yield "a list", b"[1]"
    yield "text", b'"text"'
    yield "not utf-8", b"\xff\xfe" + content
    yield "mebibytes", content[:-2] + b', "x": "' + b"x" * 2**25 + b'"}'
    value = json.loads(content)
    if "_class_name" in value and isinstance(value.get("scheduler"), list):  # model_index.json
        for part in (["os", "system"], ["evil", "Evil"], ["diffusers", "../x"], [1, 2], ["diffusers"], "diffusers"):
            yield f"part {part}", json.dumps({**value, "scheduler": part}).encode()
        yield "a part elsewhere", json.dumps({**value, "../../x": ["diffusers", "UNet2DModel"]}).encode()
        yield "another class", json.dumps({**value, "_class_name": "__import__"}).encode()
    if "weight_map" in value:
        for name in ("../../../etc/passwd", "/etc/passwd", "x/../y", "", "no.safetensors"):
            first = next(iter(value["weight_map"]))
            yield f"shard {name}", json.dumps({**value, "weight_map": {**value["weight_map"], first: name}}).encode()
    for key in draw.sample(sorted(value), min(len(value), each // 2)):
        old = value[key]
        if isinstance(old, int) and not isinstance(old, bool):
            # Where a number is not a size, one below zero may mean something.
            for other in (10**9, 10**30, *([-1] if key.endswith(("_size", "_dim", "_channels", "_layers")) else [])):
                yield f"{key} = {other:.0e}", json.dumps({**value, key: other}).encode()
        elif isinstance(old, list) and old and isinstance(old[0], int):
            yield f"{key} huge", json.dumps({**value, key: [10**9] * len(old)}).encode()
            yield f"{key} long", json.dumps({**value, key: old * 5000}).encode()


def settings(content: bytes, draw: random.Random, each: int) -> Iterator[tuple[str, bytes]]:
    yield "nested", b"a = " + b"[" * 100_000
    yield "unknown key", content + b"\n[nonsense]\nx = 1\n"
    yield "not utf-8", b"\xff\xfe"
    yield "a wrong type", content.replace(b"= 2", b'= "two"') + b"\n"
    yield "a date", content + b"x = 2026-13-45\n"


def ask(
    folder: Path, command: list[str], limit: float = LIMIT, first: Callable[[], object] = lambda: None
) -> tuple[int, str, int, float]:
    """Exit code (128 + signal, -1 for the time limit), what was said, peak memory in bytes above the start, seconds.

    `first` is called in the process that the command then runs in.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    began = time.monotonic()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.write(write, json.dumps(_run(folder, command, said.fileno(), first)).encode())
            os._exit(0)
        os.close(write)
        late = not select.select([read], [], [], limit)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        answer = os.read(read, 4096)
        os.close(read)
        _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - began
        said.seek(0)
        text = said.read().decode(errors="replace")
    code, peak = json.loads(answer) if answer else (128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else 98, 0)
    return -1 if late else code, text, peak, seconds


def _run(folder: Path, command: list[str], said: int, first: Callable[[], object]) -> tuple[int, int]:
    """The real command as its console script, in this process: exit code and peak memory above the start."""
    code = 0
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):  # what compiled libraries say, too
        os.dup2(said, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["unforget", *command]
    os.chdir(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        first()
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 99
    return code, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=12)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    import diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3  # noqa: F401  (what every command imports)

    import unforget.api  # noqa: F401

    draw, total, bad = random.Random(0), 0, []
    table("file", "damages", "exit 2", "exit 3", "other", "slowest, s", "most memory over sound, share of the file")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "sound"
        home.mkdir()
        os.environ["UNFORGET_CACHE"] = f"{name}/cache"
        sound(home)
        begun(home)
        for case in (c for c in CASES if given.only in c.name):
            here = Path(name) / "here"
            shutil.copytree(home, here)
            content = (here / case.path).read_bytes()
            code, said, usual, _ = ask(here, case.command)
            if code not in (0, 1, 4):
                print(f"the sound file of '{case.name}' gives {code}: {said}")
            codes, slowest, most = {}, 0.0, 0.0
            for damage, left in damaged(case, content, draw, given.each):
                shutil.rmtree(here)
                shutil.copytree(home, here)
                (here / case.path).write_bytes(left)
                code, said, peak, seconds = ask(here, case.command)
                over = max(0, peak - usual - SLACK) / max(1, len(left))
                codes[code] = codes.get(code, 0) + 1
                slowest, most, total = max(slowest, seconds), max(most, over), total + 1
                if code not in (2, 3) or over > 2 or "Traceback" in said:
                    bad.append(f"{case.name}, {damage}: exit {code}, {over:.1f} x the file, {said.strip()[-300:]}")
            shutil.rmtree(here)
            other = sum(n for c, n in codes.items() if c not in (2, 3))
            row(
                case.name, sum(codes.values()), codes.get(2, 0), codes.get(3, 0), other, f"{slowest:.1f}", f"{most:.2f}"
            )
    print(f"{total} damaged files; {len(bad)} not as promised")
    print("\n".join(bad))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
