"""The Python API as its users meet it: names, documentation, and paths in either form."""

import inspect
import runpy
from pathlib import Path

import pytest
from pydantic import BaseModel

import unforget
from unforget import config
from unforget.config.base import item, plain
from unforget.errors import UsageError

COMMANDS = [getattr(unforget, name) for name in ("edit_surrogate", "unlearn", "verify", "export", "show")]
CONFIGS = [unforget.EditConfig, unforget.UnlearnConfig, unforget.VerifyConfig, unforget.ExportConfig]
GIVEN = {"model": "faces", "target": "a.png", "patch": "a.patch", "output": "b"}


def test_dir_shows_what_is_public():
    assert set(dir(unforget)) == {*unforget.__all__, "__version__"}


@pytest.mark.parametrize("name", unforget.__all__)
def test_every_public_name_is_documented(name):
    found = getattr(unforget, name)
    assert len(inspect.getdoc(found) or "") > 20
    if issubclass(type(found), type) and issubclass(found, config.Config):
        for field, said in found.model_fields.items():
            assert said.description, field
    elif issubclass(type(found), type):
        for public, method in vars(found).items():
            if inspect.isfunction(method) and not public.startswith("_"):
                assert inspect.getdoc(method), public


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_every_command_names_its_errors_and_documents_its_result(command):
    said = inspect.getdoc(command)
    assert "UsageError" in said
    assert command is unforget.show or "CannotRun" in said
    result = inspect.get_annotations(command, eval_str=True)["return"]
    assert inspect.getdoc(result)


@pytest.mark.slow
def test_the_program_of_the_examples_runs(tmp_path, monkeypatch, few):
    program = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "api.py"))
    for name, kind in few.items():
        monkeypatch.setitem(program["main"].__globals__, name, kind)
    assert program["main"](tmp_path / "out") in (1, 4)
    assert (tmp_path / "out" / "3.patch").is_file()


def paths(kind: type[BaseModel]) -> list[str]:
    return [n for n, f in kind.model_fields.items() if Path in (plain(f.annotation), item(f.annotation))]


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind in CONFIGS for field in [*paths(kind), "model"]])
def test_a_path_is_a_text_or_a_path(kind, field):
    base = {name: value for name, value in GIVEN.items() if name in kind.model_fields}
    if field == "donor":
        base["method"] = "donor"
    if field == "candidate":
        base.pop("patch")
    one, other = (kind(**{**base, field: form("folder/x.png")}) for form in (str, Path))
    assert getattr(one, field) == getattr(other, field)
    if field != "model":
        found = getattr(one, field)
        assert found in (Path("folder/x.png"), (Path("folder/x.png"),))


def test_show_takes_either(tmp_path):
    for form in (str, Path):
        with pytest.raises(UsageError, match="is no file"):
            unforget.show(form(tmp_path / "none.patch"))
