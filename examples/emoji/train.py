"""Train a second small model, on which no default of this project is tuned: `small_sd3.py` on 300 emoji.

    npm install && python train.py node_modules/emoji-datasource-google emoji-sd3/ --vae-from FLAGS

FLAGS is a folder of the bundled model `flags`, whose autoencoder it begins with. The weights are in no package.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from emoji import CAPTIONS, chosen
from pictures import placements
from small_sd3 import Captioned, build, encoded, report, tokenizer, train_flow, train_vae, write_hints

SPREAD = 0.5
PLACEMENTS = 24
"""Of each emoji; the latents of all are cached."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the npm package's folder")
    parser.add_argument("out", type=Path, help="diffusers folder to write")
    parser.add_argument("--vae-from", type=Path, required=True, help="folder of the model `flags`")
    parser.add_argument("--vae-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    known = chosen(args.data)
    captions = [[form.format(n.name) for form in CAPTIONS] for n in known]
    images = torch.stack([placements(n.image, PLACEMENTS, generator, SPREAD) for n in known])
    pipe = build(tokenizer([c for forms in captions for c in forms]), layers=4, heads=4)
    pipe.vae = AutoencoderKL.from_pretrained(args.vae_from / "vae").float()
    report(pipe)
    train_vae(pipe.vae, images.flatten(0, 1), args.vae_steps, generator)
    latents = encoded(pipe.vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    write_hints(args.out, [CAPTIONS[0].format(n.name) for n in known])
    train_flow(pipe, Captioned.of(latents, captions, pipe.tokenizer), args.out, args.steps, generator, args.batch)


if __name__ == "__main__":
    main()
