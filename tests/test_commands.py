"""Every `unforget` command that the pages show is run as it stands there, with options after it that make it quick.

What needs the hub, a card or a model of the reader's is only parsed.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer
from conftest import PLANTED
from typer.testing import CliRunner

import unforget
from unforget.cli import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [
    p for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
    if p.name not in ("cli.md", "results.md")
]  # fmt: skip
FEW = ["--sampler-steps", "2"]
QUICK = {
    "edit-surrogate": ["--retain-count", "8", "--candidates", "1", "--strength", "0.9", "--force", *FEW],
    "unlearn": ["--max-train-steps", "2", "--retain-count", "8", "--num-validation-images", "1", "--force", *FEW],
    "verify": [
        "--level", "quick", "--max-rate", "0.4", "--paired", "16", "--controls", "8", "--draws", "2", "--force", *FEW,
    ],
    "export": ["--force"],
}  # fmt: skip
ENDS = {"unlearn": {0, 1}, "verify": {0, 1, 4}}
"""A patch of two updates forgets nothing, and is judged so."""
WRITES = re.compile(r"(?:-o|--output|--html|--report|--junit|--attestation|--save-images)\s+(\S+)")


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that begin with the command, without comments."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.startswith("unforget ")]


def runs_here(command: str) -> bool:
    return "--push-to-hub" not in command and bool(re.search(r"--model (faces|flags) |show face", command))


def run(command: str) -> None:
    _, name, *rest = shlex.split(command)
    given = ["--surrogate", "examples/faces/planted/3.png"] if name == "unlearn" and "--surrogate" not in rest else []
    result = CliRunner().invoke(app, [name, *rest, *given, *QUICK.get(name, [])])
    assert result.exit_code in ENDS.get(name, {0}), f"{command}\n{result.output}"
    if "--dry-run" not in command:
        for path in WRITES.findall(command):
            assert Path(path).exists(), (command, path)


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """What a reader has made before: the images, and a patch of each bundled model."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, number in (("face", 0), ("second", 1)):
            Path(f"{name}.png").write_bytes((PLANTED / f"{number}.png").read_bytes())
        run("unforget unlearn --model faces --target face.png --surrogate second.png -o face.patch")
        run(
            "unforget unlearn --model flags --target examples/flags/ireland-wrong.png --prompt 'flag of Ireland' "
            "--surrogate examples/flags/ireland-right.png -o ireland.patch"
        )
    return folder


def shows_programs(page: Path) -> bool:
    return "```python\n" in page.read_text() or any(map(runs_here, commands(page)))


@pytest.mark.parametrize("page", filter(shows_programs, PAGES), ids=lambda p: p.name)
def test_the_commands_of_a_page_run_in_order(page, desk, tmp_path, monkeypatch, few):
    monkeypatch.chdir(desk if commands(page) else tmp_path)
    for name, kind in few.items():
        monkeypatch.setattr(unforget, name, kind)
    for command in filter(runs_here, dict.fromkeys(commands(page))):
        run(command)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, page.name, "exec"), {})


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_every_command_of_a_page_is_one(page):
    group = typer.main.get_command(app)
    for command in commands(page):
        with group.make_context("unforget", shlex.split(command)[1:], resilient_parsing=True) as context:
            name, found, rest = group.resolve_command(context, shlex.split(command)[1:])
            found.make_context(name, rest)
