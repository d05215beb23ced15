"""The verdict, from findings made by hand."""

import json
from dataclasses import replace

import pytest

from unforget.config import VerifyConfig
from unforget.probes import Finding
from unforget.report import EXIT, checks, judge

CONFIG = VerifyConfig(model="faces", patch="x.patch")


def reconstruct(nearer=1.0, base_copies=1.0, copies=0.0, target="t"):
    base = {"to_target": 0.1, "to_surrogate": 0.4, "nearer_surrogate": 0.0, "near_copies": base_copies}
    patched = {"to_target": 0.4, "to_surrogate": 0.1, "nearer_surrogate": nearer, "near_copies": copies}
    return Finding("reconstruct@250", target, base, patched)


def sample(base=5, hits=0, target="t", probe="sample"):
    return Finding(probe, target, {"hits": base}, {"hits": hits})


def retain(median=0.02, sharpness=1.0):
    return Finding("retain", None, {"sharpness": 1.0}, {"median": median, "mean": 0.1, "sharpness": sharpness})


def look_alikes(kept=0.9):
    return Finding("look-alikes", "t", {"to_target": 0.3}, {"median": 0.1, "kept": kept})


def verdict(*changed: Finding, known=True):
    by_name = {f.probe: f for f in (reconstruct(), sample(), retain(), look_alikes())}
    findings = list({**by_name, **{f.probe: f for f in changed}}.values())
    found = checks(findings, CONFIG, surrogate_known=known)
    return judge(found, findings)


def test_all_good_is_forgotten():
    said, targets, _ = verdict()
    assert (said, targets, EXIT[said]) == ("forgotten", {"t": "forgotten"}, 0)


@pytest.mark.parametrize(
    "broken",
    [
        reconstruct(nearer=0.79),
        reconstruct(copies=0.04),
        sample(hits=1),
        retain(median=0.081),
        retain(sharpness=0.7),
        retain(sharpness=1.4),
        look_alikes(kept=0.5),
        sample(base=10, hits=5, target=None, probe="keep-0"),
    ],
    ids=lambda f: f.probe,
)
def test_one_broken_figure_fails_and_is_named(broken):
    said, _, summary = verdict(broken)
    assert (said, EXIT[said]) == ("failed", 1)
    assert broken.target == "t" or broken.probe in summary


def test_a_target_that_the_base_does_not_reproduce_is_inconclusive():
    said, _, summary = verdict(reconstruct(base_copies=0.1), sample(base=0))
    assert (said, EXIT[said]) == ("inconclusive", 4)
    assert "base does not reproduce" in summary


def test_a_target_that_the_base_draws_counts_even_if_it_does_not_reconstruct_it():
    assert verdict(reconstruct(base_copies=0.1), sample(base=1))[0] == "forgotten"


def test_without_a_surrogate_near_copies_decide():
    assert verdict(reconstruct(nearer=0.0), known=False)[0] == "forgotten"
    assert verdict(reconstruct(copies=0.1), known=False)[0] == "failed"


def test_a_kept_picture_that_the_base_hardly_draws_is_not_judged():
    findings = [sample(base=2, hits=0, target=None, probe="keep-0")]
    assert checks(findings, CONFIG, surrogate_known=True)[0].outcome == "inconclusive"
    assert verdict(*findings)[0] == "forgotten"


def test_the_worst_target_decides():
    findings = [reconstruct(), sample(), reconstruct(nearer=0.1, target="u"), sample(target="u"), retain()]
    said, targets, summary = judge(checks(findings, CONFIG, surrogate_known=True), findings)
    assert said == "failed"
    assert targets == {"t": "forgotten", "u": "failed"}
    assert summary.startswith("1 of 2")


def test_checks_are_plain_json():
    found = checks([reconstruct()], CONFIG, surrogate_known=True)
    assert [json.loads(c.model_dump_json())["rule"] for c in found] == ["at most", "at least"]


def test_under_prompts_of_its_own_only_those_reconstructions_decide():
    """What is wrong as one country's flag is right as another's: without a prompt the model may say it."""
    plain, asked = (replace(reconstruct(nearer=n, copies=1 - n), probe=p) for n, p in (
        (0.0, "reconstruct@250"), (1.0, "reconstruct@250 'flag of Ireland'")))  # fmt: skip
    assert verdict(plain, asked)[0] == "forgotten"
    assert verdict(asked, replace(plain, probe=asked.probe))[0] == "failed"
    assert verdict(plain, asked, sample(hits=1))[0] == "failed"
    assert verdict(plain, asked, sample(hits=1, probe="sample 'flag of Ireland'"))[0] == "failed"
