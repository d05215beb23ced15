"""Candidates that must not pass, and what catches each; an honest patch and the oracle must pass.

Fewer draws than by default. `examples/benchmark/cheats.py` runs them at full size; docs/verify.md says what each
teaches.
"""

import sys
from pathlib import Path

import pytest
from conftest import DATA, PLANTED

from unforget.config import VerifyConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmark"))
import cheats

pytestmark = pytest.mark.slow

SMALL = {"max_rate": 0.02, "samples": 400, "paired": 64, "controls": 24, "draws": 16, "sampler_steps": 10}
CAUGHT = {
    "the_base_itself": {"reconstruct", "sample"},
    "weights_towards_noise": {"retention"},
    "blurs": {"retention"},
    "always_draws_the_surrogate": {"retention"},
    "patched_for_another_image": {"reconstruct"},
    "forgets_only_at_t_250": {"reconstruct", "sample"},
    "forgets_only_under_the_tested_seeds": {"reconstruct"},
    "a_fifth_of_the_change": {"reconstruct"},
    "vanishes_in_bf16": {"quantization"},
    "forgets_every_neighbour": {"neighbours"},
    "still_draws_the_mirror_image": {"transforms"},
    "moves_it_by_a_pixel": {"sample"},
    "draws_it_turned": {"transforms"},
    "draws_it_upside_down": {"transforms"},
    "draws_it_in_other_colours": {"transforms"},
    "draws_it_in_a_collage": {"transforms"},
    "draws_it_before_another_background": {"transforms"},
    "draws_it_by_ancestral_sampling_only": {"sample"},
    "forgets_only_at_the_usual_timesteps": {"reconstruct"},
    "a_mush_in_its_place": {"reconstruct"},
    "another_base_model": {"retention"},
}
ONLY = {"vanishes_in_bf16", "still_draws_the_mirror_image", "forgets_every_neighbour", "draws_it_in_a_collage"}
"""Those that nothing but the probe made for them catches."""


@pytest.fixture(scope="module")
def honest(work):
    return cheats.honest(work / "face.patch", DATA / "surrogate.png")


@pytest.fixture(scope="module")
def config(work):
    return VerifyConfig(
        model="faces", patch=work / "face.patch", target=(PLANTED / "0.png",), surrogate=(DATA / "surrogate.png",),
        **SMALL,
    )  # fmt: skip


def failed(report) -> set[str]:
    return {c.probe for c in report.checks if c.outcome == "failed"}


@pytest.mark.parametrize("cheat", cheats.CHEATS, ids=lambda c: c.__name__)
def test_it_does_not_pass(honest, config, cheat):
    if CAUGHT[cheat.__name__] & {"sample", "transforms"}:  # rates: draw as long as it takes
        # Those that are cunning in half of the draws alone come up half as often.
        seldom = {"max_rate": 0.005} if "ancestral" in cheat.__name__ else {}
        config = config.model_copy(update={"samples": None, **seldom})
    if cheat.__name__ not in ONLY:
        config = config.model_copy(update={"level": "quick", "require": tuple(CAUGHT[cheat.__name__])})
    report = cheats.judge(honest, cheat, config)
    assert report.exit_code == 1, report.summary
    assert failed(report) >= CAUGHT[cheat.__name__]
    if cheat.__name__ in ONLY:
        assert failed(report) == CAUGHT[cheat.__name__]


@pytest.mark.parametrize("case", cheats.SOUND, ids=lambda c: c.__name__)
def test_it_passes(honest, config, case):
    report = cheats.judge(honest, case, config)
    assert report.exit_code == 0, (report.summary, failed(report))


def test_one_that_forgets_only_in_the_words_of_the_test_does_not_pass():
    flags, config = cheats.flags()
    config = config.model_copy(update={**SMALL, "paired": 24, "max_rate": 0.1})
    report = cheats.judge(flags, cheats.forgets_only_under_the_tested_prompt, config)
    assert report.exit_code == 1
    assert "paraphrase" in failed(report)
    (caught, *_) = [c for c in report.checks if c.probe == "paraphrase" and c.outcome == "failed"]
    assert caught.variant != cheats.PROMPT
    assert caught.base >= 0.5
