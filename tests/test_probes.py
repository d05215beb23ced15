"""Probes on tiny models: what each is sensitive to, beside the stock pipelines where they do the same."""

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline
from unforget.verification.probes.keep import cast, rounded
from unforget.verification.probes.look import others, variants

from unforget import families
from unforget.core.metrics import pairwise_rms, rms
from unforget.core.types import Instance
from unforget.errors import UsageError
from unforget.files import images
from unforget.verification import probes
from unforget.verification.similarity import Pixels, Structure


def pictures(count, seed=0, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def subject(tiny):
    target, surrogate = pictures(2, 5)
    return probes.Subject(
        tiny, tiny.copy(), (Instance(target, surrogate, "t"),), torch.empty(0, *tiny.image_shape), backends=(Pixels(),),
        max_rate=0.2, paired=16, controls=8, steps=4, fresh="candidate",
    )  # fmt: skip


# Calibration


def test_the_threshold_is_the_quantile_of_pairs_of_different_pictures():
    shown = pictures(40)
    radius = probes.calibrate(pairwise_rms(shown, shown), 0.01)
    pairs = pairwise_rms(shown, shown)[torch.triu(torch.ones(40, 40, dtype=torch.bool), 1)]
    assert radius.pairs == len(pairs) == 780
    assert float((pairs < radius.distance).float().mean()) <= 0.01
    assert radius.false_positive_rate == pytest.approx(8 / 780)


def test_a_picture_that_the_model_repeats_does_not_teach_that_different_pictures_are_alike():
    single, repeated = pictures(40), pictures(1, 9) + 0.02 * torch.randn(12, 3, 16, 16)
    clean = probes.calibrate(pairwise_rms(single, single), 0.001)
    shown = torch.cat([single, repeated])
    again = probes.calibrate(pairwise_rms(shown, shown), 0.001)
    assert again == clean
    assert probes.Eye((Pixels(),), shown, 0.001).single.tolist() == [True] * 40 + [False] * 12


def test_no_more_than_one_pair_can_be_told():
    shown = pictures(10)
    radius = probes.calibrate(pairwise_rms(shown, shown), 1e-6)
    assert radius.false_positive_rate == 1 / 45


def test_a_backend_that_sees_nothing_says_nothing():
    distances = torch.full((8, 8), torch.nan)
    assert probes.calibrate(distances, 0.01).pairs == 0


def test_a_near_copy_is_nearer_than_half_way_to_the_surrogate():
    shown, target = pictures(40), pictures(1, 3)[0]
    eye = probes.Eye((Pixels(),), shown, 0.01)
    surrogate = target + 0.2 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))
    (free, capped), (near, lowered) = eye.limits(target)[0], eye.limits(target, surrogate)[0]
    assert not capped
    assert lowered
    assert near < free
    assert near == pytest.approx(float(rms(target, surrogate)) / 2, rel=1e-5)
    assert eye.sees(eye.look(torch.stack([target, surrogate])), target, surrogate).tolist() == [True, False]
    assert eye.sees(eye.look(torch.stack([target, surrogate])), target).tolist() == [True, True]


def test_one_backend_that_sees_it_is_enough():
    eye = probes.Eye((Pixels(), Structure()), pictures(40, size=32), 0.001)
    grey = torch.zeros(3, 32, 32)
    grey[:, 8:24, 8:24] = torch.linspace(-0.5, 0.5, 16)
    paler = grey * 0.9 + 0.9  # far in pixels, the same drawing
    eye.radii = (probes.Radius(0.3, 0.001, 1), probes.Radius(0.2, 0.001, 1))
    assert float(rms(grey, paler)) > 0.5
    assert eye.sees(eye.look(paler[None]), grey).tolist() == [True]


# What probes share


def test_both_models_start_from_the_same_noise_and_the_candidate_goes_on_with_its_own(subject):
    base, patched = (subject.draws(which, (0,), 16).images for which in ("base", "patched"))
    assert torch.equal(base, patched)  # equal weights
    more = subject.draws("patched", (0,), 24)
    assert torch.equal(more.images[:16], patched)
    subject.fresh = "another"
    subject._draws.clear()
    other = subject.draws("patched", (0,), 24).images
    assert torch.equal(other[:16], patched)
    assert float(rms(other[16:], more.images[16:]).min()) > 0.1


def test_what_is_drawn_step_by_step_is_what_is_drawn_at_once(subject):
    first = [subject.draws("patched", (0,), n) for n in (3, 20, 24)][-1].images
    subject._draws.clear()
    torch.testing.assert_close(first, subject.draws("patched", (0,), 24).images, atol=0.01, rtol=0)


def test_the_control_is_read_from_the_cache_and_holds_figures_only(subject, tmp_path, monkeypatch):
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path))
    probe = probes.Reconstruct(timesteps=(400,), draws=4)
    subject.cache = "digest"
    (first,) = probe(subject)
    kept = {p.name: p for p in tmp_path.iterdir()}
    assert {p.suffix for p in kept.values()} == {".json", ".safetensors"}
    assert [n for n in kept if n.endswith("safetensors")] == [n for n in kept if n.startswith("draws-")]
    assert all(json.loads(p.read_text()) for n, p in kept.items() if n.endswith("json"))
    subject._draws.clear()
    subject._figures.clear()
    subject.base.denoise = None  # not asked again
    (again,) = probe(subject)
    assert again.base == first.base
    assert again.patched == first.patched


def test_a_damaged_cache_is_made_again(subject, tmp_path, monkeypatch):
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path))
    subject.cache = "digest"
    first = subject.floor(400, 0)
    for path in tmp_path.iterdir():
        path.write_bytes(b"{")
    subject._draws.clear()
    subject._figures.clear()
    assert subject.floor(400, 0) == first


def test_half_of_the_candidates_noise_is_its_own(subject):
    probe = probes.Reconstruct(draws=8)
    shared, own = probe._noise(subject, "base", 250), probe._noise(subject, "patched", 250)
    assert torch.equal(shared[:4], own[:4])
    assert not any(torch.equal(a, b) for a in shared for b in own[4:])


# Each probe


def test_equal_models_differ_nowhere(subject):
    subject.patched = subject.base
    for probe in (probes.Transforms(draws=4), probes.PartialDenoise(draws=4), probes.Retention(neighbours=8)):
        for f in probe(subject):
            for name in set(f.base) & set(f.patched) - {"drawn", "rate_high", "rate_low", "kid", "median", "to_target"}:
                assert f.base[name] == pytest.approx(f.patched[name], abs=1e-6), (f.probe, f.variant, name)
    retained = probes.Retention(neighbours=8)(subject)
    assert {f.patched["median"] for f in retained} == {0}


def test_sampling_stops_when_the_rate_is_certain(subject):
    (found,) = probes.Sample()(subject)
    assert (found.patched["hits"], found.patched["drawn"], found.decision) == (0, subject.plan.shortest, "passes")
    subject.most = 5
    (found,) = probes.Sample()(subject)
    assert (found.patched["drawn"], found.decision) == (5, None)
    subject.most = None
    picture = subject.draws("patched", (0,), 16).images[0]
    subject.instances = (Instance(picture, picture, "t"),)
    subject.patched.denoise = lambda x, **how: picture.expand_as(x)
    subject._draws.clear()
    (found,) = probes.Sample()(subject)
    assert found.decision == "fails"
    assert found.patched["drawn"] == subject.plan.looks[0].drawn


def test_look_alikes_are_what_is_neither_target_nor_surrogate(subject):
    subject.eye.radii = (probes.Radius(0.3, 0.01, 100),)
    (instance,), stranger = subject.instances, pictures(1, 11)[0]
    made = torch.stack([instance.target, instance.surrogate, stranger, stranger])
    subject.base.denoise = lambda x, **how: made[torch.arange(len(x)) % 4]
    subject.patched.denoise = lambda x, **how: made[torch.arange(len(x)) % 4 - 1]  # one in two strangers stays
    found = probes.Retention(neighbours=8)._look_alikes(subject, instance, 1.0, 1.0)
    assert found[0].patched["seen"] == 4
    assert found[0].patched["kept"] == 0.5


def test_a_mirror_image_is_a_variant_unless_the_surrogate_is_it(subject):
    subject.eye.radii = (probes.Radius(0.3, 0.01, 100),)
    target = subject.instances[0].target
    assert {"flip", "crop", "colour", "grey"} == set(variants(target))
    assert torch.equal(variants(target)["flip"].flip(-1), target)
    subject.instances = (Instance(target, target.flip(-1), "t"),)
    assert "flip" not in {f.variant for f in probes.Transforms(draws=2)(subject)}
    subject.instances = (Instance(target, target, "t"),)
    assert others(subject.instances[0]) == []
    assert "flip" in {f.variant for f in probes.Transforms(draws=2)(subject)}


def test_the_candidate_finishes_what_the_base_began(subject):
    torch.manual_seed(0)
    x = torch.randn(2, *subject.base.latent_shape)
    levels = subject.base.sampling_timesteps(4)
    half = subject.base.denoise(x, steps=4, stop=levels[2])
    assert not torch.equal(half, x)
    whole = subject.base.denoise(half, steps=4, start=levels[2])
    torch.testing.assert_close(whole, subject.base.denoise(x, steps=4))


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


def test_a_cast_candidate_leaves_the_candidate_alone(subject):
    before = {n: w.clone() for n, w in subject.patched.network.state_dict().items()}
    found = probes.Quantization(draws=2)(subject)
    assert {f.variant for f in found} == {"fp16", "bf16", "int8"}
    assert all(torch.equal(w, before[n]) for n, w in subject.patched.network.state_dict().items())
    twin = cast(subject.patched, "bf16")
    assert all(torch.equal(w, w.bfloat16().float()) for w in twin.network.state_dict().values())


def test_seeking_comes_nearer_than_drawing_and_keeps_to_the_sphere(subject):
    drawn = subject.draws("base", (0,), 16).images
    start = float(rms(drawn, subject.instances[0].target).min())
    (found,) = probes.NoiseSearch(restarts=2, iterations=8, steps=3)(subject)
    assert found.patched["to_target"] < start
    assert found.base["to_target"] == pytest.approx(found.patched["to_target"], abs=1e-3)  # equal models


def test_revival_trains_a_copy(subject):
    before = {n: w.clone() for n, w in subject.patched.network.state_dict().items()}
    whole = subject.patched
    found = probes.Relearning(stops=(2, 4), batch=4, draws=2)(subject)
    assert [f.variant for f in found] == ["2 steps", "4 steps"]
    assert subject.patched is whole
    assert all(torch.equal(w, before[n]) for n, w in whole.network.state_dict().items())


def test_other_words_are_asked_where_there_is_a_prompt(sd3):
    row = int(sd3.prompt_ids(["a red square"])[0])
    target, surrogate = pictures(2, 5)
    subject = probes.Subject(
        sd3, sd3.copy(), (Instance(target, surrogate, "t", (0, row)),), torch.empty(0, *sd3.image_shape),
        backends=(Pixels(),), paired=16, steps=2,
    )  # fmt: skip
    found = probes.Paraphrase(draws=2)(subject)
    asked = {f.variant for f in found}
    assert "the a red square" in asked
    assert "a picture of a red square" not in asked  # longer than this tokenizer takes
    assert {f.prompt for f in found} == {"a red square"}


def test_every_level_holds_the_one_below():
    quick, standard, deep = (set(probes.LEVELS[name]) for name in ("quick", "standard", "deep"))
    assert quick < standard < deep
    assert deep == {k.model_fields["kind"].default for k in (
        probes.Reconstruct, probes.Sample, probes.Replay, probes.PartialDenoise, probes.Transforms, probes.Paraphrase,
        probes.Retention, probes.Quantization, probes.NoiseSearch, probes.Revive)}  # fmt: skip


def test_costs_are_what_the_probes_spend(subject):
    spent = []
    subject.advance = spent.append
    subject.draws("base", (0,), 16)
    subject.draws("patched", (0,), 16)
    for probe in (probes.Reconstruct(draws=4), probes.Quantization(draws=4)):
        spent.clear()
        probe(subject)
        assert sum(spent) <= probe.cost(subject) <= 1.5 * sum(spent) + 60, probe.kind


def test_eight_bits_are_what_a_file_holds(tmp_path):
    image = pictures(1)[0]
    images.write_image(image, tmp_path / "x.png")
    assert torch.equal(images.eight_bit(image), images.eight_bit(images.read_image(tmp_path / "x.png", (3, 16, 16))))
    assert images.image_id(image, "a") != images.image_id(image, "b")
    assert families.FAMILIES
