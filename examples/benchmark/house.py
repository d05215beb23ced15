"""The shape of the package, in figures: `python examples/benchmark/house.py`.

Lines with templates, places at the top, what the commit touched that added a family, sizes of functions and
modules, and how long `--help` and a usage error take beside an import of typer and rich (the median of five runs).
"""

import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "unforget"
FAMILY = "Stable Diffusion 1.x"
"""Begins the subject of the commit that added a family."""
GENERATED = "cli"
"""Where functions have as many parameters as a command has options."""


def git(*args: str) -> str:
    """What git says."""
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def tracked(*endings: str) -> list[Path]:
    """Files of the package with these endings, tracked or new."""
    listed = git("ls-files", "--cached", "--others", "--exclude-standard", "unforget").split()
    return [ROOT / f for f in listed if f.endswith(endings) and (ROOT / f).is_file()]


def sizes() -> None:
    """Lines, places, and what is long."""
    code, templates = tracked(".py"), tracked(".jinja", ".css")
    lines = {p: p.read_text().count("\n") for p in (*code, *templates)}
    written = sum(lines[p] for p in templates)
    print(f"lines: {sum(lines.values()):,}, {written} of them in templates")
    places = {p.relative_to(PACKAGE).parts[0] for p in tracked("")} - {"py.typed"}
    print(f"places at the top: {len(places)} ({', '.join(sorted(places))})")
    functions = [
        (p, node)
        for p in code
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f"{p.name}:{f.name} {n}" for p, f in functions if (n := f.end_lineno - f.lineno + 1) > 50]
    wide = [f"{p.name}:{f.name} {n}" for p, f in functions if (n := parameters(f)) > 7 and GENERATED not in p.parts]
    deep = [f"{p.relative_to(PACKAGE)} {n}" for p in code if (n := lines[p]) > 350]
    for what, found in (("functions over 50 lines", long), ("over 7 parameters", wide), ("modules over 350", deep)):
        print(f"{what}: {len(found)} {' '.join(found)}")


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many a caller may give."""
    a = function.args
    return len([x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")])


def touched(subject: str) -> None:
    """Files outside tests and docs that a commit changed."""
    commit = git("log", "--format=%H", f"--grep=^{subject}", "-1").strip()
    files = git("show", "--name-only", "--format=", commit).split() if commit else []
    kept = [f for f in files if not f.startswith(("tests/", "docs/")) and not f.endswith(".md")]
    print(f"files that '{subject}' touches: {len(kept)} ({', '.join(kept)})")


def seconds(*command: str) -> float:
    """Median wall time of five runs."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], capture_output=True, cwd=ROOT)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def speed() -> None:
    """How long a user waits for help and for a refusal."""
    bare = seconds("-c", "import typer, rich.console, rich.table")
    print(f"typer and rich: {bare:.2f} s")
    for said, args in {
        "--help": ["--help"],
        "unlearn --help": ["unlearn", "--help"],
        "a wrong value": ["unlearn", "--model", "faces", "--target", "a.png", "--rank", "0"],
        "a missing file": ["unlearn", "--model", "faces", "--target", "nothing.png"],
        "a wrong scope": ["unlearn", "--model", "faces", "--target", "README.md", "--train", "lora"],
    }.items():
        found = seconds("-m", "unforget", *args)
        print(f"{said}: {found:.2f} s, {found / bare:.1f} times typer and rich")


if __name__ == "__main__":
    sizes()
    touched(FAMILY)
    speed()
