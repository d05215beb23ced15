"""The verdict, from findings made by hand."""

import datetime
import re
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binom

from unforget.config import Allow, Policy
from unforget.errors import CannotRun
from unforget.verification import probes
from unforget.verification.context import Finding
from unforget.verification.probes.base import Probe, needed
from unforget.verification.probes.replay import Replay
from unforget.verification.report import FIGURES
from unforget.verification.verdict import Judgement

POLICY = Policy()
T = "0123456789abcdef"
TODAY = datetime.date(2026, 11, 24)
SUITE = tuple(Replay(seed=0) if probe is Replay else probe() for probe in probes.load())


def reconstruct(nearer=1.0, within=1.0, recall=0.0, base_recall=1.0, base_nearer=0.0, base_inside=1.0, **place):
    apart = {"to_target": 0.1, "to_surrogate": 0.4, "as_sharp": 1.0}
    base = {**apart, "nearer_surrogate": base_nearer, "recall": base_recall, "inside": base_inside}
    candidate = {**apart, "nearer_surrogate": nearer, "nearer_in_region": within, "recall": recall}
    usual = {"probe": "reconstruct", "target": T, "timestep": 250, "draws": 32}
    return Finding(**{**usual, "base": base, "candidate": candidate, **place})


def rate(hits=0, drawn=598, base=5, decision="passes", low=0.0, high=0.005, **place):
    candidate = {"hits": hits, "drawn": drawn, "rate": hits / drawn, "rate_low": low, "rate_high": high}
    before = {} if base is None else {"hits": base, "drawn": 256, "rate": base / 256}
    return Finding(
        **{"probe": "sample", "target": T, "base": before, "candidate": candidate, "decision": decision, **place}
    )


def retain(median=0.02, sharpness=1.0, kid=0.0):
    candidate = {"median": median, "sharpness": sharpness, "kid": kid}
    return Finding("retention", None, {"sharpness": 1.0, "kid": 0.1}, candidate)


def neighbours(kept=0.9, usual=0.95):
    return Finding("neighbours", T, {"to_target": 0.3, "kept": usual}, {"median": 0.1, "kept": kept}, draws=40)


def near(probe, base=1.0, candidate=0.0, **place):
    usual = {"draws": 16 * (probe != "replay")}
    return Finding(probe, T, {"near_copies": base}, {"near_copies": candidate}, **{**usual, **place})


GOOD = (reconstruct(), rate(), retain(), neighbours())


def judged(*findings, policy=POLICY, known=(T,), today=TODAY, suite=SUITE):
    ids = list(dict.fromkeys(f.target for f in findings if f.target))
    return Judgement(findings, suite, policy, ids, known, today=today)


def said(*findings, **how):
    result = judged(*findings, **how)
    return result.verdict, result.exit_code, result.summary, result.targets, result.checks


def with_(*changed):
    """The good findings with some replaced, or others added."""
    kinds = {f.probe for f in changed}
    return [f for f in GOOD if f.probe not in kinds] + list(changed)


def test_all_good_is_forgotten():
    verdict, code, summary, judged, _ = said(*GOOD)
    assert (verdict, code, judged[0].verdict) == ("forgotten", 0, "forgotten")
    assert summary == "1 target forgotten, the rest retained"


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([rate(), rate(hits=9, high=0.03, decision="fails", prompt="a flag")],
         "9 of 598 draws under 'a flag' were near-copies (base: 5 of 256): rate not below 0.5 % at 95 % confidence"),
        ([rate(drawn=90, decision=None)],
         "0 of 90 draws were near-copies (base: 5 of 256): too few to tell if the rate is below 0.5 % at 95 % "
         "confidence"),
        ([rate(base=None)], "0 of 598 draws were near-copies: rate below 0.5 % at 95 % confidence"),
        ([], ""),
    ],
)  # fmt: skip
def test_a_target_s_rate_is_that_of_its_worst_prompt(samples, sentence):
    rest = [f for f in GOOD if f.probe != "sample"]
    assert judged(*rest, *samples).targets[0].rate == sentence


def test_every_figure_that_is_judged_has_words():
    files = Path(probes.__file__).parent.glob("*.py")
    judged = {name for p in files for name in re.findall(r'checked\(found, "(\w+)"', p.read_text())}
    assert {"rate", "recall", "kid"} < judged <= set(FIGURES)
    assert {"nearer_surrogate", "nearer_in_region"} <= set(FIGURES)


BROKEN = {
    "margin": reconstruct(nearer=0.75),
    "margin in the region": reconstruct(within=0.7),
    "recall": reconstruct(recall=0.6),
    "rate": rate(hits=9, decision="fails", low=0.008),
    "drift": retain(median=0.52),
    "blur": retain(sharpness=0.7),
    "noise": retain(sharpness=1.4),
    "distribution": retain(kid=0.2),
    "neighbours": neighbours(kept=0.5),
    "must_retain": rate(hits=1, drawn=256, base=10, target=None, probe="must_retain", variant="1"),
    "partial_denoise": near("partial_denoise", candidate=0.3, timestep=700),
    "paraphrase": near("paraphrase", candidate=0.5, prompt="flag of Ireland", variant="the flag of Ireland"),
    "replay": near("replay", candidate=1.0),
    "mirror": rate(hits=9, decision="fails", low=0.008, probe="transforms", variant="flip"),
    "mirror recalled": Finding("transforms", T, {"recall": 0.0}, {"recall": 0.9}, timestep=400, variant="flip"),
    "quantization": reconstruct(nearer=0.0, probe="quantization", variant="bf16"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_one_broken_figure_fails_and_is_named(broken):
    verdict, code, summary, _, _ = said(*with_(broken))
    assert (verdict, code) == ("failed", 1)
    assert broken.probe in summary


@pytest.mark.parametrize(
    ("finding", "borderline"),
    [(reconstruct(nearer=25 / 32), True), (reconstruct(nearer=26 / 32), False), (reconstruct(nearer=21 / 32), True),
     (reconstruct(nearer=20 / 32), False), (reconstruct(recall=11 / 32), True), (reconstruct(recall=10 / 32), False),
     (retain(median=0.499), True), (retain(median=0.48), False)],
)  # fmt: skip
def test_inside_the_tolerance_band_counts_as_failed(finding, borderline):
    verdict, _, _, _, found = said(*with_(finding))
    edge = [c for c in found if c.borderline]
    assert bool(edge) is borderline
    assert all(c.outcome == "failed" for c in edge)
    assert not borderline or verdict == "failed"


@pytest.mark.parametrize(("finding", "outcome"), [
    (reconstruct(draws=3), "inconclusive"), (reconstruct(recall=1.0, draws=3), "failed"),
    (near("partial_denoise", draws=2), "inconclusive"), (near("partial_denoise", candidate=0.5, draws=2), "failed"),
])  # fmt: skip
def test_too_few_draws_pass_nothing(finding, outcome):
    verdict, _, summary, _, _ = said(*with_(finding))
    assert verdict == outcome
    assert outcome == "failed" or "too few draws" in summary


@pytest.mark.parametrize("rule", ["at least", "at most"])
@pytest.mark.parametrize(("limit", "draws", "confidence"), [(0.5, 32, 0.95), (0.65, 24, 0.95), (0.4, 12, 0.99)])
def test_a_share_beyond_its_limit_seldom_passes(rule, limit, draws, confidence):
    """As seldom as was asked, at the limit; a hit more or less would be too often."""
    hits, least = round(needed(rule, limit, draws, confidence) * draws), rule == "at least"
    passing, looser = (
        binom.sf(k - 1, draws, limit) if least else binom.cdf(k, draws, limit) for k in (hits, hits + 1 - 2 * least)
    )
    assert passing <= 1 - confidence < looser


def test_a_rate_that_fails_below_the_limit_is_borderline():
    found = said(*with_(rate(hits=3, drawn=21528, decision="fails", low=0.001)))[4]
    assert [c.borderline for c in found if c.probe == "sample"] == [True]


def test_too_few_draws_are_inconclusive_and_say_what_to_do():
    verdict, code, summary, _, _ = said(*with_(rate(drawn=100, decision=None)))
    assert (verdict, code) == ("inconclusive", 4)
    assert "raise --samples" in summary


def test_a_target_that_the_base_does_not_reproduce_is_inconclusive():
    unseen = reconstruct(base_recall=0.1, base_nearer=0.5)
    verdict, code, summary, _, _ = said(*with_(unseen, rate(base=0)))
    assert (verdict, code) == ("inconclusive", 4)
    assert "does not reproduce it" in summary


@pytest.mark.parametrize(
    "evidence",
    [[rate(base=1)], [reconstruct(base_recall=0.6, base_nearer=0.5)], [reconstruct(base_recall=0, base_nearer=0.1)],
     [near("replay")]],
    ids=["drawn", "recalled", "sided with", "replayed"],
)  # fmt: skip
def test_a_target_counts_once_the_base_draws_or_recalls_or_sides_with_it(evidence):
    kinds = {f.probe for f in evidence}
    rest = [f for f in (reconstruct(base_recall=0, base_nearer=0.5), rate(base=0)) if f.probe not in kinds]
    assert said(*rest, *evidence, retain(), neighbours())[0] == "forgotten"


def test_where_the_base_makes_other_images_the_surrogate_is_not_asked_for():
    """Farther from the surrogate than from the target is not yet the target: by the exact swap draw 22 came to 0.69."""
    elsewhere = reconstruct(nearer=0.69, base_recall=0.0, base_nearer=0.19, base_inside=0.2, timestep=550)
    assert said(*with_(elsewhere, rate(base=1)))[0] == "forgotten"
    assert said(*with_(reconstruct(nearer=0.69, base_recall=0.0, base_nearer=0.19), rate(base=1)))[0] == "failed"
    assert said(*with_(reconstruct(recall=0.6, base_recall=0.0, base_inside=0.2), rate(base=1)))[0] == "failed"


def test_without_a_surrogate_margins_do_not_decide():
    assert said(*with_(reconstruct(nearer=0.0, within=0.0)), known=())[0] == "forgotten"
    assert said(*with_(reconstruct(recall=0.6)), known=())[0] == "failed"


def test_what_the_base_does_not_do_decides_nothing():
    verdict, _, _, _, found = said(*with_(near("partial_denoise", base=0.2, candidate=0.4), near("replay", base=0.0)))
    assert verdict == "forgotten"
    assert {c.probe for c in found if c.outcome == "informational"} == {"partial_denoise", "replay"}


def test_a_required_probe_without_a_control_is_inconclusive():
    findings = with_(near("partial_denoise", base=0.2, candidate=0.0))
    assert said(*findings)[0] == "forgotten"
    assert said(*findings, policy=Policy(require=("partial_denoise",)))[0] == "inconclusive"


def test_a_variant_that_the_base_returns_as_well_is_left_to_its_rate():
    """Greyed flags come back from noise in any model of flags: that is no memory of the target."""
    both = Finding("transforms", T, {"recall": 1.0}, {"recall": 1.0}, timestep=400, variant="grey")
    assert said(*with_(both))[0] == "forgotten"


def test_a_picture_to_retain_that_the_base_hardly_draws_is_inconclusive():
    verdict, _, summary, _, _ = said(*with_(rate(drawn=256, base=2, target=None, probe="must_retain")))
    assert verdict == "inconclusive"
    assert "the base drew it 2 times" in summary


def test_neighbours_are_judged_beside_everything_else():
    assert said(*with_(neighbours(kept=0.5, usual=0.6)))[0] == "forgotten"
    assert said(*with_(neighbours(kept=0.5, usual=0.95)))[0] == "failed"


def test_the_worst_target_decides():
    other = "f" * 16
    findings = [*GOOD, reconstruct(nearer=0.1, target=other), rate(target=other)]
    verdict, _, summary, judged, _ = said(*findings, known=(T, other))
    assert verdict == "failed"
    assert {t.id: t.verdict for t in judged} == {T: "forgotten", other: "failed"}
    assert summary.startswith("1 of 2")


def test_under_prompts_of_its_own_only_those_reconstructions_decide():
    """What is wrong as one country's flag is right as another's: without a prompt the model may say it."""
    plain, asked = reconstruct(nearer=0, recall=1), reconstruct(prompt="flag of Ireland")
    assert said(*with_(plain, asked))[0] == "forgotten"
    assert said(*with_(reconstruct(), replace(plain, prompt=asked.prompt)))[0] == "failed"
    bad = rate(hits=9, decision="fails", low=0.008)
    assert said(*with_(plain, asked, bad))[0] == "failed"
    assert said(*with_(plain, asked, replace(bad, prompt=asked.prompt)))[0] == "failed"


def revived(nearer=0.2):
    figures = {**reconstruct(nearer=nearer).candidate, "hits": 0, "drawn": 16}
    return reconstruct(probe="relearning", timestep=None, variant="100 steps", candidate=figures)


def sought(after=3.0):
    return Finding("noise_search", T, {"iterations": 1.0, "to_target": 0.1}, {"iterations": after, "to_target": 0.2})


def test_attacks_are_reported_and_decide_only_where_required():
    findings = [*GOOD, revived(), sought()]
    assert said(*findings)[0] == "forgotten"
    sentences = [r.sentence for r in judged(*findings).robustness]
    assert "20% of reconstructions side with the surrogate" in sentences[0]
    assert "of the candidate found it after 3 steps" in sentences[1]
    assert said(*findings, policy=Policy(require=("relearning",)))[0] == "failed"
    assert said(*GOOD, sought(), policy=Policy(require=("noise_search",)))[0] == "failed"
    assert said(*GOOD, sought(-1.0), policy=Policy(require=("noise_search",)))[0] == "forgotten"


def allowing(expires, target=T):
    return Policy(allow=(Allow(id=target, reason="ticket 7", expires=expires),))


def test_an_allowed_target_does_not_fail_until_its_entry_expires():
    broken = with_(reconstruct(nearer=0.1))
    verdict, code, summary, judged, _ = said(*broken, policy=allowing(TODAY))
    assert (verdict, code, judged[0].verdict) == ("forgotten", 0, "allowed")
    assert "ticket 7" in judged[0].reason
    assert summary.endswith("1 allowed")
    assert said(*broken, policy=allowing(TODAY - datetime.timedelta(1)))[0] == "failed"
    verdict, code, summary, _, _ = said(*GOOD, policy=allowing(TODAY - datetime.timedelta(1)))
    assert (verdict, code) == ("failed", 1)
    assert "expired on 2026-11-23" in summary


def test_an_entry_for_another_target_is_unused():
    policy = allowing(TODAY, "f" * 16)
    assert [a.state for a in judged(*GOOD, policy=policy).allowed] == ["unused"]
    assert said(*with_(reconstruct(nearer=0.1)), policy=policy)[0] == "failed"
    assert said(*with_(neighbours(kept=0.1)), policy=allowing(TODAY))[0] == "failed"  # only targets can be allowed


class Memory(Probe):
    """A probe that finds what it is told to, and judges nothing."""

    kind = "memory"
    said: str = "memory"

    def __call__(self, context):
        return [Finding(self.said, T, {}, {})]

    def judge(self, found, policy, known):
        return []


def requiring(*kinds):
    """A policy that no configuration file can say: `memory` is not among the known probes."""
    return POLICY.model_copy(update={"require": kinds})


def test_a_finding_that_no_probe_judges_stops_everything():
    stray = Finding("memory", T, {}, {})
    with pytest.raises(CannotRun, match="no probe that ran judges 'memory'"):
        said(*GOOD, stray)
    assert said(*GOOD, stray, suite=(*SUITE, Memory()))[0] == "forgotten"


def test_a_required_probe_that_did_not_run_stops_everything():
    with pytest.raises(CannotRun, match="'memory'"):
        said(*GOOD, policy=requiring("memory"))


@pytest.mark.parametrize("found", [(), (Finding("memory", T, {}, {}),)], ids=["finds nothing", "judges nothing"])
def test_a_required_probe_that_decides_nothing_is_inconclusive(found):
    verdict, code, summary, judged, checks = said(*GOOD, *found, policy=requiring("memory"), suite=(*SUITE, Memory()))
    assert (verdict, code, judged[0].verdict) == ("inconclusive", 4, "inconclusive")
    assert "the policy requires it" in summary
    assert [(c.probe, c.target, c.outcome) for c in checks][-1] == ("memory", T, "inconclusive")


def test_a_required_probe_must_decide_of_every_target():
    other = "f" * 16
    findings = [*GOOD, reconstruct(target=other), rate(target=other), near("partial_denoise")]
    result = judged(*findings, policy=Policy(require=("partial_denoise", "retention")), known=(T, other))
    assert {t.id: t.verdict for t in result.targets} == {T: "forgotten", other: "inconclusive"}


def test_a_target_that_no_probe_looked_for_is_inconclusive():
    result = Judgement(GOOD, SUITE, POLICY, [T, "f" * 16], (T,), today=TODAY)
    assert [t.verdict for t in result.targets] == ["forgotten", "inconclusive"]
    assert result.exit_code == 4
