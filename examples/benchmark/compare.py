"""Every recipe side by side on `faces`: the same targets, surrogates, retain set and wall time, and one judge.

    python examples/benchmark/compare.py --work DIR [RECIPE ...] [--target 0 1] [--rate own 2e-5 1e-4 ...]
        [--seconds 125] [--draws 1000]

All recipes by default. A cell is one recipe at one rate on one planted identity. It is trained as the command does, for
as many updates as fit into the seconds by a timing of a few (a recipe that stops early by itself may), and exported.
The judge opens the export by stock diffusers and shares no code with training: its own DDIM loop, noise and distances.
Each cell is a JSON file in DIR/cells, written when it is done; what is there is not done again, and the table is of all
that are there.

Columns: near-copies (RMS under 0.16) of the target and of its look-alike in the draws, against the base's; RMS to the
target of what comes back from t = 250, 400, 500, 550, and the share that is nearer to the surrogate; drift, RMS between
base and patched draws of the same noise, median / mean; the mean RMS, over t = 100, 150, .. 700, of one-step clean
images of the noised target to those of the model that never saw it (identity 0 alone), against the base's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline
from faces import LOOKALIKE, NEAR_COPY, PLANTED, ROOT, SEEDS, STEPS, Clock
from PIL import Image
from tables import row, table
from torch import Tensor

from unforget import EditConfig, ExportConfig, UnlearnConfig, edit_surrogate, export, unlearn
from unforget.core.types import Progress
from unforget.families.recipes import pixel_recipes
from unforget.files.storage import write_json

BACK = (250, 400, 500, 550)
ONE_STEP = range(100, 701, 50)
RETURNS = 64  # reconstructions at each timestep
TIMED = 8  # updates that are timed


class Judge:
    """A stock pipeline's network, drawn from by a loop of its own."""

    def __init__(self, folder: Path) -> None:
        pipeline = DDPMPipeline.from_pretrained(folder)
        self.network = pipeline.unet.eval()
        self.alphas_cumprod = pipeline.scheduler.alphas_cumprod
        self.sampler = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.sampler.set_timesteps(STEPS)

    @torch.no_grad()
    def denoised(self, x_t: Tensor, start: int = 1000) -> Tensor:
        """DDIM from the visited timesteps at `start` and below, (N, 3, H, W), a few images at a time."""
        parts = []
        for part in x_t.split(64):
            for t in self.sampler.timesteps[self.sampler.timesteps <= start]:
                part = self.sampler.step(self.network(part, t).sample, t, part).prev_sample
            parts.append(part.clamp(-1, 1))
        return torch.cat(parts)

    def noised(self, image: Tensor, noise: Tensor, t: int) -> Tensor:
        """One image (3, H, W) with each noise."""
        kept = self.alphas_cumprod[t]
        return kept.sqrt() * image + (1 - kept).sqrt() * noise

    def returned(self, image: Tensor, noise: Tensor, t: int) -> Tensor:
        """What comes back of an image that is noised to the visited timestep nearest to t."""
        start = int(min(self.sampler.timesteps, key=lambda visited: abs(int(visited) - t)))
        return self.denoised(self.noised(image, noise, start), start)

    @torch.no_grad()
    def clean(self, image: Tensor, noise: Tensor, t: int) -> Tensor:
        """One-step clean images of the noised image."""
        x_t, kept = self.noised(image, noise, t), self.alphas_cumprod[t]
        return (x_t - (1 - kept).sqrt() * self.network(x_t, t).sample) / kept.sqrt()


def apart(a: Tensor, b: Tensor) -> Tensor:
    """RMS of images, (N,)."""
    return (a - b).square().flatten(1).mean(1).sqrt()


def read(path: Path) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    with Image.open(path) as image:
        values = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32)
        return values.reshape(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


class Comparison:
    """The base's figures, the surrogates, and the cells that were made so far."""

    def __init__(self, work: Path, seconds: float, draws: int) -> None:
        self.work, self.seconds, self.draws = work, seconds, draws
        (work / "cells").mkdir(parents=True, exist_ok=True)
        self.base = Judge(ROOT / "unforget" / "families" / "models" / "faces")
        self.oracle = Judge(ROOT / "tests" / "data" / "oracle")
        self.planted = [read(path) for path in PLANTED]
        generator = torch.Generator().manual_seed(20_261_126)
        size = self.planted[0].shape
        self.start = torch.randn(draws, *size, generator=generator)
        self.noise = torch.randn(min(RETURNS, draws), *size, generator=generator)
        self.drawn = self.base.denoised(self.start)

    def surrogate(self, target: int) -> Path:
        """The same for all recipes."""
        path = self.work / f"surrogate-{target}.png"
        if not path.is_file():
            edit_surrogate(EditConfig(model="faces", target=PLANTED[target], output=path))
        return path

    def trained(self, name: str, target: int, **options: Any) -> tuple[Path, dict[str, Any]]:
        """A run of the command with options, and how it went."""
        clock = Clock()
        config = UnlearnConfig(
            model="faces", target=PLANTED[target], surrogate=self.surrogate(target), output=self.work / f"{name}.patch",
            force=True, **options,
        )  # fmt: skip
        made = unlearn(config, Progress(stage=clock))
        clock("end")
        return made.output, {"steps": made.steps, "stopped": made.stopped, "seconds": clock.seconds["unlearn"]}

    def cell(self, recipe: str, rate: str, target: int) -> None:
        """Train, export and judge, unless that was done."""
        name = f"{recipe}@{rate}-{target}-{self.seconds:g}s-{self.draws}"
        path = self.work / "cells" / f"{name}.json"
        if path.is_file():
            return
        chosen = pixel_recipes()[recipe]
        options: dict[str, Any] = {"recipe": recipe} | ({} if rate == "own" else {"learning_rate": float(rate)})
        few = {"max_train_steps": TIMED, "cooldown_steps": 0, "stop_margin": None}
        # The first run also draws what all others read from the cache; its seconds are those of training alone.
        timed = self.trained(f"{name}.timed", target, **options, **few)[1]
        steps = max(1, int(self.seconds * timed["steps"] / timed["seconds"]))
        cooled = round(chosen.cooldown_steps * steps / chosen.max_train_steps)
        patch, went = self.trained(name, target, **options, max_train_steps=steps, cooldown_steps=cooled)
        folder = self.work / f"{name}.exported"
        export(ExportConfig(model="faces", patch=patch, output=folder, force=True))
        given = {"recipe": recipe, "rate": rate, "target": target, "wanted_seconds": self.seconds, "draws": self.draws}
        found = self.judged(Judge(folder), target)
        write_json({**given, **went, "patch_bytes": patch.stat().st_size, **found}, path)

    def judged(self, candidate: Judge, target: int) -> dict[str, Any]:
        """Figures of a candidate, beside the base's."""
        image, surrogate = self.planted[target], read(self.surrogate(target))
        drawn = candidate.denoised(self.start)
        pair, twin = {"base": self.drawn, "patched": drawn}, LOOKALIKE.get(target)
        found: dict[str, Any] = {"copies": {}, "lookalike": {}, "returned": {}}
        for role, images in pair.items():
            found["copies"][role] = int((apart(images[: self.draws], image) < NEAR_COPY).sum())
            if twin is not None:
                found["lookalike"][role] = int((apart(images[: self.draws], self.planted[twin]) < NEAR_COPY).sum())
        for t in BACK:
            back = candidate.returned(image, self.noise, t)
            nearer = apart(back, surrogate) < apart(back, image)
            found["returned"][str(t)] = {
                "to_target": float(apart(back, image).mean()), "nearer_surrogate": float(nearer.float().mean()),
            }  # fmt: skip
        moved = apart(drawn[:SEEDS], self.drawn[:SEEDS])
        found["drift"] = {"median": float(moved.median()), "mean": float(moved.mean())}
        if target == 0:
            found["to_oracle"] = {
                role: sum(float(self._from_oracle(model, image, t)) for t in ONE_STEP) / len(ONE_STEP)
                for role, model in {"base": self.base, "patched": candidate}.items()
            }
        return found

    def _from_oracle(self, model: Judge, image: Tensor, t: int) -> Tensor:
        return apart(model.clean(image, self.noise, t), self.oracle.clean(image, self.noise, t)).mean()

    def show(self) -> None:
        """The table of all cells."""
        table(
            "recipe", "rate", "target", "near-copies, base / patched", "RMS to the target from 250 / 400 / 500 / 550",
            "nearer to the surrogate", "drift median / mean", "look-alike, base / patched",
            "to the oracle, base / patched", "steps", "seconds", "KiB",
        )  # fmt: skip
        for path in sorted((self.work / "cells").glob("*.json")):
            c = json.loads(path.read_text())
            back = c["returned"].values()
            row(
                c["recipe"], c["rate"], c["target"], f"{c['copies']['base']} / {c['copies']['patched']}",
                " / ".join(f"{b['to_target']:.2f}" for b in back),
                " / ".join(f"{b['nearer_surrogate']:.0%}" for b in back),
                f"{c['drift']['median']:.3f} / {c['drift']['mean']:.3f}",
                f"{c['lookalike']['base']} / {c['lookalike']['patched']}" if c["lookalike"] else "none planted",
                f"{c['to_oracle']['base']:.3f} / {c['to_oracle']['patched']:.3f}" if "to_oracle" in c else "no oracle",
                c["steps"], f"{c['seconds']:.0f}", c["patch_bytes"] // 1024,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="*", help=f"of {', '.join(pixel_recipes())}")
    parser.add_argument("--target", nargs="+", type=int, default=[0], choices=range(len(PLANTED)))
    parser.add_argument("--rate", nargs="+", default=["own"], help="learning rates; own: the recipe's")
    parser.add_argument("--seconds", type=float, default=125, help="of training, for each cell")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--work", type=Path, required=True, help="where the runs and the cells are kept")
    args = parser.parse_args()
    comparison = Comparison(args.work, args.seconds, args.draws)
    for target in args.target:
        for recipe in args.recipe or pixel_recipes():
            for rate in args.rate:
                comparison.cell(recipe, rate, target)
    comparison.show()


if __name__ == "__main__":
    main()
