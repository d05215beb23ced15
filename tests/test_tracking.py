"""`--report-to`: what a tracker hears is what the log of the run holds."""

import json
import sys

import pytest
from accelerate import tracking
from conftest import PLANTED

from unforget.api import tracking as ours

SHORT = ["--max-train-steps", 2, "--retain-count", 8, "--sampler-steps", 2, "--num-validation-images", 1]


class Heard(tracking.GeneralTracker):
    """A tracker of our own, as accelerate lets people write them."""

    name, requires_logging_directory = "json", True
    rows, ended = [], []

    def __init__(self, run_name, logging_dir):
        super().__init__()

    @property
    def tracker(self):
        return self

    def log(self, values, step):
        print("tracker: a line of its own")  # as trackio does
        self.rows.append({"step": step, **values})

    def finish(self):
        self.ended.append(len(self.rows))


def test_a_tracker_hears_the_figures_of_each_update_and_the_end(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(ours.LOGGER_TYPE_TO_CLASS, "tensorboard", Heard)
    monkeypatch.setattr(ours, "find_spec", lambda name: True)
    monkeypatch.setattr(ours, "import_module", lambda name: None)
    done = cli("unlearn", "-m", "faces", "-t", PLANTED / "0.png", "-s", PLANTED / "1.png", "-o", "a.patch", *SHORT,
               "--report-to", "tensorboard", "--json")  # fmt: skip
    assert done.exit_code in (0, 1), done.output
    assert json.loads(done.stdout)["steps"] == 2 and "a line of its own" in done.stderr
    log = [json.loads(line) for line in (tmp_path / "a.run" / "metrics.jsonl").read_text().splitlines()]
    assert Heard.rows == [{k: v for k, v in row.items() if k != "of"} for row in log]
    assert Heard.ended == [2]


@pytest.mark.parametrize("when", ["__init__", "log", "finish"])
def test_a_tracker_that_fails_ends_no_run(cli, tmp_path, monkeypatch, when):
    class Failing(Heard):
        pass

    def fail(*args, **more):
        raise RuntimeError("no network\nto be had")

    monkeypatch.setattr(Failing, when, fail)
    monkeypatch.setitem(ours.LOGGER_TYPE_TO_CLASS, "tensorboard", Failing)
    monkeypatch.setattr(ours, "find_spec", lambda name: True)
    monkeypatch.setattr(ours, "import_module", lambda name: None)
    done = cli("unlearn", "-m", "faces", "-t", PLANTED / "0.png", "-s", PLANTED / "1.png", "-o", "a.patch", *SHORT,
               "--report-to", "tensorboard")  # fmt: skip
    assert done.exit_code in (0, 1), done.output
    assert done.stderr.count("tensorboard hears no more of this run: no network") == (when != "finish")
    assert len((tmp_path / "a.run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_does_not_open_is_told_before_the_work(cli, tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("import something_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delitem(sys.modules, name, raising=False)
    done = cli("unlearn", "-m", "faces", "-t", PLANTED / "0.png", "-o", "a.patch", "--report-to", name)
    assert done.exit_code == 3
    assert "something_that_is_not_there" in done.stderr
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_told_before_the_work(cli, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    done = cli("unlearn", "-m", "faces", "-t", PLANTED / "0.png", "-o", "a.patch", "--report-to", name)
    assert done.exit_code == 3
    assert f"pip install {name}" in done.stderr
    assert not list(tmp_path.iterdir())
