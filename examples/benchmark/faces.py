"""Measure the whole path on the bundled model `faces`, with the defaults of the tool.

    python examples/benchmark/faces.py [SECTION ...] [--samples 2000] [--work DIR]

Sections, all by default; each prints its figures as a Markdown table:

    planted    each planted identity alone: rates before and after, reconstructions, drift, seconds
    paper      the same for `--recipe paper`, its learning rate raised until it forgets as much
    oracle     distance to the model that was trained without the image, by timestep
    anyone     ten images that nobody planted: samples of the model
    together   all planted identities in one run
    ablation   the defaults with one choice undone at a time, on identity 0
    floor      what training aims at, worked out at every step instead of learnt; and what rounding alone does

Same seed means the same start noise; drift is the RMS between the images of base and patched, pixels in [-1, 1], DDIM
with 25 steps, over 256 seeds that training never uses. A near-copy lies within RMS 0.16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tables import row, table
from torch import Tensor

from unforget import UnlearnConfig, families, unlearn
from unforget.core import sampling
from unforget.core.metrics import pairwise_rms, rms
from unforget.core.objectives import Context, PosteriorSwap
from unforget.core.recipe import Recipe
from unforget.core.types import Family, Instance, Noised, Progress
from unforget.files import images
from unforget.files.patch import Stack
from unforget.files.storage import digest
from unforget.unlearning.compute import mixed
from unforget.unlearning.prepare import RunInputs, prepare
from unforget.verification.context import VerifyContext
from unforget.verification.probes.reconstruct import Reconstruct

ROOT = Path(__file__).parents[2]
PLANTED = sorted((ROOT / "examples" / "faces" / "planted").glob("*.png"))
LOOKALIKE = {0: 1, 1: 0}
NEAR_COPY = 0.16
SEEDS = 256
STEPS = 25
PAPER_RATES = (1e-4, 2e-4, 4e-4)


@dataclass
class Clock:
    """Seconds of each stage of a command, from its progress."""

    seconds: dict[str, float] = field(default_factory=dict)
    stage: str = "loading"
    since: float = field(default_factory=time.perf_counter)

    def __call__(self, title: str, total: int = 0) -> None:
        now = time.perf_counter()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0) + now - self.since
        self.stage, self.since = title, now


@dataclass
class Bench:
    """The base, its draws, and a folder for the runs."""

    base: Family
    samples: int
    work: Path

    def __post_init__(self) -> None:
        self.planted = torch.stack([images.read_image(p, self.base.image_shape) for p in PLANTED])
        self.digest = digest(self.base.network.state_dict())
        print(f"drawing {self.samples} samples of the base ...", flush=True)
        self.drawn = self.draw(self.base, self.samples)

    def draw(self, family: Family, count: int) -> Tensor:
        noise = sampling.random_noise(count, self.base.latent_shape, 0, "sample")
        with torch.no_grad():
            return sampling.draw(family, noise, steps=STEPS)

    def rates(self, images: Tensor) -> list[int]:
        """Near-copies of each planted identity."""
        return (pairwise_rms(images, self.planted) < NEAR_COPY).sum(0).tolist()

    def unlearn(self, name: str, targets: list[Path], **options: Any) -> tuple[Family, tuple[Instance, ...], dict]:
        """Run the command with options of its own, and load what it wrote as a user would."""
        clock, started = Clock(), time.perf_counter()
        config = UnlearnConfig(
            model="faces", target=tuple(targets), output=self.work / f"{name}.patch", force=True, **options
        )
        result = unlearn(config, Progress(stage=clock))
        clock("end")
        patched = self.base.copy()
        Stack.load((result.output,)).apply(patched.network)
        instances = tuple(self.instance(result.folder, k) for k in range(len(targets)))
        took = {"whole": time.perf_counter() - started, "training": clock.seconds["unlearn"], "steps": result.steps}
        return patched, instances, {**took, "stopped": result.stopped}

    def instance(self, folder: Path, k: int) -> Instance:
        pair = (
            images.read_image(folder / f"{kind}-{k}.png", self.base.image_shape) for kind in ("target", "surrogate")
        )
        return Instance(*pair, id=str(k))

    def reconstructions(self, patched: Family, instances: tuple[Instance, ...]) -> list[float]:
        """Worst share nearer to the surrogate, at each timestep."""
        with torch.no_grad():
            found = Reconstruct(calibrated=False)(VerifyContext(self.base, patched, instances))
        timesteps = dict.fromkeys(f.timestep for f in found)
        return [min(f.candidate["nearer_surrogate"] for f in found if f.timestep == t) for t in timesteps]

    def drift(self, images: Tensor) -> tuple[float, float]:
        moved = rms(images[:SEEDS], self.drawn[:SEEDS])
        return float(moved.median()), float(moved.mean())


def shares(values: list[float]) -> str:
    return " / ".join(f"{v:.0%}" for v in values)


def planted(bench: Bench) -> None:
    table(
        "identity",
        "near-copies, base / patched",
        "nearer to the surrogate at 250 / 400 / 550",
        "drift median / mean",
        "others kept",
        "look-alike kept",
        "steps",
        "seconds, whole / training",
    )
    before = bench.rates(bench.drawn)
    for k, path in enumerate(PLANTED):
        patched, instances, took = bench.unlearn(f"planted-{k}", [path])
        images = bench.draw(patched, bench.samples)
        after = bench.rates(images)
        kept = {j: after[j] / before[j] for j in range(len(PLANTED)) if j != k}
        twin = LOOKALIKE.get(k)
        median, mean = bench.drift(images)
        row(
            k,
            f"{before[k]} / {after[k]}",
            shares(bench.reconstructions(patched, instances)),
            f"{median:.3f} / {mean:.3f}",
            f"{min(v for j, v in kept.items() if j != twin):.0%}",
            "none planted" if twin is None else f"{kept[twin]:.0%} ({before[twin]} / {after[twin]})",
            f"{took['steps']} ({took['stopped']})",
            f"{took['whole']:.0f} / {took['training']:.0f}",
        )


def paper(bench: Bench) -> None:
    table(
        "learning rate",
        "near-copies of 0 in 512, base / patched",
        "nearer to the surrogate at 250 / 400 / 550",
        "drift median / mean",
        "look-alike, base / patched",
    )
    for rate in PAPER_RATES:
        patched, instances, _ = bench.unlearn("paper", PLANTED[:1], recipe="paper", learning_rate=rate)
        images, share = bench.draw(patched, 512), bench.reconstructions(patched, instances)
        before, after = bench.rates(bench.drawn[:512]), bench.rates(images)
        median, mean = bench.drift(images)
        counts = [f"{b} / {a}" for b, a in zip(before, after, strict=True)]
        row(f"{rate:g}", counts[0], shares(share), f"{median:.3f} / {mean:.3f}", counts[1])
        if min(share) >= 0.95 and after[0] == 0:
            break


def oracle(bench: Bench) -> None:
    table(
        "t", "base to oracle", "patched to oracle", "oracle to target", "patched to target", "patched nearer than base"
    )
    gold = families.load(str(ROOT / "tests" / "data" / "oracle"))
    patched, instances, _ = bench.unlearn("oracle", PLANTED[:1])
    target, noise = instances[0].target, sampling.random_noise(64, bench.base.latent_shape, 0, "oracle")
    for t in range(100, 701, 50):
        timestep = torch.full((len(noise),), t)
        x_t = bench.base.schedule.add_noise(target.expand_as(noise), noise, timestep)
        with torch.no_grad():
            base, ours, ideal = (
                m.schedule.split(x_t, m.predict(x_t, timestep, torch.zeros_like(timestep)), timestep)[0]
                for m in (bench.base, patched, gold)
            )
        apart = [float(rms(a, b).mean()) for a, b in ((base, ideal), (ours, ideal), (ideal, target), (ours, target))]
        row(t, *apart, "yes" if apart[1] < apart[0] else "no")


def anyone(bench: Bench) -> None:
    table("seed", "nearer to the surrogate at 250 / 400 / 550", "drift median / mean", "holds", "seconds")
    held, seeds = 0, range(10)
    for seed in seeds:
        path = bench.work / f"anyone-{seed}.png"
        noise = sampling.random_noise(1, bench.base.latent_shape, seed, "anyone")
        images.write_image(bench.base.denoise(noise, steps=STEPS)[0], path)
        patched, instances, took = bench.unlearn(f"anyone-{seed}", [path])
        share, (median, mean) = bench.reconstructions(patched, instances), bench.drift(bench.draw(patched, SEEDS))
        good = min(share) >= 0.95 and median <= 0.04 and mean <= 0.09
        held += good
        row(seed, shares(share), f"{median:.3f} / {mean:.3f}", "yes" if good else "no", f"{took['whole']:.0f}")
    print(f"\nholds for {held} of {len(seeds)}")


def together(bench: Bench) -> None:
    table(
        "identity",
        "near-copies, base / patched",
        "worst share nearer to a surrogate at 250 / 400 / 550",
        "drift median / mean",
        "mean of those that were near-copies / of the others",
        "seconds, whole / training",
    )
    patched, instances, took = bench.unlearn("together", PLANTED)
    images = bench.draw(patched, bench.samples)
    share, (median, mean) = bench.reconstructions(patched, instances), bench.drift(images)
    hit = (pairwise_rms(bench.drawn[:SEEDS], bench.planted) < NEAR_COPY).any(1)
    moved = rms(images[:SEEDS], bench.drawn[:SEEDS])
    apart = f"{moved[hit].mean():.3f} ({int(hit.sum())}) / {moved[~hit].mean():.3f}"
    seconds = f"{took['whole']:.0f} / {took['training']:.0f}"
    for k, (before, after) in enumerate(zip(bench.rates(bench.drawn), bench.rates(images), strict=True)):
        row(k, f"{before} / {after}", shares(share), f"{median:.3f} / {mean:.3f}", apart, seconds)


def ablation(bench: Bench) -> None:
    table("choice undone", "near-copies of 0 in 512, base / patched", "nearer to the surrogate at 250 / 400 / 550",
          "drift median / mean", "look-alike, base / patched", "seconds of training")  # fmt: skip
    before = bench.rates(bench.drawn[:512])
    weighting = {"weighting": "clean-space", "weighting_cap": 400, "retain_weight": 12}  # those of the default
    variants = {
        "none": {},
        "bottleneck: train all weights": {"train": "full"},
        "taper: forget at all timesteps": {"taper": (999, 1000), "forget_range": (50, 1000)},
        "target prior: 1": {"target_prior": 1},
        "posterior swap: the surrogate at every noised target": {"objective": "surrogate", "distil": True, **weighting},
        "surgery: add the gradients": {"surgery": "sum"},
        "preconditioner: none, and the rate 1e-4": {"damping": 1e6, "learning_rate": 1e-4},
        "high noise counts for less: a cap of 20": {"weighting_cap": 20},
        "the rate falls late: over the last 40 updates": {"cooldown_steps": 40},
    }
    for name, options in variants.items():
        patched, instances, took = bench.unlearn("ablation", PLANTED[:1], **options)
        images, share = bench.draw(patched, 512), bench.reconstructions(patched, instances)
        counts = [f"{b} / {a}" for b, a in zip(before, bench.rates(images), strict=True)]
        median, mean = bench.drift(images)
        row(name, counts[0], shares(share), f"{median:.3f} / {mean:.3f}", counts[1], f"{took['training']:.0f}")


def floor(bench: Bench) -> None:
    table(
        "targets", "the network in", "near-copies of each, base / swapped", "drift median / mean", "mean of the others"
    )
    before, objective = bench.rates(bench.drawn), Recipe().objective
    for targets in ([], [0], [1], [0, 1, 2, 3]):
        inputs = RunInputs(tuple(bench.planted[k] for k in targets))
        prepared = prepare(bench.base, inputs, Progress()) if targets else None
        hit = (pairwise_rms(bench.drawn[:SEEDS], bench.planted[targets]) < NEAR_COPY).any(1)
        for half in (False, True):
            predict = mixed(bench.base.predict, half, torch.device("cpu"))
            swapped = bench.base.copy()
            swapped.predict = predict
            if prepared is not None:
                pictures = prepared.encoded, prepared.retain, prepared.prior_counts
                swapped.predict = partial(answer, objective, Context(bench.base.schedule, predict, *pictures))
            images = bench.draw(swapped, bench.samples)
            after, (median, mean) = bench.rates(images), bench.drift(images)
            others = rms(images[:SEEDS], bench.drawn[:SEEDS])[~hit].mean()
            counts = ", ".join(f"{before[k]} / {after[k]}" for k in targets)
            precision = "bfloat16" if half else "float32"
            row(str(targets), precision, counts, f"{median:.4f} / {mean:.4f}", f"{others:.4f}")


def answer(objective: PosteriorSwap, context: Context, x_t: Tensor, timestep: Tensor, prompt_ids: Tensor) -> Tensor:
    return objective.goal(Noised(x_t, x_t, timestep, x_t, x_t, prompt_ids), context)


SECTIONS = {f.__name__: f for f in (planted, paper, oracle, anyone, together, ablation, floor)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--work", type=Path, help="keep the runs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(families.load("faces").copy(), args.samples, work)
        for name in args.section or SECTIONS:
            print(f"\n## {name}", flush=True)
            SECTIONS[name](bench)


if __name__ == "__main__":
    main()
