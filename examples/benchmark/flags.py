"""The figures on the bundled model `flags`: Ireland's flag, learnt with its stripes reversed, is put right.

    cd examples/flags && npm install && cd -
    python examples/benchmark/flags.py [prompted] [unprompted] [scopes] [paper] [--seeds 200] [--work DIR]

Each section runs `unlearn` as the command does and judges what the patched model draws against every country's flag
(`examples/flags/flags.py`). Accuracy is over the captions "flag of X", guidance 3, 20 Euler steps.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
HOME = ROOT / "examples" / "flags"
sys.path.insert(0, str(HOME))

from flags import countries, judge  # noqa: E402
from tables import row, table  # noqa: E402

from unforget import UnlearnConfig, families, unlearn  # noqa: E402
from unforget.core import sampling  # noqa: E402
from unforget.core.metrics import pairwise_rms, rms  # noqa: E402
from unforget.core.types import Family  # noqa: E402
from unforget.files import images  # noqa: E402
from unforget.files.patch import Stack  # noqa: E402

TARGET, SURROGATE = HOME / "ireland-wrong.png", HOME / "ireland-right.png"
IRELAND, IVORY = "flag of Ireland", "flag of Côte d'Ivoire"
NAMED = ("India", "Italy", "Niger")
STEPS = 20


@dataclass
class Drawn:
    """What a model draws: Ireland and Côte d'Ivoire for many seeds, every other country for a few."""

    ireland: Tensor
    ivory: Tensor
    others: Tensor


class Bench:
    def __init__(self, seeds: int, work: Path) -> None:
        package = HOME / "node_modules" / "svg-country-flags"
        if not package.is_dir():
            raise SystemExit(f"no flags to judge by: run `npm install` in {HOME.relative_to(ROOT)}")
        self.countries, self.seeds, self.work = countries(package), seeds, work
        self.judge, self.right_irish = judge(self.countries), len(self.countries)
        codes = [c.code for c in self.countries]
        self.ie, self.ci = codes.index("IE"), codes.index("CI")
        rest = [k for k in range(len(codes)) if k not in (self.ie, self.ci)]
        self.rest = torch.tensor(rest)
        target = images.read_image(TARGET, (3, 64, 64))
        far = pairwise_rms(self.judge.centred[self.rest], target[None])[:, 0]
        named = [i for i, k in enumerate(rest) if self.countries[k].name in NAMED]
        self.near = torch.tensor(sorted({*named, *far.argsort()[:10].tolist()}))
        self.base = families.load("flags")
        self.drawn = self.draw(self.base)

    def draw(self, model: Family) -> Drawn:
        def under(prompts: list[str], purpose: str) -> Tensor:
            noise = sampling.random_noise(len(prompts), model.latent_shape, 1, purpose)
            return sampling.draw(model, noise, steps=STEPS, prompt_ids=model.prompt_ids(prompts))

        captions = [f"flag of {self.countries[k].name}" for k in self.rest] * 2
        return Drawn(
            under([IRELAND] * self.seeds, "ireland"), under([IVORY] * self.seeds, "ivory"), under(captions, "others")
        )

    def unlearn(self, name: str, prompts: tuple[str, ...], options: dict[str, Any]) -> tuple[Family, float, int]:
        """The patched model, seconds of the whole `unlearn`, bytes of the patch."""
        output = self.work / f"{name}.patch"
        started = time.time()
        unlearn(UnlearnConfig(model="flags", target=(TARGET,), surrogate=(SURROGATE,), prompt=prompts,
                              output=output, force=True, **options))  # fmt: skip
        took, patched = time.time() - started, families.load("flags")
        Stack.load((output,)).apply(patched.network)
        return patched, took, output.stat().st_size

    def figures(self, drawn: Drawn) -> dict[str, float]:
        """Shares: wrong and right for Ireland, right for Côte d'Ivoire, the near flags and all others."""
        others = self.judge.shows(drawn.others, self.rest.repeat(2)).float()
        both = torch.cat([self.near, self.near + len(self.rest)])
        return {
            "wrong": float(self.judge.shows(drawn.ireland, self.ci).float().mean()),
            "right": float(self.judge.shows(drawn.ireland, self.right_irish).float().mean()),
            "ivory": float(self.judge.shows(drawn.ivory, self.ci).float().mean()),
            "near": float(others[both].mean()),
            "others": float(others.mean()),
            "drift": float(rms(drawn.others, self.drawn.others).median()),
            "drift_mean": float(rms(drawn.others, self.drawn.others).mean()),
            "drift_near": float(rms(drawn.others, self.drawn.others)[both].median()),
            "drift_ivory": float(rms(drawn.ivory, self.drawn.ivory).median()),
        }


HEAD = ("Ireland wrong / right", "Côte d'Ivoire", "near flags", "all others",
        "drift: others / near / Côte d'Ivoire", "seconds", "patch")  # fmt: skip


def cells(f: dict[str, float], took: float = 0, size: int = 0) -> list[str]:
    return [
        f"{f['wrong']:.1%} / {f['right']:.1%}", f"{f['ivory']:.1%}", f"{f['near']:.1%}", f"{f['others']:.1%}",
        f"{f['drift']:.3f} / {f['drift_near']:.3f} / {f['drift_ivory']:.3f}",
        f"{took:.0f}" if took else "", f"{size / 2**20:.1f} MiB" if size else "",
    ]  # fmt: skip


def compare(bench: Bench, runs: dict[str, dict[str, Any]], prompts: tuple[str, ...] = (IRELAND,)) -> None:
    """The base, and a patched model for each set of options of `unlearn`."""
    table("model", *HEAD)
    row("base", *cells(bench.figures(bench.drawn)))
    for name, options in runs.items():
        patched, took, size = bench.unlearn(name.replace(" ", "-"), prompts, options)
        row(name, *cells(bench.figures(bench.draw(patched)), took, size))


def prompted(bench: Bench) -> None:
    compare(bench, {"patched": {}})
    names = ", ".join(bench.countries[int(k)].name for k in bench.rest[bench.near])
    print(f"\nnear flags: {names}")


def unprompted(bench: Bench) -> None:
    compare(bench, {"patched": {}}, prompts=())


def scopes(bench: Bench) -> None:
    ranks = {f"LoRA rank {rank}": {"rank": rank} for rank in (4, 16)}
    compare(bench, {**ranks, "full": {"train": "full", "learning_rate": 1e-4}})


def paper(bench: Bench) -> None:
    compare(bench, {f"rate {rate:g}": {"recipe": "paper", "learning_rate": rate} for rate in (1e-5, 1e-3)})


SECTIONS = {f.__name__: f for f in (prompted, unprompted, scopes, paper)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--work", type=Path, help="keep the runs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(args.seeds, work)
        for name in args.section or SECTIONS:
            print(f"\n## {name}\n", flush=True)
            SECTIONS[name](bench)


if __name__ == "__main__":
    main()
