"""Probes on tiny models: what each is sensitive to, beside the stock pipelines where they do the same."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

from unforget import families
from unforget.config import Policy, VerifyConfig
from unforget.core import sampling
from unforget.core.metrics import pairwise_rms, rms
from unforget.core.types import Instance
from unforget.errors import UsageError
from unforget.files import images
from unforget.files.storage import digest
from unforget.verification import probes
from unforget.verification.context import Finding, VerifyContext, known_surrogate
from unforget.verification.near_copies import NearCopyDetector, Radius, calibrate, once
from unforget.verification.probes.base import Probe
from unforget.verification.probes.neighbours import Neighbours
from unforget.verification.probes.noise_search import NoiseSearch
from unforget.verification.probes.paraphrase import Paraphrase
from unforget.verification.probes.partial_denoise import PartialDenoise
from unforget.verification.probes.prompt_search import PromptSearch
from unforget.verification.probes.quantization import Quantization, quantized, rounded
from unforget.verification.probes.reconstruct import Reconstruct
from unforget.verification.probes.relearning import Relearning
from unforget.verification.probes.replaced import Replaced, what_is_shown
from unforget.verification.probes.resemblance import Resemblance
from unforget.verification.probes.retention import Retention
from unforget.verification.probes.sample import Sample
from unforget.verification.probes.transforms import Transforms, variants
from unforget.verification.similarity import SSCD, Pixels, Structure
from unforget.verification.variants import calibrate as calibrate_variants
from unforget.verification.variants import is_variant


def pictures(count, seed=0, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


SMALL = {"similarity": ("pixels",), "max_rate": 0.2, "paired": 16, "controls": 8, "sampler_steps": 4}


@pytest.fixture
def context(tiny):
    target, surrogate = pictures(2, 5).sign()  # far from what a network draws that has learnt nothing
    instances = (Instance(target, surrogate, "t"),)
    return VerifyContext(tiny, tiny.copy(), instances, Policy(**SMALL), candidate_digest="candidate")


# Calibration


def blobs(count):
    """Pictures that are one colour in one place: some are nearly alike."""
    g = torch.Generator().manual_seed(count)
    small = torch.rand(count, 3, 2, 2, generator=g) * 2 - 1
    return torch.nn.functional.interpolate(small, 16, mode="bilinear")


@pytest.mark.parametrize(
    ("count", "rate", "most"), [(24, 1e-3, 6e-3), (48, 1e-3, 4e-3), (200, 1e-3, 2e-3), (48, 0.05, 0.09)]
)
def test_so_few_of_other_pairs_lie_under_the_threshold(count, rate, most):
    shown, others = blobs(count), blobs(500)
    radius = calibrate(pairwise_rms(shown, shown), rate)
    apart = pairwise_rms(others, others)
    assert radius.pairs == count * (count - 1) // 2
    assert rate / 20 < float((apart[once(apart)] < radius.distance).float().mean()) < most


@pytest.mark.parametrize("rounding", [0.0, 1e-8, 1e-6])
def test_one_pair_that_is_alike_after_all_does_not_decide(rounding):
    shown = blobs(48)
    clean, twice = (pairwise_rms(s, s) for s in (shown, torch.cat([shown, shown[:1], shown[1:2] + 0.01])))
    twice[0, 48] = rounding  # what a processor says of one image and itself
    clean, found = (calibrate(distances, 1e-3).distance for distances in (clean, twice))
    assert 0.7 * clean < found <= clean


def test_two_pictures_tell_nothing():
    shown = blobs(2)
    assert calibrate(pairwise_rms(shown, shown), 1e-3).false_positive_rate == 1.0


def test_a_picture_that_the_model_repeats_does_not_teach_that_different_pictures_are_alike():
    single, repeated = pictures(40), pictures(1, 9) + 0.02 * torch.randn(12, 3, 16, 16)
    clean = calibrate(pairwise_rms(single, single), 0.001)
    shown = torch.cat([single, repeated])
    again = calibrate(pairwise_rms(shown, shown), 0.001)
    assert again == clean
    assert NearCopyDetector((Pixels(),), shown, 0.001).unrepeated.tolist() == [True] * 40 + [False] * 12


def test_a_backend_that_sees_nothing_says_nothing():
    distances = torch.full((8, 8), torch.nan)
    assert calibrate(distances, 0.01).pairs == 0


def test_a_near_copy_is_nearer_than_half_way_to_the_surrogate():
    shown, target = pictures(40), pictures(1, 3)[0]
    detector = NearCopyDetector((Pixels(),), shown, 0.01)
    surrogate = target + 0.2 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))
    (free, capped), (near, lowered) = detector.limits(target)[0], detector.limits(target, surrogate)[0]
    assert not capped
    assert lowered
    assert near < free
    assert near == pytest.approx(float(rms(target, surrogate)) / 2, rel=1e-5)
    assert detector.is_copy(detector.embed(torch.stack([target, surrogate])), target, surrogate).tolist() == [
        True,
        False,
    ]
    assert detector.is_copy(detector.embed(torch.stack([target, surrogate])), target).tolist() == [True, True]


def test_one_backend_that_sees_it_is_enough():
    detector = NearCopyDetector((Pixels(), Structure()), pictures(40, size=32), 0.001)
    grey = torch.zeros(3, 32, 32)
    grey[:, 8:24, 8:24] = torch.linspace(-0.5, 0.5, 16)
    paler = grey * 0.9 + 0.9  # far in pixels, the same drawing
    detector.radii = (Radius(0.3, 0.001, 1), Radius(0.2, 0.001, 1))
    assert float(rms(grey, paler)) > 0.5
    assert detector.is_copy(detector.embed(paler[None]), grey).tolist() == [True]


# What probes share


def test_both_models_start_from_the_same_noise_and_the_candidate_goes_on_with_its_own(context):
    base, candidate = (context.draws(which, (0,), 16).images for which in ("base", "candidate"))
    assert torch.equal(base, candidate)  # equal weights
    more = context.draws("candidate", (0,), 24)
    assert torch.equal(more.images[:16], candidate)
    for changed in ("candidate_digest", "nonce"):
        setattr(context, changed, "another")
        context._draws.clear()
        other = context.draws("candidate", (0,), 24).images
        assert torch.equal(other[:16], candidate)
        assert float(rms(other[16:], more.images[16:]).min()) > 0.1


def test_what_is_drawn_step_by_step_is_what_is_drawn_at_once(context):
    first = [context.draws("candidate", (0,), n) for n in (3, 20, 24)][-1].images
    context._draws.clear()
    torch.testing.assert_close(first, context.draws("candidate", (0,), 24).images, atol=0.01, rtol=0)


def test_the_control_is_read_from_the_cache_and_holds_figures_only(context, tmp_path, monkeypatch):
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path))
    probe = Reconstruct(timesteps=(400,), draws=4)
    context.cache, context.base_digest = True, "digest"
    (first,) = probe(context)
    kept = {p.name: p for p in tmp_path.iterdir()}
    assert {p.suffix for p in kept.values()} == {".json", ".safetensors"}
    assert [n for n in kept if n.endswith("safetensors")] == [n for n in kept if n.startswith("draws-")]
    assert all(json.loads(p.read_text()) for n, p in kept.items() if n.endswith("json"))
    context._draws.clear()
    context._figures.clear()
    context.base.denoise = None  # not asked again
    (again,) = probe(context)
    assert again.base == first.base
    assert again.candidate == first.candidate


def test_a_damaged_cache_is_made_again(context, tmp_path, monkeypatch):
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path))
    context.cache, context.base_digest = True, "digest"
    first = context.floor(400, 0)
    for path in tmp_path.iterdir():
        path.write_bytes(b"{")
    context._draws.clear()
    context._figures.clear()
    assert context.floor(400, 0) == first


def test_a_floor_of_zero_in_the_cache_is_not_believed(context, tmp_path, monkeypatch):
    """With it no image would ever count as recalled."""
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path))
    context.cache, context.base_digest = True, "digest"
    first, probe = context.floor(400, 0), Reconstruct(timesteps=(400,), draws=4)
    (found,) = probe(context)
    assert first > 0
    for path in tmp_path.glob("control-*"):
        entry = json.loads(path.read_text())
        path.write_text(json.dumps({**entry, "figures": dict.fromkeys(entry["figures"], 0.0)}))
    context._draws.clear()
    context._figures.clear()
    (again,) = probe(context)
    assert again.base == found.base
    assert context.floor(400, 0) == first


@pytest.mark.parametrize("changes", [
    {"retain_prompt_ids": (0, 0)}, {"seed": 1}, {"policy": {"false_positive_rate": 0.005}}, {"policy": {"controls": 9}},
    {"policy": {"paired": 17}}, {"policy": {"similarity": ("pixels", "structure")}}, {"policy": {"sampler_steps": 5}},
], ids=str)  # fmt: skip
def test_a_floor_is_keyed_by_all_that_made_it(context, tmp_path, monkeypatch, changes):
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path))
    context.cache, context.base_digest = True, "digest"
    context.floor(400, 0)
    if "policy" in changes:
        changes = {"policy": Policy(**{**SMALL, **changes["policy"]})}
    other = dataclasses.replace(context, **changes, _draws={}, _whole={}, _figures={})
    other.floor(400, 0)
    assert len(list(tmp_path.glob("control-*"))) == 2


def test_half_of_the_candidates_noise_is_its_own(context):
    probe = Reconstruct(draws=8)
    [(shared, usual)] = probe._noise(context, "base", 250)
    (first, same), (own, way) = probe._noise(context, "candidate", 250)
    assert torch.equal(shared[:4], first) and usual is same is None
    assert not any(torch.equal(a, b) for a in shared for b in own)
    assert float(way.timesteps[0]) == context.start(250)
    assert set(way.timesteps.tolist()) - set(context.base.sampling_timesteps(4))


def test_the_candidates_own_draws_take_ways_that_nobody_knew(context):
    """Timesteps by the nonce, every other group by ancestral sampling, and each as the plan counts it."""
    taken, denoise = [], context.candidate.denoise
    context.candidate.denoise = lambda x_t, **how: taken.append((len(x_t), how["steps"])) or denoise(x_t, **how)
    context.draws("candidate", (0,), 100)
    usual, *own = taken
    assert usual[0] == 16
    assert torch.equal(usual[1].timesteps, context.usual().timesteps)
    assert [count for count, _ in own] == [16, 32, 32, 4]
    assert [way.seeds is not None for _, way in own] == [False, True, False, True]
    assert len({tuple(way.timesteps.tolist()) for _, way in own}) == 4
    calls = sum(count * len(way.timesteps) for count, way in taken)
    assert context.drawn_passes(("candidate", (0,)), 0, 100) == calls
    before = [way.timesteps for _, way in own]
    context.nonce, context._draws = "another", {}
    taken.clear()
    context.draws("candidate", (0,), 100)
    assert not any(torch.equal(a, way.timesteps) for a, (_, way) in zip(before, taken[1:], strict=True))


# Each probe


def test_equal_models_differ_nowhere(context):
    context.candidate = context.base
    for probe in (Transforms(draws=4), PartialDenoise(draws=4), Retention(), Neighbours(draws=8)):
        for f in probe(context):
            free = {"drawn", "hits", "rate", "rate_high", "rate_low", "kid", "median", "to_target"}
            for name in set(f.base) & set(f.candidate) - free:
                assert f.base[name] == pytest.approx(f.candidate[name], abs=1e-5), (f.probe, f.variant, name)
    retained = [*Retention()(context), *Neighbours(draws=8)(context)]
    assert {f.candidate["median"] for f in retained} == {0}


def test_sampling_stops_when_the_rate_is_certain(context):
    (found,) = Sample()(context)
    assert (found.candidate["hits"], found.candidate["drawn"], found.decision) == (0, context.plan.shortest, "passes")
    context.policy = Policy(**SMALL, samples=5)
    (found,) = Sample()(context)
    assert (found.candidate["drawn"], found.decision) == (5, None)
    context.policy = Policy(**SMALL)
    picture = context.draws("candidate", (0,), 16).images[0]
    context.instances = (Instance(picture, picture, "t"),)
    context.candidate.denoise = lambda x, **how: picture.expand_as(x)
    context._draws.clear()
    (found,) = Sample()(context)
    assert found.decision == "fails"
    assert found.candidate["drawn"] == context.plan.looks[0].drawn


def test_neighbours_are_what_is_neither_target_nor_surrogate(context):
    context.detector.radii = (Radius(0.3, 0.01, 100),)
    (instance,), stranger = context.instances, pictures(1, 11)[0]
    made = torch.stack([instance.target, instance.surrogate, stranger, stranger])
    context.base.denoise = lambda x, **how: made[torch.arange(len(x)) % 4]
    context.candidate.denoise = lambda x, **how: made[torch.arange(len(x)) % 4 - 1]  # one in two strangers stays
    found = Neighbours(draws=8)._of(instance, context, 1.0, 1.0)
    assert found[0].candidate["seen"] == found[0].draws == 4
    assert found[0].candidate["kept"] == 0.5


def test_no_target_is_a_neighbour_of_another(context):
    context.detector.radii = (Radius(0.3, 0.01, 100),)
    (instance,), stranger = context.instances, pictures(1, 11)[0]
    twin = Instance(*pictures(2, 12), "twin")
    context.instances = (instance, twin)
    made = torch.stack([twin.target, twin.surrogate, stranger, stranger])
    context.base.denoise = lambda x, **how: made[torch.arange(len(x)) % 4]
    context.candidate.denoise = lambda x, **how: made[torch.arange(len(x)) % 4].roll(1, 0)
    found = Neighbours(draws=8)._of(instance, context, 1.0, 1.0)
    assert (found[0].draws, found[0].candidate["kept"]) == (4, 0.5)


@pytest.mark.parametrize(
    ("kept", "seen", "outcome"),
    [(12, 20, "failed"), (15, 20, "passed"), (2, 3, "informational")],
    ids=["more than half, by luck", "certainly more than half", "too few to tell"],
)
def test_neighbours_are_kept_if_it_is_certain(context, kept, seen, outcome):
    found = Finding("neighbours", "t", {"kept": 1.0}, {"kept": kept / seen}, draws=seen)
    (check,) = Neighbours().judge(found, context.policy, known=True)
    assert (check.outcome, check.borderline) == (outcome, outcome == "failed")


def test_drift_and_sharpness_pass_by_their_bounds(context):
    within = {"median": 0.1, "median_low": 0.05, "median_high": 0.14, "kid": 0.0}
    even = {"sharpness": 1.2, "sharpness_low": 1.1, "sharpness_high": 1.24}
    changes = {"sound": {}, "perhaps": {"median_high": 0.2}, "perhaps sharper": {"sharpness_high": 1.3},
               "over": {"median": 0.2, "median_high": 0.3}}  # fmt: skip
    failed = {}
    for name, change in changes.items():
        found = Finding("retention", None, {"kid": 0.1}, {**within, **even, **change})
        checks = Retention().judge(found, Policy(**SMALL, max_drift=0.15), known=True)
        failed[name] = [(c.figure, c.borderline) for c in checks if c.outcome != "passed"]
    assert failed == {
        "sound": [], "perhaps": [("median", True)], "perhaps sharper": [("sharpness", True)],
        "over": [("median", False)],
    }  # fmt: skip


def test_a_mirror_image_is_a_variant_unless_the_surrogate_is_it(context):
    context.detector.radii = (Radius(0.3, 0.01, 100),)
    target = context.instances[0].target
    assert {"flip", "crop", "turn", "colour", "grey"} == set(variants(target))
    assert torch.equal(variants(target)["flip"].flip(-1), target)
    context.instances = (Instance(target, target.flip(-1), "t"),)
    assert "flip" not in {f.variant for f in Transforms(draws=2)(context)}
    context.instances = (Instance(target, target, "t"),)
    assert known_surrogate(context.instances[0]) == []
    assert "flip" in {f.variant for f in Transforms(draws=2)(context)}


def test_the_candidate_finishes_what_the_base_began(context):
    torch.manual_seed(0)
    x = torch.randn(2, *context.base.latent_shape)
    levels = context.base.sampling_timesteps(4)
    half = context.base.denoise(x, steps=4, stop=levels[2])
    assert not torch.equal(half, x)
    whole = context.base.denoise(half, steps=4, start=levels[2])
    torch.testing.assert_close(whole, context.base.denoise(x, steps=4))


@pytest.mark.parametrize("stock", [DDIMPipeline, DDPMPipeline])
def test_replay_draws_what_the_stock_pipeline_draws(tiny, stock):
    if stock is DDIMPipeline:
        pipeline, name = DDIMPipeline(tiny.network, DDIMScheduler.from_config(tiny.scheduler_config)), None
    else:
        pipeline, name = DDPMPipeline(tiny.network, tiny.pipeline.scheduler), "DDPMScheduler"
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(generator=torch.Generator().manual_seed(7), num_inference_steps=5, output_type="np").images
    ours = tiny.replay(7, steps=5, scheduler=name, prompt_ids=torch.zeros(1, dtype=torch.long))
    shown = (tiny.decode(ours) + 1) / 2
    torch.testing.assert_close(shown[0].permute(1, 2, 0), torch.from_numpy(expected[0]), atol=1e-4, rtol=0)


def test_replay_under_a_prompt_draws_what_the_stock_pipeline_draws(sd3):
    row = sd3.prompt_ids(["a red square"])
    ours = sd3.decode(sd3.replay(7, steps=4, scheduler=None, prompt_ids=row))
    sd3.pipeline.set_progress_bar_config(disable=True)
    expected = sd3.pipeline(
        prompt="a red square", guidance_scale=sd3.guidance, num_inference_steps=4, height=16, width=16,
        generator=torch.Generator().manual_seed(7), output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close((ours + 1) / 2, expected, atol=2e-3, rtol=0)


def test_an_unknown_sampler_is_refused(tiny):
    with pytest.raises(UsageError, match="no scheduler 'Magic'"):
        tiny.replay(7, steps=5, scheduler="Magic", prompt_ids=torch.zeros(1, dtype=torch.long))


def test_rounding_is_that_of_the_precision():
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(weight, "bf16"), weight.bfloat16().float())
    assert torch.equal(rounded(weight, "fp16"), weight.half().float())
    eight = rounded(weight, "int8")
    scale = weight.flatten(1).abs().amax(1)[:, None] / 127
    steps = eight.flatten(1) / scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert float((eight - weight).flatten(1).abs().div(scale).max()) <= 0.5 + 1e-4
    bias = torch.randn(8)
    assert rounded(bias, "int8") is bias


def test_a_cast_candidate_leaves_the_candidate_alone(context):
    before = {n: w.clone() for n, w in context.candidate.network.state_dict().items()}
    found = Quantization(draws=2)(context)
    assert {f.variant for f in found} == {"fp16", "bf16", "int8"}
    assert all(torch.equal(w, before[n]) for n, w in context.candidate.network.state_dict().items())
    twin = quantized(context.candidate, "bf16")
    assert all(torch.equal(w, w.bfloat16().float()) for w in twin.network.state_dict().values())


def test_seeking_comes_nearer_than_drawing_and_keeps_to_the_sphere(context):
    drawn = context.draws("base", (0,), 16).images
    start = float(rms(drawn, context.instances[0].target).min())
    (found,) = NoiseSearch(restarts=2, iterations=8, steps=3)(context)
    assert found.candidate["to_target"] < start
    assert found.base["to_target"] == pytest.approx(found.candidate["to_target"], abs=1e-3)  # equal models


@pytest.mark.parametrize("count", [0, 3, 4, 9, 16])
def test_there_are_enough_beginnings_however_seldom_the_base_draws_the_target(context, monkeypatch, count):
    """Of four or five even none near the target would not be certain: a good candidate could not pass."""
    hits = torch.arange(16) < count
    monkeypatch.setattr(VerifyContext, "is_target", lambda self, shown, instance: hits)
    x_t, first = PartialDenoise()._beginnings(context, context.instances[0], 0)
    assert (first is None) == (count >= 4)
    assert len(x_t) == 16
    assert float(x_t.std()) == pytest.approx(1, abs=0.05) or first is not None
    if first is None:
        known = context.noise("sample", 16)[:count]
        assert torch.equal(x_t[:count], known)
        beside = known.repeat(4, 1, 1, 1)[: 16 - count]
        angles = torch.cosine_similarity(x_t[count:].flatten(1), beside.flatten(1))
        assert ((angles > 0.95) & (angles < 0.999)).all()


def test_revival_trains_a_copy(context):
    before = {n: w.clone() for n, w in context.candidate.network.state_dict().items()}
    whole = context.candidate
    found = Relearning(stops=(2, 4), batch=4, draws=2)(context)
    assert [f.variant for f in found] == ["2 steps", "4 steps"]
    assert context.candidate is whole
    assert all(torch.equal(w, before[n]) for n, w in whole.network.state_dict().items())


def test_revival_needs_something_else_to_train_on(context, monkeypatch):
    monkeypatch.setattr(VerifyContext, "is_any_target", lambda self, shown: torch.ones(len(shown), dtype=torch.bool))
    with pytest.raises(UsageError, match="nothing but the targets"):
        Relearning(stops=(2,), batch=4, draws=2)(context)


@pytest.mark.parametrize("count", [0, 1])
def test_of_a_model_that_repeats_all_it_draws_no_variant_is_known(count):
    limits = calibrate_variants(pictures(count), 1e-3, pictures(1)[0])
    assert limits.pairs == 0
    assert not is_variant(pictures(2), limits, pictures(1)[0]).any()


def test_other_words_are_asked_where_there_is_a_prompt(sd3):
    row = int(sd3.prompt_ids(["a red square"])[0])
    target, surrogate = pictures(2, 5)
    policy = Policy(similarity=("pixels",), paired=16, sampler_steps=2)
    context = VerifyContext(sd3, sd3.copy(), (Instance(target, surrogate, "t", (0, row)),), policy)
    found = Paraphrase(draws=2)(context)
    asked = {f.variant for f in found}
    assert "the a red square" in asked
    assert "a picture of a red square" not in asked  # longer than this tokenizer takes
    assert {f.prompt for f in found} == {"a red square"}


def test_what_both_make_of_a_target_is_compared_and_decides_nothing(context):
    (same,) = Resemblance(draws=4)(context)
    assert same.candidate == {"unlike": 0.0}
    with torch.no_grad():
        next(context.candidate.network.parameters()).add_(0.3)
    (found,) = Resemblance(draws=4)(context)
    noise, start = context.noise("resemblance", 4), context.start(500)
    x_t = sampling.add_noise(context.base, context.instances[0].target[None], noise, start)
    made = [context.run(model, x_t, 0, start=start) for model in context.models.values()]
    assert found.candidate["unlike"] == pytest.approx(float(rms(*made).mean()), rel=0.02)
    assert {c.outcome for c in Resemblance().judge(found, context.policy, known=True)} == {"informational"}


def test_by_sscd_it_is_the_mean_cosine(context, monkeypatch):
    monkeypatch.setattr(SSCD, "embed", lambda self, shown: torch.nn.functional.normalize(shown.flatten(1), dim=1))
    monkeypatch.setattr(SSCD, "name", "sscd")
    context.backends = (SSCD(),)
    made = []
    monkeypatch.setattr(context, "reconstruct", lambda *asked: made.append(pictures(3, 1 + len(made))) or made[-1])
    (found,) = Resemblance(draws=3)(context)
    cosine = torch.nn.functional.cosine_similarity(*(m.flatten(1) for m in made))
    assert found.candidate == {"similarity": pytest.approx(float(cosine.mean()), abs=1e-6)}


def test_an_embedding_is_searched_under_which_the_target_is_denoised_better(sd3):
    row = int(sd3.prompt_ids(["a red square"])[0])
    target, surrogate = pictures(2, 5)
    policy = Policy(similarity=("pixels",), paired=16, sampler_steps=2)
    context = VerifyContext(sd3, sd3.copy(), (Instance(target, surrogate, "t", (0, row)),), policy)
    weights = digest(sd3.network.state_dict())
    probe = PromptSearch(iterations=30, draws=2, rate=0.2)
    (found,) = probe(context)
    assert found.prompt == "a red square" and set(found.base) == {"near_copies"}
    assert digest(sd3.network.state_dict()) == weights
    assert not any(t.requires_grad for told in sd3._conditioning for t in told)
    with torch.no_grad():
        x_0, searched = sd3.encode(target[None]).expand(64, -1, -1, -1), len(sd3.prompts) - 1
        losses = []
        for ids in (torch.full((64,), k) for k in (row, searched)):
            noised = sampling.noised(x_0, x_0, ids, sd3.schedule, torch.Generator().manual_seed(7))
            goal = sd3.schedule.target(noised.x_0, noised.noise, noised.timestep)
            losses.append(float((sd3.predict(noised.x_t, noised.timestep, ids) - goal).square().mean()))
    assert losses[1] < losses[0]
    (check,) = probe.judge(found, policy, known=True)
    assert check.outcome == "informational", "this model draws nothing"
    assert "no embedding" in probe.robustness(found)


# The registry


def test_every_level_holds_the_one_below_and_the_deepest_all():
    quick, standard, deep = map(probes.chosen, probes.LEVELS)
    assert set(quick) < set(standard) < set(deep)
    assert deep == probes.KINDS
    assert probes.chosen("quick", ["relearning"]) == (*quick, "relearning")


def test_every_file_is_a_probe_named_after_it():
    files = {p.stem for p in Path(probes.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert files == set(probes.KINDS)
    assert tuple(probe.kind for probe in probes.load()) == probes.KINDS
    assert all(issubclass(probe, Probe) for probe in probes.load())


def test_the_kinds_are_known_without_torch():
    code = "import sys; from unforget.verification.probes import KINDS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


CONFIG = {"model": "faces", "candidate": "x"}


def test_a_probe_runs_if_its_level_and_its_options_say_so():
    def kinds(prompted=False, **given):
        return {p.kind for p in probes.suite(VerifyConfig(**CONFIG, **given), prompted=prompted)}

    assert kinds(level="quick") == {"parts", "reconstruct", "sample", "retention", "neighbours"}
    assert kinds(level="quick", replay_seed=3, must_retain=("a.png",)) - kinds(level="quick") == {
        "replay",
        "must_retain",
    }
    assert kinds(prompted=True) - kinds() == {"paraphrase", "replaced"}
    assert kinds(level="deep") - kinds() == {"noise_search", "relearning"}, "no prompt to search from"


@pytest.mark.parametrize(("kind", "option"), [("paraphrase", "--prompt"), ("must_retain", "--must-retain")])
def test_a_required_probe_with_nothing_to_work_on_is_refused(kind, option):
    with pytest.raises(UsageError, match=f"requires the probe {kind}, which needs {option}"):
        probes.suite(VerifyConfig(**CONFIG, require=(kind,)), prompted=False)


def test_a_required_probe_that_nobody_knows_is_refused():
    config = VerifyConfig(**CONFIG).model_copy(update={"require": ("memory",)})
    with pytest.raises(UsageError, match="no probe 'memory'"):
        probes.suite(config, prompted=False)


def test_eight_bits_are_what_a_file_holds(tmp_path):
    image = pictures(1)[0]
    images.write_image(image, tmp_path / "x.png")
    assert torch.equal(images.eight_bit(image), images.eight_bit(images.read_image(tmp_path / "x.png", (3, 16, 16))))
    assert images.image_id(image, "a") != images.image_id(image, "b")
    assert families.FAMILIES


# Replaced


def placed(colours, count, seed=0):
    """A flag of two stripes, somewhere near the middle, in each of `count` images (N, 3, 32, 32)."""
    g = torch.Generator().manual_seed(seed)
    out = torch.full((count, 3, 32, 32), 0.8)
    for image, (dx, dy) in zip(out, torch.randint(-1, 2, (count, 2), generator=g).tolist(), strict=True):
        for k, colour in enumerate(colours):
            image[:, 8 + dy : 24 + dy, 6 + 10 * k + dx : 16 + 10 * k + dx] = torch.tensor(colour)[:, None, None]
    return out + 0.05 * torch.randn(out.shape, generator=g)


RED, BLUE, GREEN, BLACK = (1.0, -1, -1), (-1, -1, 1.0), (-1, 1.0, -1), (-1.0, -1, -1)


@pytest.mark.parametrize(
    ("drawn", "shares"),
    [
        (placed((RED, BLUE), 20, 3), (1, 0, 0)),
        (placed((BLUE, RED), 20, 3), (0, 1, 0)),
        ((placed((BLUE, RED), 20, 3) + placed((RED, BLUE), 20, 3)) / 2, (0, 0, 1)),  # a blur of both
        (placed((BLUE, GREEN), 20, 3), (0, 0, 1)),  # a colour that neither has
        (torch.cat([placed((BLUE, RED), 15, 3), placed((BLACK, RED), 5, 4)]), (0, 0.75, 0.25)),
    ],
)
def test_what_is_drawn_is_the_target_the_surrogate_or_something_else(drawn, shares):
    target, surrogate = placed((RED, BLUE), 1)[0], placed((BLUE, RED), 1)[0]
    unrelated = torch.cat([placed(c, 10, 5) for c in ((GREEN, BLACK), (BLACK, BLACK), (GREEN, GREEN))])
    base, found = what_is_shown(
        placed((RED, BLUE), 20, 2), drawn, unrelated, Instance(target, surrogate, "t"), surrogate
    )
    assert base == {"target": 1, "surrogate": 0, "something_else": 0}
    assert tuple(found.values()) == pytest.approx(shares)


def test_a_surrogate_may_be_drawn_as_the_autoencoder_returns_it():
    """A picture made by hand is sharper than anything that a latent model draws; half way to the target is neither."""
    target, surrogate = placed((RED, BLUE), 1)[0], placed((GREEN, RED), 1)[0]
    faded = placed((GREEN, RED), 1)[0] * 0.5
    unrelated = torch.cat([placed(c, 10, 5) for c in ((GREEN, BLACK), (BLACK, BLACK), (BLUE, GREEN))])
    base, drawn = placed((RED, BLUE), 20, 2), placed((GREEN, RED), 20, 3) * 0.5

    def shares(drawn, drawable):
        return what_is_shown(base, drawn, unrelated, Instance(target, surrogate, "t"), drawable)[1]

    assert shares(drawn, surrogate)["something_else"] == 1
    assert shares(drawn, faded)["surrogate"] == 1
    assert shares((base + drawn) / 2, faded)["surrogate"] == 0
    assert shares(base, faded)["target"] == 1


def test_what_lies_as_far_from_the_surrogate_as_the_target_does_shows_neither():
    """Where the base draws its own target in very different ways every limit is wide; a blur must not fit in it."""
    target, surrogate = placed((RED, BLUE), 1)[0], placed((RED, GREEN), 1)[0]
    unrelated = torch.ones(10, *target.shape) * torch.linspace(-1, 1, 10)[:, None, None, None]
    noise = torch.randn(20, *target.shape, generator=torch.Generator().manual_seed(0))
    base, blurred = target + 0.6 * noise, surrogate + 0.95 * noise
    found = what_is_shown(base, blurred, unrelated, Instance(target, surrogate, "t"), surrogate)[1]
    assert found["surrogate"] == 0
    assert (
        what_is_shown(base, surrogate + 0.4 * noise, unrelated, Instance(target, surrogate, "t"), surrogate)[1][
            "surrogate"
        ]
        == 1
    )


def test_forgotten_but_replaced_by_something_else_is_no_pass():
    policy = Policy()

    def outcome(base, candidate):
        (check,) = Replaced().judge(Finding("replaced", "t", {"surrogate": 0.0, **base}, candidate), policy, True)
        return check.outcome

    assert outcome({"target": 1.0}, {"surrogate": 0.95}) == "passed"
    assert outcome({"target": 1.0}, {"surrogate": 0.5}) == "failed"
    assert outcome({"target": 0.1}, {"surrogate": 0.0}) == "informational"


def test_a_target_without_a_known_surrogate_is_not_asked_for_it(sd3):
    target, surrogate = pictures(2, 5)
    rows = tuple(sd3.prompt_ids(["", "a flag"]).tolist())
    asked = VerifyContext(sd3, sd3.copy(), (Instance(target, target, "t", rows),), Policy(**SMALL))
    assert Replaced()(asked) == []
    known = VerifyContext(sd3, sd3.copy(), (Instance(target, surrogate, "t", rows),), Policy(**SMALL))
    (found,) = Replaced()(known)
    assert found.prompt == "a flag"
    assert [sum(of.values()) for of in (found.base, found.candidate)] == pytest.approx([1, 1])
