"""Pictures on the command line: files, folders, and those in the package."""

import json
import shutil

import pytest
from conftest import PLANTED

from unforget import EditConfig, UnforgetError, UnlearnConfig, VerifyConfig
from unforget.config import resolve


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """before/ with a.png, b.png and what is no picture, after/ with b.webp and a.png."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "before/b.png",
        "before/a.png",
        "before/.hidden.png",
        "before/notes.txt",
        "after/b.webp",
        "after/a.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(paths):
    return [str(path) for path in paths]


@pytest.mark.parametrize("kind", [UnlearnConfig, VerifyConfig])
def test_a_folder_is_its_pictures_by_name_and_surrogates_are_matched_by_name(folders, kind):
    shared = {"model": "faces"} | ({"candidate": "x"} if kind is VerifyConfig else {})
    config = kind(**shared, target="before", surrogate="after")
    assert names(config.target) == ["before/a.png", "before/b.png"]
    assert names(config.surrogate) == ["after/a.png", "after/b.webp"]
    config = kind(**shared, target=["before/b.png", "before/a.png"], surrogate="after")
    assert names(config.surrogate) == ["after/b.webp", "after/a.png"]
    assert len(kind(**shared, target=["before", "after/a.png"]).target) == 3


def test_what_has_no_pair_is_named(folders):
    (folders / "after" / "b.png").touch()
    (folders / "after" / "b.webp").rename(folders / "after" / "b.jpg")
    assert UnlearnConfig(model="faces", target="before", surrogate="after").surrogate[1].name == "b.png"
    (folders / "after" / "b.png").rename(folders / "after" / "b.gif")
    with pytest.raises(UnforgetError, match=r"more than one picture in 'after' is called as 'before/b\.png'"):
        UnlearnConfig(model="faces", target="before", surrogate="after")
    (folders / "after" / "a.png").unlink()
    with pytest.raises(UnforgetError, match=r"no picture in 'after' is called as 'before/a\.png'"):
        UnlearnConfig(model="faces", target="before", surrogate="after")
    (folders / "empty").mkdir()
    with pytest.raises(UnforgetError, match="there are no pictures in 'empty'"):
        UnlearnConfig(model="faces", target="empty")


def test_demo_pictures_are_in_the_package(cli, tmp_path):
    assert [UnlearnConfig(model="faces", target=f"demo:{k}").target[0].read_bytes() for k in range(4)] == [
        (PLANTED / f"{k}.png").read_bytes() for k in range(4)
    ]
    assert EditConfig(model="faces", target="demo:1", donor="demo:2").donor.name == "2.png"
    said = cli("unlearn", "--model", "faces", "--target", "demo:4")
    assert said.exit_code == 2
    assert "there is no demo:4, only demo:0, demo:1, demo:2, demo:3" in said.stderr
    assert not list(tmp_path.iterdir())


def test_a_policy_may_name_them_too(folders, cli):
    (folders / "team").mkdir()
    shutil.move(folders / "before", folders / "team" / "before")
    policy = folders / "team" / "unforget.toml"
    policy.write_text(f"[verify]\ntarget = {json.dumps(['before', 'demo:3'])}\n")
    found = resolve({"model": "faces", "candidate": "x"}, policy=policy).target
    assert [path.name for path in found] == ["a.png", "b.png", "3.png"]
