"""The policy file, and what beats what."""

import datetime
import os
from pathlib import Path

import pytest

from unforget.config import VerifyConfig, read_policy, resolve
from unforget.errors import UsageError
from unforget.verification.probes import suite

GIVEN = {"model": "faces", "patch": "x.patch"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="unforget.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_without_a_policy_the_defaults_hold(here):
    config = resolve(GIVEN)
    assert (config.level, config.max_rate, config.confidence) == ("standard", 0.005, 0.95)
    assert config.similarity == ("pixels", "structure")


def test_options_beat_the_configuration_which_beats_the_policy_which_beats_the_level(here):
    here('[verify]\nlevel = "quick"\ndraws = 20\nmax_drift = 0.2\nmin_kept = 0.7\n')
    file = here("max_drift = 0.1\nmin_kept = 0.9\n", "run.toml")
    config = resolve({**GIVEN, "min_kept": 0.5}, file)
    assert (config.max_rate, config.draws, config.max_drift, config.min_kept) == (0.03, 20, 0.1, 0.5)


def test_a_level_holds_for_whoever_writes_python(here):
    assert VerifyConfig(**GIVEN, level="quick").max_rate == 0.03
    assert VerifyConfig(**GIVEN, level="quick", max_rate=0.1).max_rate == 0.1


def test_a_patch_is_held_to_less_drift_than_a_folder_that_may_be_trained_again(here):
    assert resolve(GIVEN).max_drift == 0.15
    assert resolve({"model": "faces", "candidate": "x"}).max_drift == 0.5
    here("[verify]\nmax_drift = 0.2\n")
    assert resolve(GIVEN).max_drift == 0.2


def test_it_may_stand_in_pyproject(here):
    here('[project]\nname = "x"\n[tool.unforget.verify]\nmax_rate = 0.01\n', "pyproject.toml")
    assert resolve(GIVEN).max_rate == 0.01
    here("[verify]\nmax_rate = 0.03\n")
    assert resolve(GIVEN).max_rate == 0.03


def test_a_pyproject_that_says_nothing_is_no_policy(here):
    here('[project]\nname = "x"\n[tool.ruff]\nline-length = 100\n', "pyproject.toml")
    assert read_policy(None) == {}


@pytest.mark.parametrize("said", ["tool = 5", 'tool = "unforget"', "[[tool]]\nunforget = 1"])
def test_a_pyproject_without_a_table_of_tools_is_no_policy(here, said):
    here(said, "pyproject.toml")
    assert resolve(GIVEN).level == "standard"


@pytest.mark.parametrize("said", ["tool.unforget = 5", "[[tool.unforget]]\nverify = 1"])
def test_what_a_pyproject_has_for_us_is_a_table(here, said):
    here(said, "pyproject.toml")
    with pytest.raises(UsageError, match="no use for 'unforget'"):
        resolve(GIVEN)


def test_paths_are_relative_to_the_policy(here, tmp_path):
    path = here('[verify]\ntarget = ["a.png"]\nsurrogate = ["b.png"]\nretain_prompts = "p.txt"\n', "ci/unforget.toml")
    config = resolve(GIVEN, policy=path)
    assert config.target == (tmp_path / "ci" / "a.png",)
    assert config.retain_prompts == tmp_path / "ci" / "p.txt"
    assert resolve({**GIVEN, "target": ["c.png"]}, policy=path).surrogate == ()


def test_required_probes_run_whatever_the_level(here):
    here('[verify]\nlevel = "quick"\nrequire = ["quantization", "relearning"]\n')
    kinds = [p.kind for p in suite(resolve(GIVEN), prompted=False)]
    assert {"quantization", "relearning"} <= set(kinds)
    assert not {"noise_search", "replay"} & set(kinds)


def test_a_level_says_which_probes_run(here):
    assert "noise_search" not in [p.kind for p in suite(resolve(GIVEN), prompted=False)]
    assert [p.kind for p in suite(resolve({**GIVEN, "level": "deep"}), prompted=False)][-2:] == [
        "noise_search",
        "relearning",
    ]


def test_a_required_probe_that_does_not_exist_is_refused_by_the_command(here, cli):
    said = cli("verify", "--model", "faces", "--patch", here("", "x.patch"), "--require", "magic")
    assert said.exit_code == 2
    assert "no probe 'magic'" in said.stderr


def test_backends_are_named_as_on_the_command_line(here):
    here('[verify]\nsimilarity = ["pixels", "sscd=model.onnx"]\n')
    assert resolve(GIVEN).similarity == ("pixels", "sscd=model.onnx")


ENTRY = '[[verify.allow]]\nid = "{id}"\nreason = "{reason}"\nexpires = {expires}\n'


def test_an_allow_list_entry_has_an_id_a_reason_and_a_day(here):
    here(ENTRY.format(id="0" * 16, reason="ticket 7", expires="2027-01-31"))
    (entry,) = resolve(GIVEN).allow
    assert (entry.reason, entry.expires) == ("ticket 7", datetime.date(2027, 1, 31))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[verify]\nmax_rat = 1\n", "no option 'max_rat', did you mean 'max_rate'"),
        ("[verify]\nmax_rate = 2\n", "less than 1"),
        ('[verify]\nlevel = "thorough"\n', "'quick', 'standard' or 'deep'"),
        ('[verify]\nsimilarity = ["magic"]\n', "no similarity backend 'magic'"),
        ("[verify]\nsimilarity = []\n", "at least 1"),
        ("[verfy]\n", "no use for 'verfy'"),
        ("verify = 3\n", "no use for 'verify'"),
        ("[verify]\nmax-rate = 0.9\nmax_rate = 0.1\n", "given twice"),
        ('[verify]\nmust_retain = ["a\\u0000"]\n', "holds a NUL"),
        ("[verify\n", "cannot read"),
        (ENTRY.format(id="zz", reason="x", expires="2027-01-31"), "allow.0.id"),
        (ENTRY.format(id="0" * 16, reason="", expires="2027-01-31"), "allow.0.reason"),
        (ENTRY.format(id="0" * 16, reason="x", expires='"soon"'), "allow.0.expires"),
        ("[verify]\nsurrogate = ['a.png']\n", "0 target(s) but 1 surrogate(s)"),
        ("[verify]\ntimestep = [0]\n", "timestep.0: input should be greater than 0"),
    ],
)
def test_a_wrong_policy_is_refused_in_one_sentence(here, text, sentence):
    path = here(text)
    with pytest.raises(UsageError) as error:
        resolve(GIVEN, policy=path)
    assert sentence in error.value.message, error.value.message


def test_a_policy_that_was_named_must_exist(here, tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        resolve(GIVEN, policy=tmp_path / "no.toml")


def test_what_a_policy_requires_must_be_given(here):
    here('[verify]\nrequire = ["replay"]\n')
    with pytest.raises(UsageError, match="--replay-seed"):
        resolve(GIVEN)
    assert resolve({**GIVEN, "replay_seed": 3}).require == ("replay",)


def test_the_example_policy_is_one_with_the_figures_that_are_the_default():
    given = {"model": "faces", "patch": ("x.patch",)}
    example = resolve(given, None, Path(__file__).parents[1] / "examples" / "ci" / "unforget.toml")
    figures = {"level", "max_rate", "confidence", "false_positive_rate", "timestep", "max_drift", "min_kept"}
    assert example.model_dump(include=figures) == VerifyConfig(**given).model_dump(include=figures)


@pytest.mark.parametrize("lies", [os.mkfifo, Path.mkdir])
def test_settings_that_are_no_file_keep_nobody_waiting(tmp_path, lies):
    lies(tmp_path / "a.toml")
    with pytest.raises(UsageError, match="it is no file"):
        resolve({"model": "faces", "patch": ["x.patch"]}, None, tmp_path / "a.toml")
    with pytest.raises(UsageError, match="it is no file"):
        resolve({"model": "faces", "patch": ["x.patch"]}, tmp_path / "a.toml", None)
