"""What `--dry-run` counts is what is run: every pass of the network is counted beside the plan and the progress."""

import json
from pathlib import Path

import pytest
import torch

from unforget import api, families
from unforget.config import UnlearnConfig, VerifyConfig
from unforget.core import passes, sampling
from unforget.core.passes import Count
from unforget.core.types import Progress
from unforget.errors import CannotRun
from unforget.families import Options
from unforget.families.memory import blueprint
from unforget.families.model import DiffusionModel
from unforget.files import images
from unforget.surrogate.editors import EDITS, automatic
from unforget.unlearning.prepare import lookalikes, retain_turns
from unforget.verification.probes.paraphrase import wordings

RED = "a red square"
PLANTED = Path(__file__).parents[1] / "examples" / "faces" / "planted"


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """Passes that the network really made: an image counts 1, and 2 more where gradients come back."""
    monkeypatch.setenv("UNFORGET_CACHE", str(tmp_path / "cache"))  # what another test drew is not drawn again
    made, predict = [], DiffusionModel.predict

    def counting(self, x_t, timestep, prompt_ids):
        made.append(len(x_t))
        answer = predict(self, x_t, timestep, prompt_ids)
        if answer.requires_grad:
            answer.register_hook(lambda gradient: made.append((passes.WITH_GRADIENTS - 1) * len(gradient)))
        return answer

    monkeypatch.setattr(DiffusionModel, "predict", counting)
    monkeypatch.setattr(sampling, "seconds_a_pass", lambda family: 0.0)  # it passes, too
    return made


@pytest.fixture
def target(tmp_path):
    for k, name in enumerate(("target", "surrogate")):
        coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(k)) * 2 - 1
        images.write_image(torch.nn.functional.interpolate(coarse, 16, mode="bilinear")[0], tmp_path / f"{name}.png")
    return tmp_path / "target.png"


class Recorded(Progress):
    """Totals and sums by stage."""

    def __init__(self):
        self.total, self.done, self.now = {}, {}, ""
        super().__init__(self._stage, self._advance)

    def _stage(self, title, total):
        self.now, self.total[title], self.done[title] = title, total, 0

    def _advance(self, n=1, **figures):
        self.done[self.now] += n


FEW = {
    "retain_count": 12, "sampler_steps": 3, "num_validation_images": 2, "max_train_steps": 25, "cooldown_steps": 4,
    "train_batch_size": 2, "retain_batch_size": 3, "learning_rate": 1e-6, "stop_margin": 1,
}  # fmt: skip


def ran(plan, progress):
    """The counts that a run came to: those of the edits once they are made, and all updates where no margin stops."""
    counts = {name: count.most if name in ("training", "margin") else count.least for name, count in plan.items()}
    stages = {n: t for n, t in progress.total.items() if n != "unlearn"}
    assert stages == {n: progress.done[n] for n in stages}
    assert stages == {n: c for n, c in counts.items() if n not in ("training", "margin") and c}
    return sum(counts.values())


@pytest.mark.parametrize("prompts", [(), (RED,)], ids=["no prompt", "one prompt"])
def test_unlearn(prompts, sd3_folder, target, counted):
    config = UnlearnConfig(
        model=str(sd3_folder), target=target, surrogate=target.with_name("surrogate.png"), prompt=prompts,
        output=target.with_name("x.patch"), rank=2, **FEW,
    )  # fmt: skip
    plan = api.unlearn_passes(config, blueprint(str(sd3_folder), Options()))
    assert plan == api.unlearn_passes(config, families.load(str(sd3_folder))), "loaded or not is the same"
    progress = Recorded()
    api.unlearn(config, progress)
    assert sum(counted) == ran(plan, progress)


@pytest.mark.parametrize("recipe", ["salun", *(pytest.param(r, marks=pytest.mark.slow) for r in (
    "paper", "random-surrogate", "naive", "neggrad", "erasediff", "siss", "retrack", "esd", "concept-ablation",
))])  # fmt: skip
def test_baselines(recipe, sd3_folder, target, counted):
    """Only what the surgery uses is passed, the saliency once, the base as often as asked, and no surrogate is made."""
    needs = recipe == "paper"
    few = {k: v for k, v in FEW.items() if k not in ("stop_margin", "cooldown_steps")}
    config = UnlearnConfig(
        model=str(sd3_folder), target=target, surrogate=target.with_name("surrogate.png") if needs else (), prompt=RED,
        output=target.with_name("x.patch"), rank=2, recipe=recipe, **{**few, "max_train_steps": 3},
    )  # fmt: skip
    plan = api.unlearn_passes(config, blueprint(str(sd3_folder), Options()))
    assert plan[EDITS] == Count()
    progress = Recorded()
    api.unlearn(config, progress)
    assert sum(counted) == ran(plan, progress)


@pytest.mark.slow
def test_unlearn_with_a_surrogate_that_is_made(tmp_path, counted):
    config = UnlearnConfig(model="faces", target=PLANTED / "0.png", output=tmp_path / "x.patch", **FEW)
    plan, progress = api.unlearn_passes(config, blueprint("faces", Options())), Recorded()
    api.unlearn(config, progress)
    assert sum(counted) == ran(plan, progress)


@pytest.mark.parametrize("prompts", [(), (RED,)], ids=["no prompt", "one prompt"])
def test_the_most_is_when_no_edit_is_accepted(prompts, sd3_folder, target, counted):
    config = UnlearnConfig(
        model=str(sd3_folder), target=target, prompt=prompts, output=target.with_name("x.patch"), min_distance=1.99,
        seed=7, **FEW,
    )  # fmt: skip
    plan = api.unlearn_passes(config, blueprint(str(sd3_folder), Options()))
    with pytest.raises(CannotRun, match="no edit of the target"):
        api.unlearn(config)
    assert sum(counted) == plan["retain set"].least + plan[EDITS].most


SMALL = {
    "max_rate": 0.2, "paired": 16, "controls": 8, "draws": 2, "sampler_steps": 6, "cache": False, "similarity": "pixels"
}  # fmt: skip


@pytest.mark.parametrize("level", ["quick", "standard", pytest.param("deep", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prompts", [(), (RED,)], ids=["no prompt", "one prompt"])
def test_verify(level, prompts, sd3_folder, target, counted):
    config = VerifyConfig(
        model=str(sd3_folder), candidate=sd3_folder, target=target, surrogate=target.with_name("surrogate.png"),
        prompt=prompts, level=level, replay_seed=3, **SMALL,
    )  # fmt: skip
    plan = api.verify_passes(config, blueprint(str(sd3_folder), Options()))
    base, progress = families.load(str(sd3_folder)), Recorded()
    api.compare(config, base, base.copy(), progress)
    spent = {name.removeprefix("probe "): n for name, n in progress.done.items()}
    assert sum(counted) == sum(spent.values())
    # A variant that the detector takes for the target itself is left out.
    transformed, spared = plan.pop("transforms", Count()), spent.pop("transforms", 0)
    assert spared in {k * transformed.least // 5 for k in range(6)}
    whole = sum(plan.values(), Count())
    assert sum(spent.values()) <= whole.most
    # The base never draws the target: under the empty prompt it is then asked as often as under others.
    more = {"sample": 16 * 6} if prompts else {}
    more |= {"noise_search": plan["noise_search"].most // 2} if level == "deep" else {}
    tokens = base.pipeline.tokenizer
    long = sum(len(tokens(words).input_ids) > tokens.model_max_length for words in wordings(RED))
    less = {"paraphrase": long * 2 * 12 * 2 * 6}  # wordings that are left out
    expected = {n: c.least + more.get(n, 0) - less.get(n, 0) for n, c in plan.items()}
    assert spent == expected


def test_a_model_without_prompts(tiny_folder, target, counted):
    config = VerifyConfig(model=str(tiny_folder), candidate=tiny_folder, target=target, level="quick", **SMALL)
    plan, base = api.verify_passes(config, blueprint(str(tiny_folder), Options())), families.load(str(tiny_folder))
    api.compare(config, base, base.copy())
    # An untrained model repeats most of what it draws, and then there is nothing to be a control.
    least = sum(plan.values(), Count()).least
    assert least - plan["reconstruct"].least < sum(counted) <= least


class Large:
    """What a cost depends on of a large model."""

    image_shape, guided, device, batch_size = (3, 1024, 1024), True, torch.device("cpu"), None
    retain_prompts = tuple(map(str, range(64)))


def test_large_images_are_fewer():
    """The one rule: from 512 px on."""
    assert [passes.is_large((3, side, side)) for side in (256, 511, 512, 1024)] == [False, False, True, True]
    turns = retain_turns(Large(), (), (), None)
    assert len(turns) == 64
    assert len(set(turns)) >= 1 + 32
    assert max(map(int, set(turns) - {""})) > 60, "from the whole list"
    assert len(retain_turns(Large(), (), [f"p{i}" for i in range(90)], None)) == 120, "what a user lists comes up"
    assert {e.seeds for e in automatic(Large.image_shape)} == {8}
    assert lookalikes(Large()) == 8


def test_batches_are_larger_on_a_device_that_is_idle_with_less():
    model = Large()
    assert passes.drawn_in_one_pass(model) == 1
    assert passes.drawn(model, [0, 1, 1, 0], calls=5) == 30
    model.device = torch.device("cuda")
    assert passes.drawn_in_one_pass(model) == 4
    assert passes.drawn(model, [0, 1, 1, 0, 0], calls=5) == 45, "a prompt in a batch doubles it all"


def test_verify_says_what_it_will_cost(tiny_folder, picture, cli):
    shown = cli(
        "verify", "--model", tiny_folder, "--candidate", tiny_folder, "--target", picture, "--dry-run", "--json"
    )
    assert shown.exit_code == 0, shown.output
    said = json.loads(shown.stdout)
    assert said["passes"]["in all"][0] == sum(n for name, (n, _) in said["passes"].items() if name != "in all")
    assert said["seconds_a_pass"] > 0
    assert said["memory_gib"]["peak"] > said["memory_gib"]["draws"] > 0
    assert "calibrating draws" in said["passes"]
