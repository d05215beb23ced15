"""Facts that nobody tuned for: `unlearn` by default, on pictures and edits drawn by seed before the first run.

    cd examples/flags && npm install && cd -
    python examples/benchmark/facts.py flags develop            # 18 facts that may be looked at while working
    python examples/benchmark/facts.py flags report             # 18 others, only to report
    python examples/benchmark/facts.py flags fresh              # 18 of other countries, drawn after all of that
    python examples/benchmark/facts.py emoji report --model DIR # a domain that was never developed on

The target is what the model draws under the fact's prompt for the fact's seed, the surrogate the edited picture in the
same place. `--autoencoder` prints how well the model's autoencoder returns pictures, edited ones too, and does nothing
else. `--part 0/2` does every second fact, `--work DIR` keeps what was done, and `--table` only prints that.
Options of `unlearn` follow as `name=value`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), *(str(ROOT / "examples" / name) for name in ("flags", "emoji"))]

from edits import Fact, facts  # noqa: E402
from pictures import Judge, Named, place, tensor  # noqa: E402
from tables import row, table  # noqa: E402

from unforget import UnlearnConfig, families, unlearn  # noqa: E402
from unforget.core import sampling  # noqa: E402
from unforget.core.metrics import pairwise_rms, rms  # noqa: E402
from unforget.core.types import Family  # noqa: E402
from unforget.files import images  # noqa: E402
from unforget.files.patch import Stack  # noqa: E402

STEPS, SEEDS, NEAR, NEAR_SEEDS, OTHERS = 20, 64, 10, 8, 160
ACCEPTANCE = ("JP", "DE", "AT")
"""Flags that nobody may look at before the acceptance test."""
LEARNT = 0.95
"""Share of the base's draws that must show a fact's picture: of the fresh ones others are passed over."""
UNFIT, SLACK = 0.95, 1.15
"""Quantile of the base's distance to what it is asked for, over all names and over draws of the fact's own name, up to
which an image shows what it is asked for; the latter with some slack, for no image of the surrogate was learnt."""


@dataclass(frozen=True)
class Domain:
    """Named pictures, how they are asked for, and the facts of both halves."""

    model: str
    known: list[Named]
    caption: str
    facts: dict[str, list[Fact]]


def flags(model: str | None) -> Domain:
    from flags import countries

    package = ROOT / "examples" / "flags" / "node_modules" / "svg-country-flags"
    if not package.is_dir():
        raise SystemExit("no flags: run `npm install` in examples/flags")
    known = countries(package)
    made = facts(known, 36, 12, without=(*ACCEPTANCE, "IE", "CI"))
    half = np.concatenate([np.random.default_rng(12).permutation(6)[:3] * 6 + kind for kind in range(6)]).tolist()
    halves = {"develop": [made[i] for i in sorted(half)], "report": [f for i, f in enumerate(made) if i not in half]}
    seen = (*ACCEPTANCE, "IE", "CI", *(fact.known.code for fact in made))
    halves["fresh"] = facts(known, 18, 26, without=seen)
    return Domain(model or "flags", known, "flag of {}", halves)


def emoji(model: str | None) -> Domain:
    from emoji import CAPTIONS, chosen

    package = ROOT / "examples" / "emoji" / "node_modules" / "emoji-datasource-google"
    if model is None or not package.is_dir():
        raise SystemExit("train the model first: see examples/emoji/train.py; give it with --model")
    known = chosen(package)
    return Domain(model, known, CAPTIONS[0], {"report": facts(known, 12, 12)})


class Bench:
    """What the base draws, once, and what each patched model draws beside it."""

    def __init__(self, domain: Domain) -> None:
        self.domain, self.base = domain, families.load(domain.model)
        self.captions = [domain.caption.format(n.name) for n in domain.known]
        self.base.prompt_ids(self.captions)
        rng = np.random.default_rng(1)
        self.others = rng.permutation(len(domain.known))[:OTHERS]
        self.judge = Judge([n.image for n in domain.known])
        self.drawn = self.draw(self.base, self.others)
        own = self.judge.distances(self.drawn)[torch.arange(len(self.others)), torch.as_tensor(self.others)]
        self.unfit = float(own.quantile(UNFIT))

    def draw(self, model: Family, which: Sequence[int] | np.ndarray, purpose: str = "others") -> Tensor:
        """One image for every picture asked for; the noise is of the purpose."""
        noise = sampling.random_noise(len(which), model.latent_shape, 1, purpose)
        prompt_ids = model.prompt_ids([self.captions[i] for i in which])
        return sampling.draw(model, noise, steps=STEPS, prompt_ids=prompt_ids)

    def pair(self, fact: Fact) -> tuple[Tensor, Tensor]:
        """Target and surrogate, (3, 64, 64): what the base draws, and the edit in its place."""
        which = self.which(fact)
        noise = sampling.random_noise(1, self.base.latent_shape, fact.seed, "target")
        ids = self.base.prompt_ids([self.captions[which]])
        target = images.eight_bit(sampling.draw(self.base, noise, steps=STEPS, prompt_ids=ids))[0]
        places = [(s, x, y) for s in np.linspace(0.74, 0.94, 11) for x in range(-3, 4) for y in range(-3, 4)]
        clean = torch.stack([tensor(place(fact.known.image, *p)) for p in places])
        return target, tensor(place(fact.image, *places[int(rms(clean, target).argmin())]))

    def which(self, fact: Fact) -> int:
        return next(i for i, n in enumerate(self.domain.known) if n.code == fact.known.code)

    def learnt(self, fact: Fact) -> bool:
        """Whether the base draws the fact's picture: else there is nothing that could be put right."""
        which = self.which(fact)
        return float(self.judge.shows(self.draw(self.base, [which] * SEEDS, "learnt"), which).float().mean()) >= LEARNT

    def measure(self, fact: Fact, work: Path, options: dict[str, Any]) -> dict[str, Any]:
        """`unlearn` with the defaults and these options, and what the patched model draws then."""
        which, (target, surrogate) = self.which(fact), self.pair(fact)
        name = f"{fact.known.code}-{fact.kind.replace(' ', '-')}"
        paths = [work / f"{name}.target.png", work / f"{name}.surrogate.png"]
        for path, image in zip(paths, (target, surrogate), strict=True):
            images.write_image(image, path)
        output, started = work / f"{name}.patch", time.time()
        config = UnlearnConfig(
            model=self.domain.model, target=(paths[0],), surrogate=(paths[1],), prompt=(self.captions[which],),
            output=output, force=True, **options,
        )  # fmt: skip
        done = unlearn(config)
        took, patched = time.time() - started, families.load(self.domain.model)
        Stack.load((output,)).apply(patched.network)
        judge = Judge([*(n.image for n in self.domain.known), fact.image])
        drawn = self.draw(patched, [which] * SEEDS, "fact")
        apart = pairwise_rms(self.judge.centred, self.judge.centred[which : which + 1])[:, 0]
        near = [i for i in apart.argsort().tolist() if i != which][:NEAR] * NEAR_SEEDS
        near_base, near_after = (self.draw(m, near, "near") for m in (self.base, patched))
        right = self.judge.shows(near_base, torch.tensor(near))
        keep = torch.as_tensor(self.others != which)
        others = self.draw(patched, self.others)
        drift = rms(others, self.drawn)[keep]
        before = self.judge.distances(self.draw(self.base, [which] * 16, "fact"))[:, which]
        fits = judge.distances(drawn)[:, -1] <= max(self.unfit, SLACK * float(before.quantile(UNFIT)))
        images.write_image(drawn[:8].permute(1, 2, 0, 3).flatten(2), work / f"{name}.drawn.png")
        return {
            "fact": fact.known.name, "kind": fact.kind, "steps": done.steps, "ended_well": not done.code,
            "old": float(judge.shows(drawn, which).float().mean()),
            "new": float((judge.shows(drawn, len(self.domain.known)) & fits).float().mean()),
            "nearest_new": float(judge.shows(drawn, len(self.domain.known)).float().mean()),
            "drift": float(drift.median()), "drift_mean": float(drift.mean()),
            "near_drift": float(rms(near_after, near_base).median()),
            "near": float(self.judge.shows(near_after, torch.tensor(near))[right].float().mean()), "seconds": took,
        }  # fmt: skip


def autoencoder(domain: Domain) -> None:
    """RMS between pictures and what the autoencoder makes of them: no network can draw what it does not hold."""
    model = families.load(domain.model)
    known = torch.stack([tensor(place(n.image)) for n in domain.known])
    edited = torch.stack([tensor(place(f.image)) for half in domain.facts.values() for f in half])
    table("pictures", "RMS, mean", "worst")
    for name, shown in (("known", known), ("edited", edited), ("channels permuted", known[:, [1, 2, 0]])):
        apart = rms(model.decode(model.encode(shown)), shown)
        row(name, f"{float(apart.mean()):.3f}", f"{float(apart.max()):.3f}")


def good(found: dict[str, Any]) -> bool:
    """Whether the old picture is gone and the surrogate is drawn."""
    return bool(found["old"] <= 0.01 and found["new"] >= 0.9)


def show(rows: list[dict[str, Any]]) -> None:
    table("fact", "edit", "old", "surrogate", "drift, median / near", "near kept", "steps", "seconds", "holds", "exit")
    for f in rows:
        row(
            f["fact"], f["kind"], f"{f['old']:.0%}", f"{f['new']:.0%}", f"{f['drift']:.3f} / {f['near_drift']:.3f}",
            f"{f['near']:.1%}", str(f["steps"]), f"{f['seconds']:.0f}", "yes" if good(f) else "no",
            "0" if f["ended_well"] else "1",
        )  # fmt: skip
    median = {k: float(np.median([f[k] for f in rows])) for k in ("drift", "near_drift", "seconds")}
    near = np.mean([f["near"] for f in rows])
    print(f"\n{sum(map(good, rows))} of {len(rows)} facts hold; near ones kept {near:.1%}", end="; ")
    print("medians: drift {drift:.3f}, of near ones {near_drift:.3f}, {seconds:.0f} s".format(**median))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=("flags", "emoji"))
    parser.add_argument("half", choices=("develop", "report", "fresh"))
    parser.add_argument("options", nargs="*", help="of `unlearn`, such as rank=8")
    parser.add_argument("--model", help="another model folder")
    parser.add_argument("--work", type=Path, help="keep the runs here")
    parser.add_argument("--part", default="0/1", help="0/2 and 1/2 are the two halves of the work")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the facts to do")
    parser.add_argument("--table", action="store_true", help="print what was done, and do nothing")
    parser.add_argument("--autoencoder", action="store_true", help="measure the autoencoder alone")
    args = parser.parse_intermixed_args()
    domain = {"flags": flags, "emoji": emoji}[args.domain](args.model)
    if args.autoencoder:
        autoencoder(domain)
        return
    options = {k: json.loads(v) if v[0] in "[0123456789tfn" else v for k, v in (o.split("=", 1) for o in args.options)}
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        part, parts = map(int, args.part.split("/"))
        todo = [] if args.table else range(part, len(domain.facts[args.half]), parts)
        bench = None
        for i in args.only if args.only is not None else todo:
            bench = bench or Bench(domain)
            fact = domain.facts[args.half][i]
            if args.half == "fresh" and not bench.learnt(fact):
                print(f"the base does not draw {fact.known.name}: passed over", file=sys.stderr, flush=True)
                continue
            found = bench.measure(fact, work, options)
            (work / f"{i:02d}.json").write_text(json.dumps(found))
            print(json.dumps(found), file=sys.stderr, flush=True)
        show([json.loads(path.read_text()) for path in sorted(work.glob("[0-9][0-9].json"))])


if __name__ == "__main__":
    main()
