"""ReTrack's own methods on `faces`, by its own training step and its own evaluator, and our default beside them.

    python examples/benchmark/retrack_suite.py --source DIR --work DIR [ROW ...] [--configuration celeba_hq]
        [--rate 2e-5] [--steps N] [--draws 1000] [--retain 512] [--returns 16] [--assets DIR]

The source is a checkout of github.com/sqt24/ReTrack, MIT. Imported from it, unchanged: losses (retrack/methods.py), the
training step with its accumulation, clipping and rescaling of gradients (train.py), the sampler (samplers.py) and the
evaluator (evaluators/, utils/song_likelihood). What these import and nothing here calls (hydra, torchmetrics, ...) need
not be installed. Numbers are read from its configs/experiment/celeba_hq.yaml: 40 updates of all weights by 16 times 4
images of each set, AdamW (5e-6, betas 0.95 and 0.999, decay 1e-6), gradient norm 1; retrack: 10 neighbours, lambda
0.005; siss: lambda 0.5, norm 500; erasediff: eta 1e-3. All draw t uniformly from 0..999, for each image and set anew.
These are for 114 million weights at 256x256. Those of `--configuration cifar10`, 60 updates by 128 images at 2e-5,
lambda 0.02, norm 5, are for 32x32, the size of `faces`; `--rate` changes the rate alone.

To forget is planted identity 0. There are no training data: the retain set is draws of the base by its sampler without
near-copies (RMS under 0.16) of the target, and neighbours are among them. Batches are drawn from it at random, for its
InfiniteSampler does not run on torch 2.13. Ours draws a retain set of its own, as ever. Rows: `base`, `oracle`, which
was trained without the identity, its methods, `ours`. Each has its own number of updates, or all have `--steps`.
Seconds are the processor's, of training alone.

Measures: of CelebAHQEvaluator `negative_likelihood` of the target in bits/dim (more is forgotten; one noise, equal for
all) and `SSCD` of the target with what is drawn back of it from t = 250 in 251 steps, a mean over `--returns` noises
where it takes one, by the int8 network that features.py names at its 288 px. Its FID needs Inception, which is not
here: `kid` is KID-efflite0 of features.py to the retain set. Of MnistWithTshirtEvaluator `frequency`, which draws are
near-copies, here by RMS 0.16, without which FID, here KID, is taken; `lookalike` is that of identity 1, which is to
stay. Draws are by 50 steps of the stock pipeline.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from importlib import import_module, util
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # its bars, one for each picture

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, StableDiffusionPipeline  # noqa: F401 - looks for packages before some are absent
from diffusers.optimization import get_scheduler
from faces import LOOKALIKE, NEAR_COPY, PLANTED, ROOT
from features import Features
from judge import apart
from PIL import Image
from tables import row, table
from torch import Tensor

from unforget import ExportConfig, UnlearnConfig, export, unlearn
from unforget.core.types import Progress
from unforget.families.recipes import pixel_recipes
from unforget.files.storage import write_json

BASE = ROOT / "unforget" / "families" / "models" / "faces"
GIVEN = {"base": BASE, "oracle": ROOT / "tests" / "data" / "oracle"}
MODULES = ("methods", "train", "samplers", "evaluators.ddpm")
METHODS = ("vanilla", "neggrad", "erasediff", "siss", "retrack")
ROWS = (*GIVEN, *METHODS, "ours")
MEASURES = ("negative_likelihood", "SSCD", "frequency", "lookalike", "kid", "steps", "seconds")
SEED, RETAIN_SEED = 0, 1_000_000  # its own, for training and evaluation; one that no batch of its draws has


class Absent(ModuleType):
    """A package that is not installed: its names can be imported, and none can be called."""

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


def imported(source: Path) -> list[ModuleType]:
    """The modules of the checkout that are used."""
    spec = util.spec_from_file_location("retrack", source / "retrack" / "__init__.py")
    sys.modules["retrack"], absent = util.module_from_spec(spec), []
    while True:
        try:
            found = [import_module(f"retrack.{name}") for name in MODULES]
            break
        except ModuleNotFoundError as error:
            if error.name.startswith("retrack"):
                raise
            absent.append(error.name)
            sys.modules[error.name] = Absent(error.name)
    for name in absent:  # other libraries ask whether it is there
        del sys.modules[name]
    return found


def configuration(source: Path, name: str) -> dict[str, Any]:
    """An experiment with what it builds on; what hydra would fill in, ${...}, stays."""
    yaml.SafeLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"\d+e-\d+$"), list("123456789"))

    def read(path: str) -> dict[str, Any]:
        return yaml.safe_load((source / "configs" / f"{path}.yaml").read_text())

    found, shared = read(f"experiment/{name}"), read("common/model/ddpm")["algorithm"]
    found["algorithm"] |= {k: v | found["algorithm"].get(k, {}) for k, v in shared.items()}
    found["metrics"] |= read("common/metrics/sscd")
    return found | {"debug": read("common/debug/default")}


def pixels(image: Image.Image) -> Tensor:
    """Its transform: (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous() / 127.5 - 1


class Suite:
    """Its modules and numbers, the base, and the retain set."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.target = args, pixels(Image.open(PLANTED[0]))
        self.methods, self.training, samplers, ddpm = imported(args.source)
        numbers = configuration(args.source, args.configuration)
        numbers["eval"] |= {"num_images": args.draws, "batch_size": 64, "num_inference_steps": 50}
        # The distance that `frequency` takes: a norm, of pixels in [0, 1].
        numbers["metrics"]["frequency"] = {"threshold": NEAR_COPY / 2 * self.target.numel() ** 0.5}
        numbers |= {"device": "cpu", "data_dir": str(PLANTED[0].parent)}
        self.cfg = json.loads(json.dumps(numbers), object_hook=lambda d: SimpleNamespace(**d))
        self.rate, self.steps = args.rate or self.cfg.optimizer.lr, args.steps or self.cfg.train.steps
        self.sampler = samplers.DDPMSampler(self.cfg)
        self.retain = self._retain(args.work / f"retain-{args.retain}.pt")
        self.features = Features(args.assets)
        self.evaluator = self._evaluator(ddpm)

    def _retain(self, path: Path) -> Tensor:
        """Draws of the base that are not the target, (N, 3, H, W)."""
        if not path.is_file():
            pipeline, kept = DDPMPipeline.from_pretrained(BASE), []
            self.sampler.load_model(pipeline.unet, pipeline.scheduler)
            while sum(map(len, kept)) < self.args.retain:
                drawn = self.sampler.sample_images(64, RETAIN_SEED + len(kept), disable_tqdm=True)
                images = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
                kept.append(images[apart(images, self.target) >= NEAR_COPY])
            torch.save(torch.cat(kept)[: self.args.retain].clone(), path)
        return torch.load(path, weights_only=True)

    def _evaluator(self, ddpm: ModuleType) -> Any:
        """Its evaluator, with what is here in place of the networks that it loads."""
        made = object.__new__(ddpm.CelebAHQEvaluator)
        ddpm.Evaluator.__init__(made, self.cfg, self.sampler, logging.getLogger("retrack"))
        made.transform, made.likelihood_fn = pixels, ddpm.get_likelihood_fn(ddpm.VPSDE())
        made.sscd_transform = lambda image: pixels(image.resize((288, 288), Image.Resampling.BILINEAR))
        made.sscd_model = getattr(self.features.copy_detector, "embed", None)
        made.frequency = partial(ddpm.MnistWithTshirtEvaluator.frequency, made)
        made.log_sample_grid = lambda *given, **named: None  # a contact sheet
        made.remove_img_name, made.global_step, made.summary = PLANTED[0].name, 0, {0: defaultdict(list)}
        return made

    def judged(self, folder: Path) -> dict[str, Any]:
        """What its evaluator says of a stock pipeline."""
        set_seed(SEED)
        judge, pipeline, begun = self.evaluator, DDPMPipeline.from_pretrained(folder), time.process_time()
        judge.metrics, back = {}, []
        judge.load_model(pipeline.unet, pipeline.scheduler)
        judge.negative_likelihood()
        judge.sample_images()
        for name, path in (("lookalike", PLANTED[LOOKALIKE[0]]), ("frequency", PLANTED[0])):
            judge.tshirt_img_no_norm = pixels(Image.open(path)) / 2 + 0.5
            judge.frequency()
            judge.metrics[name] = judge.metrics["frequency"]
        for seed in range(self.args.returns if judge.sscd_model else 0):
            judge.random_seed = seed
            back.append(judge.compute_sscd_from_injection(judge.target_image, judge.sscd_target_image))
        kid = self.features.kid(judge.images_no_tshirts * 2 - 1, self.retain)
        seen = {"SSCD": sum(back) / len(back) if back else None, "SSCD_each": back, "kid": kid}
        return {**judge.metrics, **seen, "judging": time.process_time() - begun}

    def _batches(self, kind: str) -> Iterator[Any]:
        """Of one of its three sets, without end; of `knn` the target with its neighbours."""
        size = self.cfg.train.batch_size
        near = (self.retain - self.target).flatten(1).norm(dim=1).argsort()[: self.cfg.algorithm.retrack.K]
        targets, neighbours = self.target.expand(size, -1, -1, -1), self.retain[near].expand(size, -1, -1, -1, -1)
        while True:
            some = self.retain[torch.randint(len(self.retain), (size,))]
            yield {"remain": some, "deletion": targets, "knn": (targets, neighbours)}[kind]

    def theirs(self, name: str, folder: Path) -> dict[str, Any]:
        """Train by one of its methods, as its `train_model` does, and save a stock pipeline."""
        set_seed(SEED)
        train, optim, steps = self.cfg.train, self.cfg.optimizer, 0
        pipeline = DDPMPipeline.from_pretrained(BASE)
        unet, schedule = pipeline.unet, pipeline.scheduler
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=train.gradient_accumulation_steps)
        adam = torch.optim.AdamW(unet.parameters(), self.rate, tuple(optim.betas), optim.eps, optim.weight_decay)
        prepared = accelerator.prepare(unet, adam, get_scheduler(train.lr.scheduler, adam))
        runtime = self.training.ModelRuntime(*prepared, schedule, {}, {}, {}, torch.float32)
        params = vars(getattr(self.cfg.algorithm, name, SimpleNamespace()))
        loss = self.methods.create_loss(name, params, schedule, "cpu")
        batches = {kind: self._batches(kind) for kind, needed in loss.need_dataset.items() if needed}
        state = {"main": {}, "correction": {}} if loss.need_rescale else None
        begun = time.process_time()
        while steps < self.steps:
            self.training.train_step(self.cfg, accelerator, runtime, batches, loss, state)
            steps += accelerator.sync_gradients
        seconds = time.process_time() - begun
        pipeline.save_pretrained(folder)
        return {"steps": steps, "seconds": seconds}

    def ours(self, folder: Path) -> dict[str, Any]:
        """The command with its defaults, exported."""
        own, steps, marks = pixel_recipes()["default"], self.args.steps, list[tuple[str, float]]()
        few = {"cooldown_steps": round(own.cooldown_steps * steps / own.max_train_steps)} if steps else {}
        config = UnlearnConfig(
            model="faces", target=PLANTED[0], output=folder.with_name(f"{folder.name}.patch"), force=True,
            max_train_steps=steps, **few,
        )  # fmt: skip
        progress = Progress(stage=lambda title, total=0: marks.append((title, time.process_time())))
        made = unlearn(config, progress)
        progress.stage("end", 0)
        export(ExportConfig(model="faces", patch=made.output, output=folder, force=True))
        seconds = sum(after - before for (title, before), (_, after) in pairwise(marks) if title == "unlearn")
        return {"steps": made.steps, "seconds": seconds, "stopped": made.stopped}

    def cell(self, name: str) -> dict[str, Any]:
        """A row's figures; what is in the folder is not made again."""
        args, stem = self.args, name
        if name not in GIVEN:
            stem += f"-{args.steps or 'own'}"
        if name in METHODS:
            stem += f"-{args.configuration}-{self.rate:g}-{args.retain}"
        path, trained = (args.work / f"{stem}.{k}.json" for k in (f"{args.draws}-{args.returns}-{args.retain}", "run"))
        if not path.is_file():
            folder = GIVEN.get(name, args.work / stem)
            if name not in GIVEN and not trained.is_file():
                write_json(self.theirs(name, folder) if name in METHODS else self.ours(folder), trained)
            went = json.loads(trained.read_text()) if trained.is_file() else {}
            write_json(went | self.judged(folder), path)
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", nargs="*", help=f"of {', '.join(ROWS)}; all by default")
    parser.add_argument("--source", type=Path, required=True, help="checkout of ReTrack")
    parser.add_argument("--work", type=Path, required=True, help="where models and figures are kept, and found again")
    parser.add_argument("--configuration", default="celeba_hq", choices=("celeba_hq", "cifar10"))
    parser.add_argument("--rate", type=float, help="learning rate of its methods, instead of its own")
    parser.add_argument("--steps", type=int, help="updates of all, instead of each one's own")
    for name, default in (("draws", 1000), ("retain", 512), ("returns", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--assets", type=Path, help="the files that features.py names")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    suite = Suite(args)
    table("method", *MEASURES)
    for name in args.row or ROWS:
        found = suite.cell(name)
        row(name, *("" if found.get(key) is None else found[key] for key in MEASURES))


if __name__ == "__main__":
    main()
