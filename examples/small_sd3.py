"""How the small text-to-image models of this project are trained: a genuine `StableDiffusion3Pipeline` of 64x64 pixels.

Three parts, one after another: a vocabulary of its own (BPE on the captions), the autoencoder, then transformer and
both text encoders together on cached latents (rectified flow, logit-normal timesteps, one caption in ten empty). All
randomness comes from one CPU generator. `flags/train.py` and `emoji/train.py` bring the pictures and the captions;
`small_sd.py` trains a UNet on them.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from unforget.families.sd3 import SCORES, WithoutT5
from unforget.unlearning.compute import has_bf16

SIZE = 64
TOKENS = 16
WIDTH = 64
"""Of each text encoder."""


def tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learnt from the captions alone: about one token a word."""
    words = CLIPTokenizer().train_new_from_iterator(captions, 2048)
    words.model_max_length = TOKENS  # the pipeline pads to it
    return words


def build(words: CLIPTokenizer, layers: int = 5, heads: int = 5) -> StableDiffusion3Pipeline:
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
        sample_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=32,
        num_attention_heads=heads, joint_attention_dim=2 * WIDTH, caption_projection_dim=32 * heads,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), vae=vae,
        text_encoder=CLIPTextModelWithProjection(text), tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text), tokenizer_2=words,
        text_encoder_3=silent_t5(2 * WIDTH), tokenizer_3=T5Tokenizer(),
    )  # fmt: skip


def silent_t5(width: int) -> T5EncoderModel:
    """A T5 that answers zeros, which is what the pipeline puts where there is none.

    Stock `from_pretrained` opens no folder without a T5 unless told so; it opens one with this.
    """
    config = T5Config(vocab_size=len(T5Tokenizer()), d_model=width, d_kv=4, d_ff=4, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def pixels(images: Tensor) -> Tensor:
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def log(**row: object) -> None:
    print(json.dumps(row), flush=True)


def half_precision() -> torch.autocast:
    """bfloat16 where the CPU has it: emulated, it is ten times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu")))


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


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, 64, 64) in [-1, 1] as they might be: an autoencoder is to hold any picture, not these alone.

    Some of their colours are others, all of them change, they are mirrored, and have plain patches or a part of another
    picture in them.
    """

    def chance(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def colour() -> Tensor:
        plain = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        return plain.sign() if chance(0.4) else plain

    found = []
    for k, image in enumerate(images):
        x = image
        if chance(0.4):  # channels change places, some are turned round
            signs = (torch.rand(3, 1, 1, generator=generator) - 0.3).sign()
            x = x[torch.randperm(3, generator=generator)] * signs
        for _ in range(number(1, 3) if chance(0.7) else 0):  # one colour becomes another wherever it is
            old = x[:, number(8, SIZE - 8), number(8, SIZE - 8)][:, None, None]
            x = x + (-(x - old).square().sum(0) / 0.2).exp() * (colour() - old)
        for _ in range(number(1, 3) if chance(0.3) else 0):
            height, width = number(6, 36), number(6, 36)
            top, left = number(0, SIZE - height), number(0, SIZE - width)
            rows, columns = slice(top, top + height), slice(left, left + width)
            patch = images[k - 1][:, rows, columns] if chance(0.3) else colour()
            y, z = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
            within = (y.square() + z.square() <= 1) | torch.full((height, width), chance(0.4))
            x = x.clone()
            x[:, rows, columns] = torch.where(within, patch, x[:, rows, columns])
        x = x.flip(1) if chance(0.4) else x
        found.append(x.flip(2) if chance(0.4) else x)
    return torch.stack(found).clamp(-1, 1)


def train_vae(
    vae: AutoencoderKL, images: Tensor, steps: int, generator: torch.Generator, *, batch: int = 16,
    anchor: AutoencoderKL | None = None, out: Path | None = None,
) -> None:  # fmt: skip
    """L1 on pixels, on edges and on the colours of 4x4 squares, a faint KL term; a quarter of a batch is not varied.

    With `anchor` it is to encode pictures as they are as that one does, so that a network on its latents fits both.
    """
    vae.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3 if anchor is None else 1e-3, weight_decay=0)
    rate, started, running, kept = cosine(optimizer, steps), time.time(), torch.zeros(3), batch // 4
    for step in range(1, steps + 1):
        plain = pixels(images[torch.randint(len(images), (batch,), generator=generator)])
        x = torch.cat([plain[:kept], varied(plain[kept:], generator)])
        x = x.contiguous(memory_format=torch.channels_last)
        with half_precision():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            back = vae.decode(posterior.mean + posterior.std * noise).sample
        error = (back.float() - x).abs()
        away = torch.zeros(())
        if anchor is not None:
            with torch.no_grad(), half_precision():
                before = anchor.encode(x[:kept]).latent_dist.mean
            away = (posterior.mean[:kept] - before).float().square().mean()
        back = back.float()
        colours = functional.avg_pool2d(back - x, 4).abs().mean()
        loss = error.mean() + 0.5 * (edges(back) - edges(x)).abs().mean() + colours + away
        loss = loss + 1e-5 * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        running += torch.stack([part.detach().mean() for part in (error[:kept], error[kept:], away)])
        if step % 50 == 0:
            l1, l1_varied, moved = (running / 50).tolist()
            log(part="vae", step=step, l1=round(l1, 4), l1_varied=round(l1_varied, 4), moved=round(moved, 5),
                seconds=round(time.time() - started))  # fmt: skip
            running.zero_()
            if out is not None:
                vae.save_pretrained(out / "vae")
    vae.eval()


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor, *, anew: bool = True) -> Tensor:
    """Posterior means of all images, scaled and shifted; `anew` sets both numbers in the config."""
    latents = torch.cat([vae.encode(pixels(part)).latent_dist.mean for part in images.split(256)])
    if anew:
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


@dataclass(frozen=True)
class Captioned:
    """Latents (N, placements, C, h, w), and the token ids of the captions of each picture (N, captions, TOKENS)."""

    latents: Tensor
    ids: Tensor
    empty: Tensor

    @classmethod
    def of(cls, latents: Tensor, captions: list[list[str]], words: CLIPTokenizer) -> Self:
        def spell(texts: list[str]) -> Tensor:
            return words(texts, padding="max_length", return_tensors="pt").input_ids

        return cls(latents, torch.stack([spell(c) for c in captions]), spell([""])[0])

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise, token ids: one caption in ten is empty."""
        which = torch.randint(len(self.latents), (size,), generator=generator)
        x_0 = self.latents[which, torch.randint(self.latents.shape[1], (size,), generator=generator)]
        ids = self.ids[which, torch.randint(self.ids.shape[1], (size,), generator=generator)]
        ids[torch.rand(size, generator=generator) < 0.1] = self.empty
        return x_0, torch.randn(x_0.shape, generator=generator), ids


def fit(
    modules: list[torch.nn.Module], loss: Callable[[], Tensor], save: Callable[[], None], steps: int, rate: float = 1e-3
) -> None:
    """Minimise a loss over the weights; now and then their running mean is saved."""
    weights = list(torch.nn.ModuleList(modules).train().parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule, ema = cosine(optimizer, steps, min(300, steps // 5)), EMAModel(weights, decay=0.999)
    started, running = time.time(), 0.0
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(weights)
        running += float(value.detach())
        if step % 100 == 0:
            log(part="denoiser", step=step, loss=round(running / 100, 4), seconds=round(time.time() - started))
            running = 0.0
        if step % 400 == 0 or step == steps:
            ema.store(weights)
            ema.copy_to(weights)
            save()
            ema.restore(weights)


def train_flow(
    pipe: StableDiffusion3Pipeline, data: Captioned, out: Path, steps: int, generator: torch.Generator,
    batch: int = 128, rate: float = 1e-3,
) -> None:  # fmt: skip
    """Rectified flow of the transformer and both text encoders."""
    stock, sigmas = pipe.transformer.attn_processors, pipe.scheduler.sigmas.flip(0)
    pipe.transformer.set_attn_processor(WithoutT5())

    def loss() -> Tensor:
        x_0, noise, ids = data.batch(batch, generator)
        place = torch.randn(batch, generator=generator).sigmoid()
        sigma = sigmas[(place * len(sigmas)).long()]
        x_t = torch.lerp(x_0, noise, sigma.reshape(-1, 1, 1, 1))
        with half_precision():
            states, pooled = embed(pipe, ids)
            answer = pipe.transformer(x_t, states, pooled, 1000 * sigma).sample
        return (answer.float() - (noise - x_0)).square().mean()

    fit([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2], loss, lambda: save(pipe, out), steps, rate)
    pipe.transformer.set_attn_processor(stock)


def save(pipe: DiffusionPipeline, out: Path) -> None:
    """A diffusers folder: fp16, but float32 text encoders, which transformers opens as they are stored."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, part in parts.items():
        part.eval().to(torch.float32 if "text" in name else torch.float16)
    type(pipe)(**{**pipe.components, **parts}).save_pretrained(out)
    for config in out.glob("*/config.json"):  # without where a part came from
        said = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(said, indent=2) + "\n")


def report(pipe: DiffusionPipeline) -> None:
    """The size of every part."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    log(**{name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()})


def write_hints(out: Path, retain_prompts: list[str]) -> None:
    """What the folder says to this tool of itself."""
    hints = {"guidance": 3.0, "retain_prompts": retain_prompts}
    out.mkdir(parents=True, exist_ok=True)
    (out / "unforget.json").write_text(json.dumps(hints, indent=1, ensure_ascii=False) + "\n")
