"""`doctor` and `models`: what is here, said by the package's own metadata and rows."""

import json
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from unforget import families
from unforget.cli import doctor
from unforget.core import devices


def test_doctor_finds_what_the_package_asks_for_and_tells_no_token(cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    for more in ([], ["--json"]):
        shown = cli("doctor", *more)
        assert shown.exit_code == 0, shown.output
        assert "hf_abc" not in shown.output
    found = json.loads(shown.stdout)
    assert found["hub"]["token"] is True and found["hub"]["offline"] is True
    assert set(found["libraries"]) == {r.name for r in map(Requirement, requires(doctor.PACKAGE)) if not r.marker}
    assert all(package["ok"] for package in found["libraries"].values())
    assert {"8bit", "sscd", "face"} <= set(found["extras"])
    assert 0 < found["devices"]["cpu"]["free_gib"] <= found["devices"]["cpu"]["memory_gib"]


@pytest.mark.parametrize("asked", ["torch>=99", "no-such-package>=1"])
def test_what_nothing_runs_without_is_named(cli, monkeypatch, asked):
    monkeypatch.setattr(doctor, "requires", lambda name: [asked, 'neither-this>=1; extra == "more"'])
    shown = cli("doctor")
    assert shown.exit_code == 3
    name, _, wanted = asked.partition(">=")
    assert f", wanted is >={wanted}" in shown.stderr and shown.stderr.startswith(name)
    assert "neither-this missing" in shown.stdout


def test_a_library_that_cannot_be_imported_is_found(cli, monkeypatch):
    def broken():
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(devices, "there", broken)
    shown = cli("doctor", "--json")
    assert shown.exit_code == 3
    assert json.loads(shown.stdout)["wrong"] == [
        "devices: ImportError: libcudart.so.12: cannot open shared object file"
    ]


def test_models_lists_every_name(cli):
    found = json.loads(cli("models", "--json").stdout)["families"]
    assert [family["family"] for family in found] == [spec.name for spec in families.FAMILIES]
    names = {model["name"]: model for family in found for model in family["names"]}
    assert set(names) == {*families.EMBEDDED, *families.HUB_ALIASES}
    assert all(names[name]["memory_gib"] > 0 for name in families.EMBEDDED)
    page = cli("models").stdout
    assert all(f"  {name} " in page for name in names)
