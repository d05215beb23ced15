"""Train the bundled model `flags`, as `small_sd3.py` says.

    npm install && python train.py node_modules/svg-country-flags flags/

About an hour and a quarter on 2 cores that compute bfloat16. With `--from FOLDER` that model is trained on: its
autoencoder, which holds its latents, and then, briefly, the transformer on what they have become.
"""

import argparse
import copy
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from flags import learnt
from small_sd3 import Captioned, build, encoded, report, silent_t5, tokenizer, train_flow, train_vae, write_hints
from transformers import T5Tokenizer

PLACEMENTS = 40
"""Of each flag; the latents of all are cached."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the npm package's folder")
    parser.add_argument("out", type=Path, help="diffusers folder to write")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--from", dest="begun", type=Path, help="go on with this model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    known, captions, images = learnt(args.data, PLACEMENTS, generator)
    if args.begun:
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(args.begun, dtype=torch.float32, **absent)
        before = copy.deepcopy(pipe.vae.eval()).to(memory_format=torch.channels_last)
        if args.vae_steps:
            train_vae(pipe.vae, images.flatten(0, 1), args.vae_steps, generator, anchor=before)
        pipe.register_modules(text_encoder_3=silent_t5(pipe.transformer.config.joint_attention_dim))
        pipe.register_modules(tokenizer_3=T5Tokenizer())
        latents = encoded(pipe.vae, images.flatten(0, 1), anew=False).unflatten(0, images.shape[:2])
        data = Captioned.of(latents, captions, pipe.tokenizer)
        train_flow(pipe, data, args.out, args.steps, generator, batch=64, rate=3e-4)
        shutil.copy(args.begun / "unforget.json", args.out)
        return
    pipe = build(tokenizer([c for forms in captions for c in forms]))
    report(pipe)
    train_vae(pipe.vae, images.flatten(0, 1), args.vae_steps, generator)
    latents = encoded(pipe.vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    train_flow(pipe, Captioned.of(latents, captions, pipe.tokenizer), args.out, args.steps, generator)
    write_hints(args.out, [f"flag of {c.name}" for c in known])


if __name__ == "__main__":
    main()
