"""The cost of real LoRA unlearning steps on Stable Diffusion 3 medium's transformer: its true config, random weights.

    python examples/benchmark/sd3_medium.py [--steps 3] [--resolution 512]

2.03 B parameters in bfloat16, rank 16, gradient checkpointing, a batch of one target and one image to retain. Beside it
a bare PEFT LoRA loop with two images a step. Peak memory is the process's, before the bare loop runs.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from models import SD3, SD3_VAE, configured
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from unforget import families
from unforget.api import memory_plan
from unforget.config import UnlearnConfig
from unforget.core.types import Instance, Pool
from unforget.families import sd3
from unforget.families.model import DiffusionModel
from unforget.unlearning.compute import Compute
from unforget.unlearning.prepare import encoded
from unforget.unlearning.trainer import Trainer

NAME, TRANSFORMER, VAE = "Stable Diffusion 3 medium", SD3, SD3_VAE


def text(width: int, words: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A shallow text encoder of the true width."""
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=1,
        num_attention_heads=width // 64, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def pipeline() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    words = CLIPTokenizer().train_new_from_iterator(["a flag"], 520)
    words.model_max_length = 77
    vae = AutoencoderKL.from_config(VAE)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_config(TRANSFORMER), vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=text(768, words), tokenizer=words,
        text_encoder_2=text(1280, words), tokenizer_2=words, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    return pipe


def peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(model: DiffusionModel, steps: int) -> list[float]:
    """Seconds of each unlearning step."""
    few = {"forget_batch_size": 1, "retain_batch_size": 1, "neighbour_share": 0}
    recipe = sd3.SPEC.recipes["default"].model_copy(update={**few, "max_train_steps": steps, "cooldown_steps": 0})
    rows = tuple(model.prompt_ids(["", "a flag"]).tolist())
    base = model.frozen_reference("lora")
    images = torch.rand(4, *model.image_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    instance = Instance(images[0], images[1], "target", rows)
    retain = Pool(images[2:], torch.tensor([0, rows[1]]))
    prepared = encoded(base, (instance,), retain, retain[:0], 0.1)
    model.unload_text_encoders()
    model.network.enable_gradient_checkpointing()
    compute = Compute(micro_batch=1, mixed_precision="auto")
    took, started = [], time.time()
    for row in Trainer(model, base, prepared, recipe, seed=0, compute=compute):
        took.append(time.time() - started)
        print(f"unforget: step {row['step']} {took[-1]:.0f} s, peak {peak():.2f} GiB", flush=True)
        started = time.time()
    return took


def bare(network: SD3Transformer2DModel, side: int, tokens: int, steps: int) -> list[float]:
    """Seconds of each step of a plain LoRA training loop on the same network, two images a step."""
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=1e-4)
    words, pooled = torch.randn(1, tokens, 4096).bfloat16(), torch.randn(1, 2048).bfloat16()
    took = []
    for number in range(1, steps + 1):
        started = time.time()
        for _ in range(2):
            x_0, noise, s = torch.randn(1, 16, side, side), torch.randn(1, 16, side, side), torch.rand(1)
            x_t = torch.lerp(x_0, noise, s)
            with torch.autocast("cpu", torch.bfloat16):
                answer = network(x_t.bfloat16(), words, pooled, 1000 * s).sample
            ((answer.float() - (noise - x_0)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.time() - started)
        print(f"bare, {tokens} text tokens: step {number} {took[-1]:.0f} s", flush=True)
    return took


def plan(resolution: int, device: str = "cpu") -> dict[str, float]:
    """GiB that `unlearn --dry-run` predicts for the same run, from configuration files alone."""
    with tempfile.TemporaryDirectory() as scratch:
        few = {"train_batch_size": 1, "retain_batch_size": 1}
        how = {"resolution": resolution, "device": device}
        return memory_plan(
            UnlearnConfig(model=str(configured(NAME, Path(scratch))), target="x.png", output="x.patch", **how, **few)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=512)
    args = parser.parse_args()
    options = families.Options(resolution=args.resolution)
    model = DiffusionModel(sd3.SPEC, pipeline(), "sd3-medium", options, families.Hints())
    size = sum(p.numel() for p in model.network.parameters()) / 1e9
    print(f"{size:.3f} B parameters, {args.resolution}x{args.resolution}, after loading {peak():.2f} GiB", flush=True)
    mine, most = ours(model, args.steps), peak()
    trained = sum(p.numel() for p in model.network.parameters() if p.requires_grad) / 1e6
    predicted = plan(args.resolution)["peak"]
    print(f"--dry-run predicts {predicted:.2f} GiB, {predicted / most - 1:+.0%}")
    print(f"LoRA on {len(sd3.SPEC.lora_targets)} projections a block: {trained:.1f} M parameters; peak {most:.2f} GiB")
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    short = bare(model.network, model.latent_shape[1], 77 + len(sd3.SCORES), args.steps)
    model.network.set_attn_processor(JointAttnProcessor2_0())
    whole = bare(model.network, model.latent_shape[1], 77 + 256, args.steps)
    best = [min(t) for t in (mine, short, whole)]
    print(f"step, best of {args.steps}: unforget {best[0]:.1f} s")
    print(f"bare with as many tokens: {best[1]:.1f} s, ratio {best[0] / best[1]:.2f}")
    print(f"bare with the tokens that diffusers embeds without T5: {best[2]:.1f} s, ratio {best[0] / best[2]:.2f}")


if __name__ == "__main__":
    main()
