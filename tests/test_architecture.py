"""The map in docs/architecture.md, checked."""

import ast
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from unforget.core import objectives, surgery
from unforget.core.types import Strategy
from unforget.surrogate import editors
from unforget.verification import probes, similarity

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unforget"
ORDER = [
    "errors", "core", "config", "files", "families", "surrogate", "unlearning", "verification", "reports", "exports",
    "api", "cli",
]  # fmt: skip
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "__main__.py") or p.parent != PACKAGE)


def module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "unforget":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("unforget.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    mine = ORDER.index(module(path))
    for name in imported(ast.parse(path.read_text())) - {module(path), "__version__"}:
        assert ORDER.index(name) < mine, f"{module(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_sizes(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{node.name} is long"
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len(set(given) - {"self", "cls"}) <= 7, f"{node.name} has many parameters"


def test_only_families_and_editors_know_diffusers():
    users = {module(p) for p in FILES if "diffusers" in {n.split(".")[0] for n in _roots(ast.parse(p.read_text()))}}
    assert users <= {"families", "surrogate"}


def test_configurations_stop_at_the_api():
    """But for the policy of `verify`, which is data that the verdict is made of."""
    users = {module(p) for p in FILES if "config" in imported(ast.parse(p.read_text()))}
    assert users <= {"config", "api", "cli", "verification"}


def test_only_the_command_line_knows_typer_and_rich():
    users = {
        module(p) for p in FILES if {"typer", "rich"} & {n.split(".")[0] for n in _roots(ast.parse(p.read_text()))}
    }
    assert users == {"cli"}


def _roots(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_nothing_below_the_command_line_prints():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path


@pytest.mark.parametrize("command", [[], ["unlearn"], ["verify"], ["edit-surrogate"], ["export"], ["show"]])
def test_help_does_not_import_torch(command):
    code = (
        "import sys\n"
        "from unforget.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    for flag in ("--help", "-h"):
        subprocess.run([sys.executable, "-c", code, *command, flag], check=True, capture_output=True)


UNIONS = [surgery.Surgery, objectives.Objective, objectives.Weighting, editors.Editor, similarity.Backend]
KINDS = [k for union in UNIONS for k in typing.get_args(typing.get_args(union)[0])]
NAMED = {k: k.model_fields["kind"].default for k in KINDS} | {probe: probe.kind for probe in probes.load()}


@pytest.mark.parametrize("kind", NAMED, ids=lambda k: k.__name__)
def test_every_kind_is_a_documented_strategy(kind):
    assert issubclass(kind, Strategy)
    assert kind.__doc__
    name = NAMED[kind]
    assert any(f"`{name}`" in p.read_text() for p in (ROOT / "docs").glob("*.md")), f"{name} is not in docs/"
    with pytest.raises(ValueError, match=r"[eE]xtra"):
        kind(nonsense=1)


def test_the_command_reference_is_what_the_program_says():
    sys.path.insert(0, str(ROOT / "docs"))
    from generate import reference

    assert (ROOT / "docs" / "cli.md").read_text() == reference(), "run `python docs/generate.py`"
