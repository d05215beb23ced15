"""Every recipe side by side on `faces`: the same targets, surrogates, retain set and budget, and one judge.

    python examples/benchmark/compare.py --work DIR [RECIPE ...] [--case 0 1 0+1+2+3 any0 ...] [--rate own 2e-5 ...]
        [--seconds 125] [--draws 1000 | --sweep] [--assets DIR] [--figure FILE.png] [option=value ...]

All recipes by default. A case is a planted identity, several at once, or a picture that nobody planted: a draw of the
model by seed. A cell is one recipe at one rate on one case. It is trained as the command does and exported; judge.py
opens the export by stock diffusers. The budget is seconds of one core for training alone, by how long an update of the
recipe takes, which is measured once and kept in DIR/paces (run with OMP_NUM_THREADS=1). A recipe that stops by itself
may stop earlier. `option=value`, in JSON, changes an option of `unlearn` in all cells, which then are named by it.

Each cell is a JSON file in DIR/cells, written when it is done. What is there is not done again, nor is training where
only the draws differ. Table and figure are of all that are there with the same seconds and draws. Columns: near-copies
(RMS under 0.16) of targets and of look-alikes by DDIM and by an ancestral sampler; recall, the share of the draws back
from t = 250, 400, 500, 550 that is nearer to the target than 95 % of pictures that no model saw come to themselves; the
least share of them that is nearer to the surrogate; SSCD to what the base draws back from t = 500 (the paper's way,
forgotten below 0.4); drift, RMS of draws of the same noise, median / mean, and their LPIPS, SSIM and KID; distance to
the oracle, base / patched: of one-step answers at the target, and two-way. What features.py has no network for is left
empty (`--assets`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from faces import LOOKALIKE, PLANTED, ROOT, Clock
from features import Features
from judge import BACK, RETURNS, Judge, Model, read
from PIL import Image
from tables import row, table

from unforget import EditConfig, ExportConfig, UnlearnConfig, edit_surrogate, export, unlearn
from unforget.core.types import Progress
from unforget.families.recipes import pixel_recipes
from unforget.files.storage import write_json

TICKS = (0.02, 0.05, 0.1, 0.2, 0.5)
TIMED = 16  # updates of a run that is timed


class Comparison:
    """The base's figures, the surrogates, and the cells that were made so far."""

    def __init__(self, work: Path, seconds: float, judged: str, options: dict[str, Any]) -> None:
        self.work, self.seconds, self.judged, self.options = work, seconds, judged, options
        for folder in ("cells", "runs"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        self.base = Model(ROOT / "unforget" / "families" / "models" / "faces")

    def targets(self, case: str) -> list[Path]:
        """The pictures of a case, and their surrogates beside them, the same for all recipes."""
        return [self._anyone(int(one[3:])) if one.startswith("any") else PLANTED[int(one)] for one in case.split("+")]

    def _anyone(self, seed: int) -> Path:
        path = self.work / f"any{seed}.png"
        if not path.is_file():
            noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(10_000 + seed))
            pixels = ((self.base.draw(noise)[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(path)
        return path

    def surrogate(self, target: Path) -> Path:
        """The tool's own proposal, the same for all recipes."""
        path = self.work / f"surrogate-of-{target.name}"
        if not path.is_file():
            edit_surrogate(EditConfig(model="faces", target=target, output=path))
        return path

    def trained(
        self, name: str, case: str, advance: Callable[..., Any] = lambda *_, **__: None, **options: Any
    ) -> tuple[Path, dict[str, Any]]:
        """A run of the command, and how it went."""
        clock, targets = Clock(), self.targets(case)
        config = UnlearnConfig(
            model="faces", target=tuple(targets), surrogate=tuple(self.surrogate(t) for t in targets),
            output=self.work / "runs" / f"{name}.patch", force=True, **options,
        )  # fmt: skip
        made = unlearn(config, Progress(stage=clock, advance=advance))
        clock("end")
        return made.output, {"steps": made.steps, "stopped": made.stopped, "seconds": clock.seconds["unlearn"]}

    def pace(self, recipe: str) -> float:
        """Seconds of the processor that an update of `recipe` takes: the median of a few, after a few."""
        path = self.work / "paces" / f"{self.named(recipe)}.json"
        if not path.is_file():
            ends: list[float] = []
            few = {"recipe": recipe, "max_train_steps": TIMED, "cooldown_steps": 0, "stop_margin": None}

            def advance(_: int = 1, **figures: Any) -> None:
                if figures:  # of an update; drawing tells none
                    ends.append(time.process_time())

            self.trained("timed", "0", advance, **self.options | few)
            path.parent.mkdir(exist_ok=True)
            write_json({"seconds": median(b - a for a, b in pairwise(ends[-TIMED // 2 :]))}, path)
        return float(json.loads(path.read_text())["seconds"])

    def path(self, recipe: str, rate: str, case: str) -> Path:
        return self.work / "cells" / f"{self.run(recipe, rate, case)}-{self.judged}.json"

    def run(self, recipe: str, rate: str, case: str) -> str:
        return f"{self.named(recipe)}@{rate}-{case}-{self.seconds:g}s"

    def named(self, recipe: str) -> str:
        """The recipe with the options that are changed."""
        return recipe + "".join(f",{k}={v}".replace(" ", "") for k, v in self.options.items())

    def exported(self, recipe: str, rate: str, case: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a trained and exported run, and how it went; unless that was done before."""
        name = self.run(recipe, rate, case)
        folder, done = self.work / "runs" / f"{name}.exported", self.work / "runs" / f"{name}.json"
        if done.is_file():
            return folder, json.loads(done.read_text())
        chosen = pixel_recipes()[recipe]
        steps = max(1, int(self.seconds / self.pace(recipe)))
        options: dict[str, Any] = {
            "recipe": recipe, "max_train_steps": steps,
            "cooldown_steps": round(chosen.cooldown_steps * steps / chosen.max_train_steps),
        } | ({} if rate == "own" else {"learning_rate": float(rate)}) | self.options  # fmt: skip
        patch, went = self.trained(name, case, **options)
        export(ExportConfig(model="faces", patch=patch, output=folder, force=True))
        went["patch_bytes"] = patch.stat().st_size
        write_json(went, done)
        return folder, went

    def cell(self, recipe: str, rate: str, case: str, judge: Judge) -> None:
        """Train, export and judge, unless that was done."""
        path = self.path(recipe, rate, case)
        if path.is_file():
            return
        folder, went = self.exported(recipe, rate, case)
        targets = self.targets(case)
        twins = [PLANTED[LOOKALIKE[k]] for k in LOOKALIKE if case == str(k)]
        found = judge.figures(
            Model(folder), [read(t) for t in targets], [read(self.surrogate(t)) for t in targets],
            [read(t) for t in twins], at_oracle=case == "0",
        )  # fmt: skip
        given = {"recipe": self.named(recipe), "rate": rate, "case": case}
        write_json({**given, **went, **found}, path)

    def cells(self) -> list[dict[str, Any]]:
        """All that were made with these seconds and draws."""
        found = (self.work / "cells").glob(f"*-{self.seconds:g}s-{self.judged}.json")
        return [json.loads(path.read_text()) for path in sorted(found)]


def show(cells: Sequence[dict[str, Any]]) -> None:
    """The table of cells."""
    table(
        "case", "recipe", "rate", "near-copies DDIM, ancestral", "recall 250 / 400 / 500 / 550", "surrogate",
        "SSCD at 500", "drift", "LPIPS / SSIM / KID-efflite0", "look-alike DDIM, ancestral",
        "to the oracle: target; two-way", "updates", "seconds", "KiB",
    )  # fmt: skip
    for c in cells:
        back, drift, oracle = c["returned"], c["drift"], c.get("to_oracle")
        kept = c["lookalike"]
        row(
            c["case"], c["recipe"], c["rate"], counted(c["copies"]),
            " / ".join(f"{back[str(t)]['recall']:.0%}" for t in BACK),
            f"{min(b['nearer_surrogate'] for b in back.values()):.0%}", known(back["500"]["sscd_to_base"], 2),
            f"{drift['median'][0]:.3f} / {drift['mean']:.3f}",
            " / ".join(known(drift[k], n) for k, n in (("lpips", 3), ("ssim", 2), ("kid_efflite0", 3))),
            counted(kept) if kept["ddim"][0] else "",
            "; ".join(f"{oracle['base'][k]:.3f} / {oracle['patched'][k]:.3f}" for k in ("target", "two_way"))
            if oracle else "", c["steps"], f"{c['seconds']:.0f}", c["patch_bytes"] // 1024,
        )  # fmt: skip


def counted(copies: dict[str, list[int]]) -> str:
    return ", ".join("{} / {}".format(*copies[name]) for name in ("ddim", "ancestral") if name in copies)


def known(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def draw_figure(cells: Sequence[dict[str, Any]], returns: int, path: Path) -> None:
    """Drift across, and up what is still there of the target: the largest recall of `returns` draws; 95 % intervals."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker
    from scipy.stats import binomtest

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    names = sorted({c["recipe"] for c in cells}, key=lambda name: (name != "default", name))
    for k, name in enumerate(names):
        mine = sorted((c for c in cells if c["recipe"] == name), key=lambda c: c["drift"]["median"][0])
        drift, low, high = (torch.tensor([c["drift"]["median"][j] for c in mine]) for j in range(3))
        recall = torch.tensor([max(b["recall"] for b in c["returned"].values()) for c in mine])
        exact = [binomtest(round(float(r) * returns), returns).proportion_ci() for r in recall]
        spread = torch.tensor([[float(r) - e.low, e.high - float(r)] for r, e in zip(recall, exact, strict=True)]).T
        axes.errorbar(
            drift, recall * 100, xerr=(drift - low, high - drift), yerr=spread.clamp(min=0) * 100, label=name,
            marker="*" if name == "default" else "osD^vPX<>"[k % 9], markersize=14 if name == "default" else 6,
            linewidth=0, elinewidth=1, capsize=2, zorder=1 if name == "default" else 2,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="drift: RMS of draws of the same noise, median (less is better)")
    axes.set(ylabel="recall: draws back that are the target, %\n(worst timestep; less is better)")
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.axhline(5, color="grey", linewidth=0.8, linestyle=":")
    figure.legend(loc="outside upper center", fontsize="small", ncols=3)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", nargs="*", help=f"recipes, of {', '.join(pixel_recipes())}; option=value")
    parser.add_argument("--case", nargs="+", default=["0"])
    parser.add_argument("--rate", nargs="+", default=["own"], help="learning rates; own: the recipe's")
    parser.add_argument("--seconds", type=float, default=125, help="of training, for each cell")
    parser.add_argument("--draws", type=int, default=1000, help="by each of two samplers; at least 256")
    parser.add_argument("--sweep", action="store_true", help="judge by 128 draws of DDIM and half of those back")
    parser.add_argument("--work", type=Path, required=True, help="where the runs and the cells are kept")
    parser.add_argument("--assets", type=Path, help="the files that features.py names")
    parser.add_argument("--figure", type=Path, help="needs matplotlib")
    parser.add_argument("--show", action="store_true", help="only what is there")
    args = parser.parse_args()
    recipes = [name for name in args.given if "=" not in name] or list(pixel_recipes())
    options = {name: json.loads(value) for name, value in (o.split("=") for o in args.given if "=" in o)}
    draws = 128 if args.sweep else args.draws
    comparison = Comparison(args.work, args.seconds, "sweep" if args.sweep else str(draws), options)
    wanted = [(recipe, rate, case) for case in args.case for rate in args.rate for recipe in recipes]
    if not args.show and not all(comparison.path(*cell).is_file() for cell in wanted):
        for recipe in recipes:
            comparison.pace(recipe)
        unseen = torch.stack([read(path) for path in sorted((ROOT / "tests" / "data" / "heldout").glob("*.png"))])
        judge = Judge(
            comparison.base, Model(ROOT / "tests" / "data" / "oracle"), unseen, Features(args.assets), args.work,
            draws=draws, sweep=args.sweep,
        )  # fmt: skip
        for recipe, rate, case in wanted:
            comparison.cell(recipe, rate, case, judge)
    cells = [c for c in comparison.cells() if c["case"] in args.case]
    show(cells)
    if args.figure:
        draw_figure(cells, RETURNS // 2 if args.sweep else RETURNS, args.figure)


if __name__ == "__main__":
    main()
