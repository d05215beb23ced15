"""Kill a run with SIGKILL at random moments, resume it, and compare the bytes of the patch.

    python examples/benchmark/resume.py [--kills 25] [--seed 0]

The run is `unforget unlearn` on the bundled model `faces`, from the start of the interpreter to its end, with a
checkpoint after every update. Moments are spread evenly over the time of an undisturbed run. After each kill every
file that can be seen must be whole; then `--resume` must end with the bytes of the undisturbed patch. A kill that comes
before the run has a folder leaves nothing to resume: `--resume` must report that (exit 2), and the plain command runs
again.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from tables import row, table

from unforget.files.patch import Patch
from unforget.files.storage import open_tensors

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable, "-m", "unforget", "unlearn", "--model", "faces",
    "--target", str(ROOT / "examples" / "faces" / "planted" / "0.png"),
    "--surrogate", str(ROOT / "tests" / "data" / "surrogate.png"),
    "--output", "x.patch", "--retain-count", "48", "--max-train-steps", "40", "--stop-margin", "1",
    "--train-batch-size", "4", "--retain-batch-size", "8", "--checkpointing-steps", "1",
]  # fmt: skip


def start(folder: Path, *more: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "UNFORGET_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*COMMAND, *more], cwd=folder, env=env, stdout=pipe, stderr=pipe, start_new_session=True)


def stage(folder: Path) -> str:
    """How far a killed run came, by what it left."""
    run = folder / "x.run"
    if not (run / "run.json").exists():
        return "start-up"
    if (folder / "x.patch").exists():
        return "after the patch"
    if (run / "checkpoint.safetensors").exists():
        header = open_tensors(run / "checkpoint.safetensors").metadata["unforget.run"]
        return f"update {json.loads(header)['values']['step']}"
    return "before training" if (run / "prepared.safetensors").exists() else "preparing"


def torn(folder: Path) -> list[str]:
    """Files that can be seen and are not whole; what is hidden beside them was never in place."""
    bad = []
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith(".") or path.suffix == ".jsonl":
            continue  # the log is cut back to the last checkpoint
        try:
            if path.suffix == ".patch":
                Patch.load(path)
            elif path.suffix == ".safetensors":
                open_tensors(path).load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                Image.open(path).load()
        except Exception as error:
            bad.append(f"{path.name}: {error}")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp()))
    given = parser.parse_args()
    began = time.monotonic()
    whole = start(given.work / "whole")
    errors = whole.communicate()[1]
    if whole.returncode not in (0, 1):
        sys.exit(errors.decode())
    length = time.monotonic() - began
    wanted = (given.work / "whole" / "x.patch").read_bytes()
    print(f"an undisturbed run takes {length:.1f} s", flush=True)
    draw, same, files = random.Random(given.seed), 0, 0
    table("kill", "second", "it had come to", "torn files", "resume exits", "bytes")
    for k in range(given.kills):
        folder = given.work / f"kill-{k}"
        moment = length * (k + draw.random()) / given.kills
        process = start(folder)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        came, bad = stage(folder), torn(folder)
        again = start(folder, "--resume")
        again.communicate()
        codes = [again.returncode]
        if came == "start-up" and again.returncode == 2:
            plain = start(folder)
            plain.communicate()
            codes.append(plain.returncode)
        equal = (folder / "x.patch").is_file() and (folder / "x.patch").read_bytes() == wanted
        same, files = same + equal, files + len(bad)
        row(k + 1, f"{moment:.1f}", came, ", ".join(bad) or 0, codes, "equal" if equal else "OTHER")
    print(f"{same} of {given.kills} ended with the bytes of the undisturbed patch; {files} torn files seen")
    sys.exit(same != given.kills or files > 0)


if __name__ == "__main__":
    main()
