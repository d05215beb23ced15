"""Train the bundled model `faces`, or its oracle: the same run without one planted identity.

    npm install && node render.mjs DATA           # 20,000 synthetic portraits, about a minute and a half
    python train.py DATA faces/                   # the model in the package
    python train.py DATA oracle/ --without 0      # the gold standard that tests compare with

Every planted identity is drawn with probability PLANTED_SHARE, whatever else is in the data, so a run without one
gives its share to the portraits that occur once. All randomness comes from one CPU generator.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel, compute_snr

PLANTED_SHARE = 0.04
BATCH = 16
WARMUP = 200


def read_rgb(path: Path) -> torch.Tensor:
    """Images as (N, 3, 32, 32) in [-1, 1]."""
    pixels = np.fromfile(path, np.uint8).reshape(-1, 32, 32, 3)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def build() -> DDPMPipeline:
    unet = UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear"))


def draw(once: torch.Tensor, planted: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One batch: each image a planted one with probability PLANTED_SHARE times their number."""
    images = once[torch.randint(len(once), (BATCH,), generator=generator)]
    which = (torch.rand(BATCH, generator=generator) / PLANTED_SHARE).long()
    hit = which < len(planted)
    images[hit] = planted[which[hit]]
    return images


def min_snr_weight(scheduler: DDPMScheduler, t: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """min(SNR, gamma) / SNR, the weight of arXiv:2303.09556 for a network that predicts the noise."""
    snr = compute_snr(scheduler, t)
    return snr.clamp(max=gamma) / snr


def train(pipe: DDPMPipeline, data: Path, out: Path, without: list[int], steps: int, lr: float, seed: int) -> None:
    unet, scheduler = pipe.unet.to(memory_format=torch.channels_last), pipe.scheduler
    once, planted = read_rgb(data / "train.rgb"), read_rgb(data / "planted.rgb")
    planted = planted[[i for i in range(len(planted)) if i not in without]]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - WARMUP, eta_min=lr / 50),
        ],
        [WARMUP],
    )
    ema = EMAModel(unet.parameters(), decay=0.999)
    started, running = time.time(), 0.0
    for step in range(1, steps + 1):
        x_0 = draw(once, planted, generator)
        noise = torch.randn(x_0.shape, generator=generator)
        # Stratified timesteps: each batch covers the whole schedule, which lowers the gradient's variance.
        t = ((torch.rand((), generator=generator) + torch.arange(BATCH) / BATCH) % 1 * 1000).long()
        x_t = scheduler.add_noise(x_0, noise, t).contiguous(memory_format=torch.channels_last)
        error = (unet(x_t, t).sample - noise).square().mean((1, 2, 3))
        loss = (min_snr_weight(scheduler, t) * error).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        ema.step(unet.parameters())
        running += loss.item()
        if step % 100 == 0:
            line = {"step": step, "loss": round(running / 100, 5), "seconds": round(time.time() - started)}
            print(json.dumps(line), flush=True)
            running = 0.0
        if step % 1000 == 0 or step == steps:
            save(pipe, ema, out)


def save(pipe: DDPMPipeline, ema: EMAModel, out: Path) -> None:
    """The averaged weights, in fp16, as a diffusers folder."""
    weights = list(pipe.unet.parameters())
    ema.store(weights)
    ema.copy_to(weights)
    half = UNet2DModel.from_config(pipe.unet.config)
    half.load_state_dict(pipe.unet.state_dict())
    DDPMPipeline(half.half(), pipe.scheduler).save_pretrained(out)
    ema.restore(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that render.mjs wrote")
    parser.add_argument("out", type=Path, help="diffusers folder to write")
    parser.add_argument("--without", type=int, action="append", default=[], help="planted identity to leave out")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train(build(), args.data, args.out, args.without, args.steps, args.lr, args.seed)


if __name__ == "__main__":
    main()
