"""What would be uploaded: the distributions that `python -m build` makes of this tree."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    made = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(made, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    return zipfile.ZipFile(*built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    return email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))))


def of_the_package() -> set[str]:
    files = (p.relative_to(ROOT) for p in (ROOT / "unforget").rglob("*") if p.is_file())
    return {f.as_posix() for f in files if "__pycache__" not in f.parts}


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    beside = {n for n in names if ".dist-info/" in n}
    assert names - beside == of_the_package()
    assert {n.partition("/")[2] for n in beside} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip


def test_the_sdist_builds_the_package_and_has_nothing_else(built):
    with tarfile.open(*built.glob("*.tar.gz")) as opened:
        names = {n.partition("/")[2] for n in opened.getnames()}
    beside = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert names - beside == of_the_package()


def test_the_index_takes_it(built):
    checked = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    assert subprocess.run(checked, capture_output=True, text=True, check=True).stdout.count("PASSED") == 2


def test_the_page_stands_alone(metadata):
    page = metadata.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 10
    for link in links:
        assert link.startswith(("https://", "#")), link
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    assert pictures
    for picture in pictures:
        assert picture.startswith("https://raw.githubusercontent.com/")
        assert (ROOT / picture.partition("/main/")[2]).is_file()
    assert {u.partition(",")[0] for u in metadata.get_all("Project-URL")} >= {"Source", "Documentation", "Changelog"}


def test_both_names_are_the_command(wheel):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == dict.fromkeys(("unforget", "unforget-diffusion"), "unforget.cli:main")


def test_relative_links_of_the_pages_lead_somewhere():
    for page in [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob(".github/*.md"),
        *ROOT.glob("examples/*/README.md"),
    ]:
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
