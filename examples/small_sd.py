"""A small `StableDiffusionPipeline`, which learns noise in latent space as Stable Diffusion 1.x does.

As `small_sd3.py` says, but the autoencoder is given, and a UNet is trained.
"""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from small_sd3 import TOKENS, WIDTH, Captioned, fit, half_precision, save
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

GAMMA = 5.0
"""Of min-SNR weighting (arXiv:2303.09556)."""


def build(words: CLIPTokenizer, vae: torch.nn.Module) -> StableDiffusionPipeline:
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=2 * WIDTH, intermediate_size=8 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=2 * WIDTH, attention_head_dim=4,  # which diffusers reads as the number of heads
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), words, unet, scheduler, None, None, requires_safety_checker=False
    )


def train_noise(
    pipe: StableDiffusionPipeline, data: Captioned, out: Path, steps: int, generator: torch.Generator, batch: int = 64
) -> None:
    """The noise of latents, at all timesteps alike."""
    cumprod = pipe.scheduler.alphas_cumprod
    weight = (cumprod / (1 - cumprod)).clamp(max=GAMMA) / (cumprod / (1 - cumprod))

    def loss() -> Tensor:
        x_0, noise, ids = data.batch(batch, generator)
        timestep = torch.randint(len(cumprod), (batch,), generator=generator)
        x_t = pipe.scheduler.add_noise(x_0, noise, timestep)
        with half_precision():
            answer = pipe.unet(x_t, timestep, pipe.text_encoder(ids)[0]).sample
        return (weight[timestep] * (answer.float() - noise).square().mean((1, 2, 3))).mean()

    fit([pipe.unet, pipe.text_encoder], loss, lambda: save(pipe, out), steps)
