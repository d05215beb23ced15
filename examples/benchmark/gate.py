"""Measure `unforget verify` itself on the bundled model `faces`.

    python examples/benchmark/gate.py [SECTION ...] [--work DIR] [--seeds 100]

Sections, all by default; each prints its figures as a Markdown table:

    speed     the commands at `quick` and `standard`, and the sample probe beside a bare loop of the same network calls
    honest    the patches of fourteen pictures, four planted and ten draws of the model, at `standard`; seconds are the
              processor's; what is in the folder is not done again
    exact     how the sequential test ends at some rates, and after how many draws: computed, no model is asked
    budget    how often a candidate at one limit passes, and one that is sound fails: by simulated counts, no model is
              asked
    rate      1,000 runs of the sequential test on candidates whose rate is twice and half the limit
    recall    how near unseen images come back, beside the planted ones, and the near-copy threshold
              against images that no model was trained on
    solver    how often the base draws near-copies of the four planted pictures, by solver and steps
    few       thresholds from few images: how many of a thousand others lie under them
    oracle    the model trained without the image, at `quick`, over many seeds
    oracle-standard  the same at `standard`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from cheats import ORACLE, PLANTED, Honest, honest
from tables import row, table
from torch import Tensor

from unforget import UnlearnConfig, VerifyConfig, families, unlearn, verify
from unforget.api import compare
from unforget.config import Policy
from unforget.core import sampling
from unforget.core.metrics import pairwise_rms, rms, tolerance_bound
from unforget.core.types import Family, Instance, Trajectory
from unforget.families import samplers
from unforget.files import images
from unforget.verification.context import CONTROL_LEVEL, VerifyContext
from unforget.verification.near_copies import calibrate, once
from unforget.verification.probes.base import HALF, needed
from unforget.verification.probes.partial_denoise import PartialDenoise
from unforget.verification.probes.quantization import Quantization
from unforget.verification.probes.reconstruct import Reconstruct
from unforget.verification.probes.retention import SPLITS
from unforget.verification.probes.transforms import Transforms
from unforget.verification.report import Rule
from unforget.verification.sequential import ends, plan
from unforget.verification.similarity import pairwise

RUNS = 1000
SIMULATED = 20_000
POOL = 2000
FEW = 200
SOLVED = 512
OTHERS, KEPT = 29, (0.875, 0.773)
"""Those of identity 1 among 64 draws, the fewest of the planted; what its patch keeps of all draws, and of them."""
UNPLANTED = range(20, 30)  # seeds of the draws that are reported, chosen before any was run


def made(work: Path, identity: int, seed: int) -> Path:
    """An honest patch, made unless it is there."""
    patch = work / f"{identity}-{seed}.patch"
    if not patch.exists():
        unlearn(UnlearnConfig(model="faces", target=(PLANTED / f"{identity}.png",), seed=seed, output=patch))
    return patch


def context(h: Honest, policy: Policy | None = None) -> VerifyContext:
    """What the probes of the gate see of the honest patch."""
    return VerifyContext(h.base, h.patched, (Instance(h.target, h.surrogate, "t"),), policy or Policy())


def first(work: Path) -> Honest:
    patch = made(work, 0, 0)
    return honest(patch, patch.with_suffix(".run") / "surrogate-0.png")


def speed(work: Path, seeds: int) -> None:
    """Seconds of the commands, start-up included; throughput as a ratio within one run."""
    patch = made(work, 0, 0)
    table("command", "seconds")
    for level in ("quick", "standard"):
        command = [sys.executable, "-m", "unforget", "verify", "--model", "faces", "--patch", str(patch)]
        began = time.perf_counter()
        done = subprocess.run([*command, "--level", level, "--no-cache"], capture_output=True, check=False)
        row(f"verify --level {level} --no-cache (exit {done.returncode})", f"{time.perf_counter() - began:.1f}")
    h, count = first(work), 256
    noise = sampling.random_noise(count, h.base.latent_shape, 1, "bare")
    rows, usual = torch.zeros(count, dtype=torch.long), context(h).usual()
    ratios = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.no_grad():
            for part, prompt_ids in zip(torch.split(noise, 32), torch.split(rows, 32), strict=True):
                h.patched.denoise(part, steps=usual, prompt_ids=prompt_ids)
        bare = time.perf_counter() - began
        seen = context(h, Policy(paired=16))
        assert seen.detector
        began = time.perf_counter()
        hits = seen.is_target(seen.draws("candidate", (0,), count), seen.instances[0])
        ratios.append(bare / (time.perf_counter() - began))
        assert len(hits) == count
    table("throughput of the sample probe, as a share of a bare loop", "three runs")
    row(f"{sorted(ratios)[1]:.3f}", ", ".join(f"{r:.3f}" for r in ratios))


def anyone(work: Path, base: Family, seed: int) -> Path:
    """A picture that nobody planted: a draw of the base."""
    path = work / f"any-{seed}.png"
    if not path.exists():
        noise = sampling.random_noise(1, base.latent_shape, seed, "anyone")
        images.write_image(base.denoise(noise, steps=25)[0], path)
    return path


def honest_patches(work: Path, seeds: int) -> None:
    base = families.load("faces")
    shown = {f"planted {k}": PLANTED / f"{k}.png" for k in range(4)}
    shown |= {f"draw {seed}": anyone(work, base, seed) for seed in UNPLANTED}
    table("picture", "verdict", "failed", "drift median / mean", "draws", "updates", "seconds, unlearn / verify")
    for name, target in shown.items():
        kept = work / f"{target.stem}.row.json"
        if not kept.exists():
            kept.write_text(json.dumps(judged(work / f"{target.stem}.patch", target)))
        row(name, *json.loads(kept.read_text()))


def judged(patch: Path, target: Path, **options: Any) -> list[Any]:
    """Unlearn by the command's defaults but for `options`, verify at `standard`, and what to tell of it."""
    began = time.process_time()
    made = unlearn(UnlearnConfig(model="faces", target=target, output=patch, force=True, **options))
    middle = time.process_time()
    report = verify(VerifyConfig(model="faces", patch=patch, report=patch.with_suffix(".json"), force=True))
    seconds = f"{middle - began:.0f} / {time.process_time() - middle:.0f}"
    failed = ", ".join(f"{c.name} {c.figure} {c.candidate:.3g}" for c in report.checks if c.outcome == "failed")
    found = {f.probe: f.candidate for f in report.findings}
    drift = (found["retention"][figure] * found["retention"]["typical"] for figure in ("median", "mean"))
    return [
        report.verdict, failed, " / ".join(f"{d:.3f}" for d in drift), int(found["sample"]["drawn"]),
        f"{made.steps} ({made.stopped})", seconds,
    ]  # fmt: skip


def exact(work: Path, seeds: int) -> None:
    """The sequential test's own figures, from the distribution of hits."""
    test = plan(0.005, 0.95)
    table("true rate / limit, exactly", "fails", "passes", "mean draws")
    for multiple in (2.0, 1.0, 0.5, 0.25, 0.1, 0.0):
        passes, fails, mean = ends(test.looks, 0.005 * multiple)
        row(multiple, f"{fails:.4f}", f"{passes:.4f}", f"{mean:.0f}")


def budget(work: Path, seeds: int) -> None:
    """Every check of `standard` on `faces` that counts; what a sound candidate's shares are is in the table."""
    policy, rng = Policy(), np.random.default_rng(0)
    again, rounded, turned, ended = Reconstruct(), Quantization(), Transforms(), PartialDenoise()
    levels, forms = len(again.timesteps), len(rounded.timesteps) * len(rounded.precisions)
    shares: list[tuple[str, int, int, Rule, float, float]] = [
        ("reconstruct recall", levels, again.draws, "at most", HALF, 0.05),
        ("reconstruct nearer, twice", 2 * levels, again.draws, "at least", policy.nearer, 0.95),
        ("reconstruct as_sharp", levels, again.draws, "at least", HALF, 0.98),
        ("quantization recall", forms, rounded.draws, "at most", HALF, 0.05),
        ("quantization nearer, twice", 2 * forms, rounded.draws, "at least", policy.nearer, 0.95),
        ("transforms recall", 5, turned.draws, "at most", HALF, 0.05),
        ("partial_denoise", 1, ended.draws, "at most", ended.allowed, 0.01),
        ("neighbours", 1, OTHERS, "at least", policy.min_kept * KEPT[0], KEPT[1]),
    ]  # fmt: skip
    table("check", "how many", "draws", "limit", "passes from", "sound", "at the limit passes", "all fail, sound")
    sound, broken = np.zeros(SIMULATED, bool), dict[str, float]()
    for name, many, draws, rule, limit, good in shares:
        threshold = needed(rule, limit, draws, policy.confidence)

        def fails(share: float, count: int, draws: int = draws, rule: Rule = rule, at: float = threshold) -> Any:
            hits = rng.binomial(draws, share, (SIMULATED, count)) / draws
            return (hits < at - 1e-9 if rule == "at least" else hits > at + 1e-9).any(1)

        failing, broken[name] = fails(good, many), 1 - float(fails(limit, 1).mean())
        sound |= failing
        row(name, many, draws, limit, f"{threshold:.3f}", good, f"{broken[name]:.2%}", f"{failing.mean():.2%}")
    test = plan(policy.max_rate, policy.confidence)
    (passes, _, _), (_, fails_, _) = ends(test.looks, policy.max_rate), ends(test.looks, policy.max_rate / 4)
    sound |= (rng.random((SIMULATED, 2)) < fails_).any(1) | (rng.random(SIMULATED) < 1 / (SPLITS + 1))
    row("rates, exactly", 2, "", policy.max_rate, "", policy.max_rate / 4, f"{passes:.2%}", f"{2 * fails_:.2%}")
    row("kid, exactly", 1, policy.paired, "", "", "the base's own", "", f"{1 / (SPLITS + 1):.2%}")
    worst = max(*broken.values(), passes)
    print(f"\n{SIMULATED:,} runs: a sound candidate fails in {sound.mean():.2%}; at a limit {worst:.2%} pass at most")


def rate(work: Path, seeds: int) -> None:
    """Real draws of base and honest patch, mixed so that the rate of near-copies is a multiple of the limit."""
    h = first(work)
    seen = context(h)
    hits = {}
    for which, family in (("base", h.base), ("patched", h.patched)):
        noise = sampling.random_noise(POOL, h.base.latent_shape, 7, f"pool {which}")
        drawn = images.eight_bit(sampling.draw(family, noise, steps=20))
        hits[which] = seen.is_target(drawn, seen.instances[0]).numpy()
    test, rng = plan(0.005, 0.95), np.random.default_rng(0)
    often, seldom = (float(hits[w].mean()) for w in ("base", "patched"))
    print(
        f"\nnear-copies in {POOL} draws: base {often:.4f}, honest patch {seldom:.4f}; limit 0.005 at 95 %, {RUNS} runs"
    )
    table("true rate / limit", "share of base draws", "fails", "passes", "mean draws", "most")
    for multiple in (2.0, 1.0, 0.5, 0.0):
        share = max(0.0, (0.005 * multiple - seldom) / (often - seldom))
        ended = []
        for _ in range(RUNS):
            length = test.looks[-1].drawn
            pick = rng.integers(POOL, size=length)
            sequence = np.where(rng.random(length) < share, hits["base"][pick], hits["patched"][pick])
            ended.append(test.decide(sequence))
        counts = [n for n, _ in ended]
        verdicts = [v for _, v in ended]
        row(multiple, share, verdicts.count("fails"), verdicts.count("passes"), int(np.mean(counts)), max(counts))


def recall(work: Path, seeds: int) -> None:
    base, gold = families.load("faces"), families.load(str(ORACLE))
    planted = torch.stack([images.read_image(p, base.image_shape) for p in sorted(PLANTED.glob("*.png"))])
    unseen = torch.stack(
        [images.read_image(p, base.image_shape) for p in sorted((ORACLE.parent / "heldout").glob("*.png"))]
    )
    seen = VerifyContext(base, gold, (Instance(planted[0], planted[0], "t"),))

    def back(family: Family, shown: torch.Tensor, timestep: int) -> torch.Tensor:
        noise = seen.noise("recall", len(shown))
        return rms(seen.reconstruct(family, shown, noise, 0, seen.start(timestep)), shown)

    table("RMS to the image", "250", "400", "550")
    timesteps = (250, 400, 550)
    row("the gate's floor", *(f"{seen.floor(t, 0):.3f}" for t in timesteps))
    found = [back(base, unseen, t) for t in timesteps]
    row("64 unseen images, by the base: median / 5 %", *(f"{f.median():.3f} / {f.quantile(0.05):.3f}" for f in found))
    for k, image in enumerate(planted):
        shown = image.expand(32, -1, -1, -1)
        row(f"planted {k}, by the base: median", *(f"{back(base, shown, t).median():.3f}" for t in timesteps))
    shown = planted[0].expand(32, -1, -1, -1)
    row("planted 0, by the oracle: median", *(f"{back(gold, shown, t).median():.3f}" for t in timesteps))
    table("backend", "threshold", "its false-positive rate", "pairs of draws and unseen images under it")
    drawn = seen.draws("base", (0,), seen.policy.paired)
    for k, (backend, radius) in enumerate(zip(seen.detector.backends, seen.detector.radii, strict=True)):
        under = int((pairwise(drawn.embeddings[k], seen.detector.embed(unseen).embeddings[k]) < radius.distance).sum())
        row(
            backend.name, radius.distance, f"{radius.false_positive_rate:.1e}", f"{under} of {len(drawn) * len(unseen)}"
        )


def solver(work: Path, seeds: int) -> None:
    base = families.load("faces")
    planted = torch.stack([images.read_image(p, base.image_shape) for p in sorted(PLANTED.glob("*.png"))])
    noise = sampling.random_noise(SOLVED, base.latent_shape, 79, "solver")
    table("timesteps", "noise on the way", "order", "steps", "draws within RMS 0.14", "0.16", "0.20")
    ways = [(usual, fresh) for usual, fresh in product((True, False), repeat=2) if not (usual and fresh)]
    for (usual, fresh), (order, steps) in product(ways, ((1, 20), (2, 12), (1, 15), (2, 10))):
        with mock.patch.object(samplers, "STEEPEST", samplers.STEEPEST if order == 2 else 0.0), torch.no_grad():
            nearest = torch.cat([
                pairwise_rms(base.denoise(x_t, steps=_way(base, group, len(x_t), steps, usual, fresh)), planted).amin(1)
                for group, x_t in enumerate(noise.split(32))
            ])  # fmt: skip
        hits = [int((nearest < radius).sum()) for radius in (0.14, 0.16, 0.2)]
        row("usual" if usual else "irregular", "yes" if fresh else "no", order, steps, *hits)


def _way(base: Family, group: int, size: int, steps: int, usual: bool, fresh: bool) -> Trajectory:
    timesteps = (
        sampling.regular(base, steps=steps) if usual else sampling.irregular(base, f"solver {group}", steps=steps)
    )
    return Trajectory(timesteps, sampling.seeds(size, group, "solver") if fresh else None)


def few(work: Path, seeds: int) -> None:
    """Beside them what was there before: the quantile of the few, or the smallest there is.

    The rules were chosen on other draws of `faces`; no draw of `flags` was looked at before.
    """
    for model, target in (("faces", PLANTED / "0.png"), ("flags", PLANTED.parents[1] / "flags" / "ireland-wrong.png")):
        few_of(model, target)


def few_of(model: str, target: Path) -> None:
    base, _ = families.load(model), torch.manual_seed(0)
    instance = Instance(*[images.read_image(target, base.image_shape)] * 2, "t")
    turns = tuple(base.prompt_ids(base.retain_prompts).tolist())
    policy = Policy(paired=1024, sampler_steps=10)
    seen = VerifyContext(base, base, (instance,), policy, retain_prompt_ids=turns)
    drawn = seen.retained("base")[seen.detector.unrepeated]
    noise = seen.noise("few", len(drawn))
    confidence, rate, rows = seen.policy.confidence, seen.policy.false_positive_rate, range(len(drawn))
    print(f"\n{model}: {len(drawn)} draws that it does not repeat; {FEW} times so many of them")
    table("threshold", "from", "wanted", "before: median, 95 %, most", "median, 95 %, most")

    def compared(name: str, n: int, wanted: float, whole: Tensor, before: list[float], now: list[float]) -> None:
        under = [[float((whole < limit).double().mean()) for limit in limits] for limits in (before, now)]
        row(name, n, f"{wanted:g}", *(", ".join(f"{np.quantile(u, q):.2g}" for q in (0.5, 0.95, 1)) for u in under))

    for t in (250, 550):
        back = rms(seen.reconstruct(base, drawn.images, noise, 0, t), drawn.images)
        for n in (24, 48):
            picked = [back[torch.randperm(len(rows))[:n]] for _ in range(FEW)]
            before = [float(p.quantile(CONTROL_LEVEL)) for p in picked]
            now = [tolerance_bound(p, CONTROL_LEVEL, confidence) for p in picked]
            compared(f"floor, t = {t}", n, CONTROL_LEVEL, back, before, now)
    for backend, embedded in zip(seen.backends, drawn.embeddings, strict=True):
        apart = pairwise(embedded, embedded)
        for n in (24, 48, 256):
            parts = [apart[p][:, p] for p in (torch.randperm(len(rows))[:n] for _ in range(FEW))]
            pairs = [part[once(part)].sort().values for part in parts]
            before = [float(p[int(rate * len(p))]) for p in pairs]
            now = [calibrate(part, rate).distance for part in parts]
            compared(f"near-copy, {backend.kind}", n, rate, apart[once(apart)], before, now)


def oracle(work: Path, seeds: int, **options: Any) -> None:
    options = options or {"level": "quick"}
    base, gold = families.load("faces"), families.load(str(ORACLE))
    verdicts: dict[str, int] = {}
    failed: dict[str, int] = {}
    began = time.perf_counter()
    for seed in range(seeds):
        config = VerifyConfig(
            model="faces", candidate=ORACLE, target=(PLANTED / "0.png",), seed=seed, cache=False, **options
        )
        report, _ = compare(config, base, gold)
        verdicts[report.verdict] = verdicts.get(report.verdict, 0) + 1
        for c in report.checks:
            if c.outcome in ("failed", "inconclusive"):
                failed[f"{c.name} {c.figure}"] = failed.get(f"{c.name} {c.figure}", 0) + 1
        if seed % 10 == 9 or options["level"] != "quick":
            print(f"{seed + 1} seeds: {verdicts} {failed}", flush=True)
    table("seeds", "verdicts", "failed checks", "seconds a seed")
    row(seeds, verdicts, failed, f"{(time.perf_counter() - began) / seeds:.1f}")


def oracle_at_standard(work: Path, seeds: int) -> None:
    oracle(work, seeds, level="standard")


SECTIONS = {
    "speed": speed, "honest": honest_patches, "exact": exact, "budget": budget, "rate": rate, "recall": recall,
    "solver": solver, "few": few, "oracle": oracle, "oracle-standard": oracle_at_standard,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.mkdtemp()))
    parser.add_argument("--seeds", type=int, default=100)
    given = parser.parse_args()
    for name in given.sections:
        print(f"\n## {name}", flush=True)
        SECTIONS[name](given.work, given.seeds)


if __name__ == "__main__":
    main()
