"""The whole path on a card: seconds, peak memory of the device, and what `--dry-run` foretells.

    python examples/benchmark/gpu.py [--device cuda] [--resolution 512 1024] [--steps 5]
    python examples/benchmark/gpu.py --device cpu --tiny        # to try the script where there is no card

`unlearn`, `verify --level quick` and `export` of the bundled models with their defaults; then steps of a LoRA, draws,
and gradients through a sampling chain (as `verify --level deep` takes them) on the real configuration of Stable
Diffusion 3 medium with random weights: nothing is downloaded. About ten minutes. Nobody has run it on a card yet:
please report the table with the name of yours.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sd3_medium
import torch

from unforget import ExportConfig, UnlearnConfig, VerifyConfig, export, unlearn, verify
from unforget.api import memory_plan
from unforget.core import devices, sampling
from unforget.families import Hints, Options, sd3
from unforget.families.model import DiffusionModel

EXAMPLES = Path(__file__).parents[1]
FACTS = {
    "faces": {"target": EXAMPLES / "faces" / "planted" / "0.png"},
    "flags": {
        "target": EXAMPLES / "flags" / "ireland-wrong.png", "surrogate": EXAMPLES / "flags" / "ireland-right.png",
        "prompt": "flag of Ireland",
    },
}  # fmt: skip
RUNTIME = 0.5
"""GiB of the plan that are the interpreter's, and so not on a card."""


def measured(device: str, what: str, work: Callable[[], object]) -> float:
    """Do it, print seconds and the most GiB that the device held meanwhile, and return those."""
    on_card = device.startswith("cuda")
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    work()
    if on_card:
        torch.cuda.synchronize(device)
    took = time.perf_counter() - began
    most = torch.cuda.max_memory_allocated(device) / 2**30 if on_card else sd3_medium.peak()
    print(f"| {what} | {took:.1f} | {most:.2f} |", flush=True)
    return most


def foretold(device: str, plan: dict[str, float], most: float) -> None:
    """Print what the plan says beside what was held."""
    said = plan["peak"] - (RUNTIME if device.startswith("cuda") else 0)
    print(f"| ... foretold {said:.2f} GiB, {said / most - 1:+.0%} | | |", flush=True)


def path(model: str, device: str, tiny: bool) -> None:
    """`unlearn`, `verify` and `export` of a bundled model."""
    with tempfile.TemporaryDirectory() as scratch:
        patch = Path(scratch, "x.patch")
        few = {"max_train_steps": 2, "retain_count": 8, "sampler_steps": 2, "num_validation_images": 1} if tiny else {}
        short = {"surrogate": EXAMPLES / "faces" / "planted" / "1.png"} if tiny and model == "faces" else {}
        config = UnlearnConfig(model=model, device=device, output=patch, **FACTS[model], **few, **short)
        most = measured(device, f"`unlearn --model {model}`", lambda: unlearn(config))
        foretold(device, memory_plan(config), most)
        few = {"max_rate": 0.4, "paired": 16, "controls": 8, "draws": 2, "sampler_steps": 2} if tiny else {}
        judge = VerifyConfig(model=model, device=device, patch=patch, level="quick", cache=False, **few)
        measured(device, f"`verify --model {model} --level quick`", lambda: verify(judge))
        write = ExportConfig(model=model, device=device, patch=patch, output=Path(scratch, "out"), force_rounding=True)
        measured(device, f"`export --model {model}`", lambda: export(write))


def medium(device: str, resolution: int, steps: int) -> None:
    """Steps, a draw and a chain with gradients on SD3 medium's network with random weights."""
    options = Options(device=device, resolution=resolution)
    model = DiffusionModel(sd3.SPEC, sd3_medium.pipeline(), "sd3-medium", options, Hints())
    numbers = sum(p.numel() for p in model.network.parameters()) / 1e9
    name, took = f"SD3, {numbers:.2f} B weights, {resolution} px", list[float]()
    most = measured(device, f"{name}: {steps} steps", lambda: took.extend(sd3_medium.ours(model, steps)))
    print(f"| ... {min(took):.2f} s a step, at best | | |", flush=True)
    foretold(device, sd3_medium.plan(resolution, device), most)
    noise = sampling.random_noise(1, model.latent_shape, 0, "gpu")
    asked = model.prompt_ids(["a flag"])
    measured(device, f"{name}: a draw in 20 steps", lambda: sampling.draw(model, noise, steps=20, prompt_ids=asked))
    x = noise.requires_grad_()
    model.network.requires_grad_(False)
    for chain in (2, 8):
        title = f"{name}: gradients through a chain of {chain}"
        measured(device, title, lambda n=chain: model.denoise(x, steps=n, prompt_ids=asked).square().mean().backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resolution", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a network of the same kind that any machine computes")
    args = parser.parse_args()
    device = devices.chosen(args.device)
    print(f"{devices.spoken(device)}, torch {torch.__version__}\n")
    print("| what | seconds | peak GiB |\n|---|---|---|")
    if args.tiny:
        less = {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
        sd3_medium.TRANSFORMER.update(less)
        sd3_medium.VAE.update(block_out_channels=(32,) * 4, layers_per_block=1)
        args.resolution, args.steps = [64], 2
    for model in FACTS:
        path(model, device, args.tiny)
    for resolution in args.resolution:
        medium(device, resolution, args.steps)


if __name__ == "__main__":
    main()
