"""Train a Stable Diffusion 1.x-like model of the flags: `small_sd.py` on the autoencoder of the bundled model `flags`.

    npm install && python train_sd.py node_modules/svg-country-flags flags-sd/ --vae-from FLAGS

FLAGS is a folder of that model. The weights are in no package.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from flags import learnt
from small_sd import build, train_noise
from small_sd3 import Captioned, encoded, report, tokenizer, write_hints

PLACEMENTS = 40
"""Of each flag; the latents of all are cached."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the npm package's folder")
    parser.add_argument("out", type=Path, help="diffusers folder to write")
    parser.add_argument("--vae-from", type=Path, required=True, help="folder of the model `flags`")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    known, captions, images = learnt(args.data, PLACEMENTS, generator)
    vae = AutoencoderKL.from_pretrained(args.vae_from / "vae").float().eval()
    latents = encoded(vae, images.flatten(0, 1)) + vae.config.shift_factor * vae.config.scaling_factor
    vae.register_to_config(shift_factor=None)  # stock pipelines of this kind know none
    words = tokenizer([c for forms in captions for c in forms])
    pipe = build(words, vae)
    report(pipe)
    write_hints(args.out, [f"flag of {c.name}" for c in known])
    train_noise(
        pipe, Captioned.of(latents.unflatten(0, images.shape[:2]), captions, words), args.out, args.steps, generator
    )


if __name__ == "__main__":
    main()
