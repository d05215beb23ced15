"""What `unforget export` costs, and what rounding does to a patch.

    python examples/benchmark/export.py --rounding a.patch [b.patch ...]
    python examples/benchmark/export.py --memory [--formats diffusers transformer single-file] [--dtype float16]

--rounding: patches of the bundled model `faces`, each beside its `.run` folder. The base is first rounded to as many
bits of mantissa as are written (7 is bfloat16), so that a small change vanishes; then the patch goes on at several
scales. `kept` is the share of the float32 patch's effect on the worst margin of reconstructions that is left.

--memory: the architecture of Stable Diffusion 3 medium with random bfloat16 weights (2.03 B parameters) and a random
LoRA of rank 16, exported by the real command in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from unforget import families
from unforget.core.types import Instance
from unforget.exports.rounding import Sums
from unforget.files import images
from unforget.files.patch import Patch, Provenance
from unforget.files.storage import digest
from unforget.unlearning.trainer import worst_margin

CASES = [(7, 1.0), (7, 0.3), (7, 0.1), (7, 0.03), (7, 0.01), (6, 1.0), (5, 1.0), (4, 1.0), (3, 1.0), (4, 0.5)]
"""Bits of mantissa and scale."""
DRAWS = 32


def coarse(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounded to so many bits of mantissa."""
    mantissa, exponent = torch.frexp(tensor)
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


def rounding(paths: list[Path]) -> None:
    print("| patch | bits | scale | still | cosine | error | margin base | float32 | rounded | kept |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for path in paths:
        patch, family = Patch.load(path), families.load("faces")
        beside = path.with_suffix(".run")
        target, surrogate = (
            images.read_image(next(beside.glob(f"{side}-*.png")), family.image_shape)
            for side in ("target", "surrogate")
        )
        instances = (Instance(target, surrogate, "t"),)
        state = family.network.state_dict()
        weights = {n: t.clone() for n, t in state.items()}

        def measured(tensors: dict[str, torch.Tensor], state=state, family=family, instances=instances) -> float:
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
            return worst_margin(family, instances, DRAWS)

        for bits, scale in CASES:
            base = {n: coarse(t, bits) for n, t in weights.items()}
            after = {n: base[n] + scale * patch.difference(n, weights[n]) for n in patch.names()}
            written, sums = {n: coarse(t, bits) for n, t in after.items()}, Sums()
            for name in after:
                sums.add(after[name] - base[name], written[name] - base[name])
            margins = [measured({**base, **more}) for more in ({}, after, written)]
            found = sums.rounding("bfloat16")
            kept = (margins[2] - margins[0]) / (margins[1] - margins[0])
            print(
                f"| {path.stem} | {bits} | {scale:g} | {found.still:.0%} | {found.cosine:.3f} | {found.error:.2f} | "
                f"{margins[0]:.3f} | {margins[1]:.3f} | {margins[2]:.3f} | {kept:.0%} |",
                flush=True,
            )


def build(folder: Path) -> Path:
    """The model and the patch; written once."""
    from sd3_medium import pipeline

    from unforget.families.sd3 import SPEC

    if not (folder / "model_index.json").is_file():
        pipe = pipeline()
        pipe.transformer.to(torch.bfloat16)  # its table of positions is a float32 buffer
        torch.nn.init.eye_(pipe.text_encoder.text_projection.weight)  # as stock loaders of a single file have it
        pipe.save_pretrained(folder)
        (folder / "unforget.json").write_text(json.dumps({"retain_prompts": ["a flag"]}))
    patch = folder.with_name(f"{folder.name}.patch")
    if not patch.is_file():
        network = families.load(str(folder), families.Options(t5=False)).network
        state, tensors, g = network.state_dict(), {}, torch.Generator().manual_seed(0)
        for name, weight in state.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and any(module.endswith(f".{t}") for t in SPEC.lora_targets):
                out, rest = weight.shape
                tensors[f"{module}.lora_A.weight"] = torch.randn(16, rest, generator=g) * 0.02
                tensors[f"{module}.lora_B.weight"] = torch.randn(out, 16, generator=g) * 0.02
        made = Provenance(
            base="sd3", base_digest=digest(state), targets=["t"], surrogates=["s"], holds="lora",
            adapter={"rank": 16, "alpha": 16}, recipe={}, seed=0, steps=1, versions={},
        )  # fmt: skip
        Patch(tensors, made).save(patch)
    return patch


CHILD = """
import sys, threading, time
most, name = {}, ""
def watch():
    while True:
        seen = dict(l.split(":", 1) for l in open("/proc/self/status") if l.startswith(("RssAnon", "VmRSS")))
        found = {k: int(v.split()[0]) for k, v in seen.items()}
        for kind, value in found.items():
            most[kind, name] = max(most.get((kind, name), 0), value)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from pathlib import Path
from unforget.api import export
from unforget.config import ExportConfig
from unforget.core.types import Progress
def stage(title, total):
    global name
    name = title
export(ExportConfig(model=sys.argv[1], patch=sys.argv[2], output=Path(sys.argv[3]), format=sys.argv[4], force=True,
                    dtype=sys.argv[5], force_rounding=True, card=False),
       Progress(stage=stage, note=lambda s: print(s, file=sys.stderr)))
# Not ru_maxrss: that of a child begins with what its parent held when it was started.
peak = next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(peak, max(v for (k, _), v in most.items() if k == "RssAnon"))
print("; ".join(f"{n or 'load'} {k} {v / 2**20:.2f}" for (k, n), v in most.items()), file=sys.stderr)
"""


def memory(folder: Path, formats: list[str], dtype: str) -> None:
    patch = build(folder)
    print("| format | largest shard GiB | patch GiB | peak RSS GiB | anonymous GiB | ratio | seconds |")
    print("|---|---|---|---|---|---|---|")
    for form in formats:
        one = form in ("transformer", "single-file")
        out = folder.with_name(f"{folder.name}-{form}" + (".safetensors" if one else ""))
        started = time.time()
        args = [sys.executable, "-c", CHILD, str(folder), str(patch), str(out), form, dtype]
        said = subprocess.run(args, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout.split()
        files = [out] if one else list((out / "transformer").glob("*.safetensors"))
        shard, size = max(f.stat().st_size for f in files) / 2**30, patch.stat().st_size / 2**30
        most, anonymous = (int(n) / 2**20 for n in said[-2:])
        print(
            f"| {form} | {shard:.2f} | {size:.3f} | {most:.2f} | {anonymous:.2f} | {(most - size) / shard:.2f} | "
            f"{time.time() - started:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounding", type=Path, nargs="+", metavar="PATCH")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/sd3-medium"))
    parser.add_argument("--formats", nargs="+", default=["diffusers", "transformer", "single-file"])
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if args.rounding:
        rounding(args.rounding)
    if args.memory:
        memory(args.folder, args.formats, args.dtype)


if __name__ == "__main__":
    main()
