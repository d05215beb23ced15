"""What the tool computes, pinned: the same before and after the code moves.

    python examples/benchmark/pins.py record pins.json [--quick]
    python examples/benchmark/pins.py compare pins.json [--quick]

Runs the real command with one thread and seed 0: `unlearn` on `faces` (two targets) and on `flags`, `verify` on both
patches, every export; and keeps the digests of all tensors, every figure of the reports, and the names of all files.
`--quick` trains 20 updates and verifies at level quick. A record holds for one machine: kernels differ.
"""

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FACES = [ROOT / "examples" / "faces" / "planted" / f"{i}.png" for i in (0, 2)]
WRONG, RIGHT = (ROOT / "examples" / "flags" / f"ireland-{side}.png" for side in ("wrong", "right"))
RUNS = {
    "faces": ["--target", FACES[0], "--target", FACES[1]],
    "flags": ["--target", WRONG, "--surrogate", RIGHT, "--prompt", "flag of Ireland"],
}
FORMATS = {"faces": ("diffusers", "transformer"), "flags": ("diffusers", "lora", "peft", "transformer")}
RENAMED = {
    "complete": "partial_denoise", "reword": "paraphrase", "cast": "quantization", "look-alikes": "neighbours",
    "retain": "retention", "keep": "must_retain", "seek": "noise_search", "revive": "relearning",
    "noted": "informational",
}  # fmt: skip
"""Words of the first version, in records that it made."""


def command(*args: object) -> None:
    """Run `unforget`, in silence unless it fails to run."""
    done = subprocess.run([sys.executable, "-m", "unforget", *map(str, args)], capture_output=True, text=True)
    if done.returncode not in (0, 1, 4):
        sys.exit(f"{' '.join(map(str, args))}\n{done.stderr}")


def tensors(path: Path) -> str:
    """Digest of the data of a safetensors file, without its header."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + struct.unpack("<Q", content[:8])[0] :]).hexdigest()


def exported(path: Path) -> dict[str, str]:
    """Every file of an export: tensors by digest, others by name."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return {f.name if f == path else str(f.relative_to(path)): "" if f.suffix != ".safetensors" else tensors(f)
            for f in files}  # fmt: skip


def judged(path: Path) -> dict[str, object]:
    """Verdict, figures and outcomes of a report, by place."""
    report, found = json.loads(path.read_text()), {}
    for row in report["checks"] + report["findings"]:  # levels are called timesteps since schema version 3
        probe = RENAMED.get(row["probe"], row["probe"])
        level = row.get("level", row.get("timestep"))
        level = "" if level is None else f"{level:g}"
        place = f"{probe} {row['target']} {level} {row['prompt']} {row['variant']} {row.get('figure', '')}"
        outcome = RENAMED.get(row.get("outcome"), row.get("outcome"))
        found[place] = [row["base"], row["candidate"], row.get("threshold"), outcome]
    return {"verdict": report["verdict"], "targets": [t["id"] for t in report["targets"]], **found}


def measured(quick: bool) -> dict[str, object]:
    """Everything, by name."""
    found: dict[str, object] = {}
    steps = ["--max-train-steps", 20] if quick else []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(UNFORGET_CACHE=f"{folder}/cache", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
        os.chdir(folder)
        for model, args in RUNS.items():
            patch = Path(f"{model}.patch")
            command("unlearn", "--model", model, *args, "-o", patch, "--threads", 1, "--seed", 0, *steps)
            found[f"{model} patch"] = tensors(patch)
            level = ["--level", "quick" if quick else "standard"]
            command("verify", "--model", model, "--patch", patch, "--report", f"{model}.json", "--threads", 1, *level)
            found[f"{model} verify"] = judged(Path(f"{model}.json"))
            for form in FORMATS[model]:
                out = Path(f"{model}-{form}" + (".safetensors" if form == "transformer" else ""))
                command("export", "--model", model, "--patch", patch, "--format", form, "-o", out, "--threads", 1)
                found[f"{model} {form}"] = exported(out)
            print(f"{model} done", file=sys.stderr)
    return found


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Where two records differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in sorted({*a, *b}) for d in differences(a.get(k), b.get(k), f"{where}/{k}")]
    return [] if a == b else [f"{where}: {a} -> {b}"]


def main() -> None:
    """Record, or compare with what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=lambda p: Path(p).resolve())
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    found = measured(args.quick)
    if args.action == "record":
        args.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    differ = differences(json.loads(args.file.read_text()), json.loads(json.dumps(found)))
    print("\n".join(differ) or "equal")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
