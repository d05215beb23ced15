"""Measure what `unforget` costs beside the least it could.

    python examples/benchmark/cost.py [SECTION ...]

    passes     seconds of a whole `Trainer` over seconds of the bare forward and backward passes it makes
    help       seconds of `unforget --help` over seconds of `python -c "import typer, rich"`
    plan       the peak memory that `--dry-run` predicts, beside the peak of the same run
    memory     peak memory of the whole command on the 113.7 M-parameter network of google/ddpm-celebahq-256, with
               random weights, at 256x256
    counts     network passes by stage of `unlearn` and `verify` on Stable Diffusion 3 medium at 1024x1024, as --dry-run
               counts them
    draws      bytes that `verify` keeps of 2 x 1,000 draws of 1024x1024: random pixels in the place of a model's
    rates      the learning rate that `update_share` comes to on `flags` and on SD3 medium's widths with random weights

Ratios are of medians of runs that take turns, so that a busy machine slows both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import sd3_medium
import torch
from diffusers import SD3Transformer2DModel

from unforget import Recipe, api, families
from unforget.config import Policy, UnlearnConfig, VerifyConfig
from unforget.core.passes import Count
from unforget.core.types import Instance, Progress
from unforget.families import sd3
from unforget.families.scopes import trainable
from unforget.files import images
from unforget.unlearning.compute import Compute, has_bf16, matched_rate, mixed
from unforget.unlearning.prepare import RunInputs, prepare
from unforget.unlearning.trainer import Trainer
from unforget.verification.context import ROLES, VerifyContext

PLANTED = Path(__file__).parents[1] / "faces" / "planted"
EXAMPLES = Path(__file__).parents[1]
FACE, FLAG = EXAMPLES / "faces" / "planted" / "0.png", EXAMPLES / "flags" / "ireland-wrong.png"
SURROGATE = {"faces": EXAMPLES / "faces" / "planted" / "1.png", "flags": EXAMPLES / "flags" / "ireland-right.png"}
STEPS = 40


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(ours: Callable[[], object], bare: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of both, taking turns after one warm-up."""
    bare()
    ours()
    pairs = [(seconds(ours), seconds(bare)) for _ in range(rounds)]
    return statistics.median(p[0] for p in pairs), statistics.median(p[1] for p in pairs)


def passes() -> None:
    """Forget and retain batch through the trained network with gradients, both through the base without."""
    recipe = Recipe(max_train_steps=STEPS, cooldown_steps=STEPS // 2, stop_margin=None)
    target = PLANTED / "0.png"
    base = families.load("faces").copy()
    image = images.read_image(target, base.image_shape)
    prepared = prepare(base, RunInputs((image,)), Progress())

    def ours() -> None:
        for _ in Trainer(base.copy(), base, prepared, recipe, seed=0, compute=Compute(mixed_precision="auto")):
            pass

    def bare() -> None:
        patched = base.copy()
        weights = patched.trainable(recipe.train)
        for weight in weights:
            weight.requires_grad_(True)
        device = weights[0].device
        with_gradient, without = (mixed(p, has_bf16(device), device) for p in (patched.predict, base.predict))
        sizes = (recipe.forget_batch_size, recipe.retain_batch_size)
        batches = [(torch.randn(n, *base.latent_shape), torch.randint(1000, (n,))) for n in sizes]
        for _ in range(STEPS):
            for x_t, index in batches:
                with torch.no_grad():
                    goal = without(x_t, index, index * 0)
                torch.autograd.grad((with_gradient(x_t, index, index * 0) - goal).square().mean(), weights)

    ours_s, bare_s = ratio(ours, bare, rounds=3)
    print(f"passes: {STEPS} steps {ours_s:.2f} s, bare {bare_s:.2f} s, ratio {ours_s / bare_s:.2f}")


def help() -> None:  # the section's name
    def run(*command: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)

    ours_s, bare_s = ratio(run("-m", "unforget", "--help"), run("-c", "import typer, rich"), rounds=9)
    print(f"help: {ours_s:.3f} s, bare {bare_s:.3f} s, ratio {ours_s / bare_s:.2f}")


def celebahq() -> object:
    """The network of google/ddpm-celebahq-256, random weights."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=256, layers_per_block=2, block_out_channels=(128, 128, 256, 256, 512, 512), norm_eps=1e-6,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )  # fmt: skip


def memory() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        torch.manual_seed(0)
        unet = celebahq()
        print(f"memory: {sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters at 256x256", flush=True)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(work / "model")
        del unet
        (work / "retain").mkdir()
        for name in ("target", "surrogate", *(f"retain/{i}" for i in range(8))):
            coarse = torch.rand(1, 3, 8, 8) * 2 - 1
            images.write_image(torch.nn.functional.interpolate(coarse, 256)[0], work / f"{name}.png")
        command = ["unlearn", "--model", "model", "--target", "target.png", "--surrogate", "surrogate.png",
                   "--retain", "retain", "-o", "out.patch", "--max-train-steps", "2", "--num-validation-images", "1",
                   "--recipe", "paper"]  # fmt: skip
        took = seconds(lambda: subprocess.run([sys.executable, "-m", "unforget", *command], cwd=work))
        assert (work / "out.patch").is_file()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"memory: two steps of all weights and the report in {took:.0f} s, peak {peak:.2f} GiB")


def plan() -> None:
    """What --dry-run predicts beside the peak of the same run."""
    for model, image, how in (("faces", FACE, ()), ("flags", FLAG, ()), ("flags", FLAG, ("--train", "full"))):
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "unforget", "unlearn", "--model", model, "--target", str(image), *how,
                       "--surrogate", str(SURROGATE[model]), "-o", f"{scratch}/x.patch", "--max-train-steps", "3",
                       "--num-validation-images", "1", "--retain-count", "64"]  # fmt: skip
            printed = subprocess.run(
                [*command, "--dry-run", "--json"], check=True, capture_output=True, text=True
            ).stdout
            predicted = json.loads(printed)["memory_gib"]["peak"]
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            peak = os.wait4(run.pid, 0)[2].ru_maxrss / 2**20
            print(f"plan: {model} {' '.join(how)} predicted {predicted:.2f} GiB, measured {peak:.2f} GiB, "
                  f"{predicted / peak - 1:+.0%}", flush=True)  # fmt: skip


def counts() -> None:
    """Both commands, without a prompt and with one; `verify` at fewer sampler steps, too."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(models.configured(sd3_medium.NAME, Path(scratch)))
        for prompt in ((), ("a flag",)):
            asked = {"model": folder, "target": FLAG, "prompt": prompt}
            for again in (True, False):
                config = UnlearnConfig(**asked, output="x.patch", gradient_checkpointing=again)
                title = f"unlearn, {len(prompt)} prompt(s), blocks {'computed again' if again else 'kept'}"
                show(title, api.plan_unlearn(config))
            for steps in (20, 12, 8):
                config = VerifyConfig(**asked, candidate=folder, sampler_steps=steps)
                show(f"verify, {len(prompt)} prompt(s), {steps} sampler steps", api.plan_verify(config))


def show(title: str, said: dict[str, Any]) -> None:
    parts = ", ".join(f"{name} {Count(*ends)}" for name, ends in said["passes"].items() if any(ends))
    print(f"counts: {title}: {parts}; memory {said['memory_gib']}", flush=True)


class RandomPixels:
    """What a context needs of a model, at 1024x1024; what it draws is noise."""

    image_shape, latent_shape, guidance, prompts = (3, 1024, 1024), (16, 128, 128), None, ["", "a prompt"]
    device, batch_size, guided = torch.device("cpu"), None, False

    def sampling_timesteps(self, steps: int) -> list[float]:
        return [1000.0 * (steps - k) / steps for k in range(steps)]

    def denoise(self, x_t: torch.Tensor, **how: object) -> torch.Tensor:
        return x_t

    def decode(self, x_0: torch.Tensor) -> torch.Tensor:
        return torch.randint(0, 256, (len(x_0), *self.image_shape)).float().div_(127.5).sub_(1)


def draws() -> None:
    """Resident memory after each thousand, and the peak."""
    model: Any = RandomPixels()
    picture = model.decode(torch.zeros(1))[0]
    context = VerifyContext(model, model, (Instance(picture, -picture, "t", (0, 1)),), Policy())
    before = resident()
    context.retained("candidate")
    print(f"draws: 2 x {context.policy.paired} under the retain prompts, {resident() - before:.2f} GiB", flush=True)
    for role in ROLES:
        context.draws(role, (1,), 1000)
        print(f"draws: 1,000 of the {role}, {resident() - before:.2f} GiB in all", flush=True)
    kept = context.draws("base", (1,), 1000)
    whole = sum(t.nbytes for t in context._whole.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"draws: {sum(t.nbytes for t in kept.tensors) / 1000 / 2**20:.2f} MiB a draw, {whole / 2**30:.2f} GiB of "
          f"draws that are whole; peak of the process {peak:.2f} GiB, {before:.2f} before")  # fmt: skip


def rates() -> None:
    """One number, two networks: one block of the wide one, for all blocks are alike."""
    wide = SD3Transformer2DModel.from_config({**sd3_medium.TRANSFORMER, "num_layers": 1})
    recipe = sd3.SPEC.recipes["default"]
    for name, network in (("flags", families.load("flags").network), ("SD3 medium", wide)):
        weights = trainable(sd3.SPEC, network, "lora", rank=recipe.rank, alpha=recipe.lora_alpha, seed=0)
        rate = matched_rate(network, weights, recipe.update_share)
        print(f"rates: {name}, update_share {recipe.update_share:g}: {rate:.2e}")


def resident() -> float:
    """GiB that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


SECTIONS = {f.__name__: f for f in (passes, help, plan, memory, counts, draws, rates)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)}")
    for name in parser.parse_args().section or SECTIONS:
        SECTIONS[name]()


if __name__ == "__main__":
    main()
