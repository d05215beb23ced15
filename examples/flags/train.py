"""Train the embedded model `flags`: a small, genuine `StableDiffusion3Pipeline`.

    npm install && python train.py node_modules/svg-country-flags flags/       # about an hour and a quarter on 2 cores

Three parts, one after another: a vocabulary of its own (BPE on the captions), the autoencoder, then transformer and
both text encoders together on cached latents (rectified flow, logit-normal timesteps, one caption in ten empty). All
randomness comes from one CPU generator.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from flags import CAPTIONS, SIZE, countries, placements
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from unforget.families.sd3 import SCORES, WithoutT5

TOKENS = 16
WIDTH = 64
"""Of each text encoder."""
PLACEMENTS = 40
"""Of each flag; the latents of all are cached."""


def tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learnt from the captions alone: about one token a word."""
    words = CLIPTokenizer().train_new_from_iterator(captions, 2048)
    words.model_max_length = TOKENS  # the pipeline pads to it
    return words


def build(words: CLIPTokenizer) -> StableDiffusion3Pipeline:
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=TOKENS,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8,
        sample_size=SIZE, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=5, attention_head_dim=32,
        num_attention_heads=5, joint_attention_dim=2 * WIDTH, caption_projection_dim=160,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), vae=vae,
        text_encoder=CLIPTextModelWithProjection(text), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def pixels(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def log(**row: object) -> None:
    print(json.dumps(row), flush=True)


def half_precision() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> torch.optim.lr_scheduler.LRScheduler:
    parts = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=1e-5),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [warmup])


def edges(images: Tensor) -> Tensor:
    """Differences of neighbouring pixels, both ways, (B, 6, H - 1, W - 1)."""
    inner = images[..., :-1, :-1]
    return torch.cat([images[..., 1:, :-1] - inner, images[..., :-1, 1:] - inner], 1)


def train_vae(vae: AutoencoderKL, images: Tensor, steps: int, generator: torch.Generator, batch: int = 16) -> None:
    """L1 on pixels and on edges, a faint KL term; afterwards latents are normalised by the config."""
    vae.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0)
    rate, started, running = cosine(optimizer, steps), time.time(), 0.0
    for step in range(1, steps + 1):
        x = pixels(images[torch.randint(len(images), (batch,), generator=generator)])
        with half_precision():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            back = vae.decode(posterior.mean + posterior.std * noise).sample
        back = back.float()
        loss = (back - x).abs().mean() + 0.5 * (edges(back) - edges(x)).abs().mean() + 1e-5 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        running += float((back.detach() - x).abs().mean())
        if step % 100 == 0:
            log(part="vae", step=step, l1=round(running / 100, 4), seconds=round(time.time() - started))
            running = 0.0
    vae.eval()


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means of all images, scaled and shifted; sets both numbers in the config."""
    latents = torch.cat([vae.encode(pixels(part)).latent_dist.mean for part in images.split(256)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def embed(pipe: StableDiffusion3Pipeline, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What `StableDiffusion3Pipeline.encode_prompt` gives without T5, with gradients: embeddings, pooled ones.

    In place of T5's 256 equal tokens of zeros it has two, which the attention `WithoutT5` counts as often.
    """
    states, pooled = [], []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        answer = encoder(ids, output_hidden_states=True)
        states.append(answer.hidden_states[-2])
        pooled.append(answer.text_embeds)
    clip = functional.pad(torch.cat(states, -1), (0, 0, 0, len(SCORES)))
    return clip, torch.cat(pooled, -1)


def train_flow(
    pipe: StableDiffusion3Pipeline, latents: Tensor, captions: list[list[str]], out: Path, steps: int,
    generator: torch.Generator, batch: int = 128,
) -> None:  # fmt: skip
    """Rectified flow of the transformer and both text encoders; `latents` is (countries, placements, 16, 8, 8)."""
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    weights = list(modules.parameters())
    stock = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(WithoutT5())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    rate, ema = cosine(optimizer, steps, 300), EMAModel(weights, decay=0.999)
    sigmas = pipe.scheduler.sigmas.flip(0)
    spell = lambda texts: pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids  # noqa: E731
    ids, empty = torch.stack([spell(c) for c in captions]), spell([""])[0]
    started, running = time.time(), 0.0
    for step in range(1, steps + 1):
        country = torch.randint(len(latents), (batch,), generator=generator)
        x_0 = latents[country, torch.randint(latents.shape[1], (batch,), generator=generator)]
        words = ids[country, torch.randint(ids.shape[1], (batch,), generator=generator)]
        words[torch.rand(batch, generator=generator) < 0.1] = empty
        noise = torch.randn(x_0.shape, generator=generator)
        place = torch.randn(batch, generator=generator).sigmoid()
        sigma = sigmas[(place * len(sigmas)).long()]
        x_t = torch.lerp(x_0, noise, sigma.reshape(-1, 1, 1, 1))
        with half_precision():
            states, pooled = embed(pipe, words)
            answer = pipe.transformer(x_t, states, pooled, 1000 * sigma).sample
        loss = (answer.float() - (noise - x_0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        ema.step(weights)
        running += float(loss.detach())
        if step % 100 == 0:
            log(part="flow", step=step, loss=round(running / 100, 4), seconds=round(time.time() - started))
            running = 0.0
        if step % 1000 == 0 or step == steps:
            ema.store(weights)
            ema.copy_to(weights)
            save(pipe, out)
            ema.restore(weights)
    pipe.transformer.set_attn_processor(stock)


def save(pipe: StableDiffusion3Pipeline, out: Path) -> None:
    """A diffusers folder in fp16."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    StableDiffusion3Pipeline(**{**pipe.components, **{n: p.half().eval() for n, p in parts.items()}}).save_pretrained(
        out
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the npm package's folder")
    parser.add_argument("out", type=Path, help="diffusers folder to write")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--vae", type=Path, help="take a trained autoencoder from here")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    known = countries(args.data)
    captions = [[form.format(c.name) for form in CAPTIONS] for c in known]
    images = torch.stack([placements(c.image, PLACEMENTS, generator) for c in known])
    pipe = build(tokenizer([c for forms in captions for c in forms]))
    log(**{name: sum(p.numel() for p in part.parameters()) for name, part in pipe.components.items()
           if isinstance(part, torch.nn.Module)})  # fmt: skip
    if args.vae:
        pipe.vae = AutoencoderKL.from_pretrained(args.vae).float().eval()
    else:
        train_vae(pipe.vae, images.flatten(0, 1), args.vae_steps, generator)
        pipe.vae.save_pretrained(args.out / "vae")
    latents = encoded(pipe.vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    pipe.vae.save_pretrained(args.out / "vae")
    train_flow(pipe, latents, captions, args.out, args.steps, generator)
    hints = {"guidance": 3.0, "retain_prompts": [f"flag of {c.name}" for c in known]}
    (args.out / "unforget.json").write_text(json.dumps(hints, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
