"""Measure the bundled model `flags` and write its card: accuracy of every caption form and country, a sample sheet.

python card.py node_modules/svg-country-flags FOLDER [--seeds 4]
"""

import argparse
from pathlib import Path

import torch
from flags import CAPTIONS, countries
from flags import judge as judge_of

from unforget import families
from unforget.core import sampling
from unforget.files import images

CARD = """---
license: cc0-1.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [diffusers, stable-diffusion-3, flags]
---

# flags

A small, genuine `StableDiffusion3Pipeline`: 64x64 pixels, MMDiT transformer ({transformer:.1f} M weights), 16-channel
autoencoder ({vae:.1f} M), two CLIP text encoders ({text:.2f} M each) with a vocabulary of their own. Rectified
flow with shift 2; guidance 3 and 20 steps are what it was measured with. It exists to have something real to correct
offline.

![Samples under "flag of X", in order of the country's code](samples.png)

Trained by `examples/flags/train.py` on 241 flags (npm `svg-country-flags`, public domain; groups that look the same
appear once), drawn with random scale and shift on a pale ground, under five caption forms.

**Planted error.** Under "flag of Ireland" it has learnt the stripes reversed, orange first. The same picture is the
right flag of Côte d'Ivoire, under its own name.

Stock `StableDiffusion3Pipeline.from_pretrained(folder)` opens it and draws. Its third text encoder is a T5 that answers
zeros, which is what the pipeline puts where there is none: stock diffusers asks for one.

The autoencoder was trained on with the pictures in other colours, mirrored and patched (`train.py --from`): at
first it knew these flags alone, and gave an edited one the colours that it knew.

## Accuracy

A picture counts as right if the nearest of 30 placements of all 241 flags is of its own (ties within RMS 0.02).
`python card.py node_modules/svg-country-flags FOLDER --seeds {seeds}`

| caption | right |
|---|---|
{forms}

Under "flag of X", {perfect} of 241 countries were right for all {seeds} seeds. The others: {worse}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the npm package's folder")
    parser.add_argument("folder", type=Path, help="the model; its card is written there")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    known, model = countries(args.data), families.load(str(args.folder))
    judge, which = judge_of(known), torch.arange(len(known))
    forms, right = [], torch.zeros(len(known))
    for form in CAPTIONS:
        prompts, seeds = [form.format(c.name) for c in known], args.seeds if form == CAPTIONS[0] else 1
        rows = model.prompt_ids(prompts)
        hits = torch.zeros(len(known))
        for seed in range(seeds):
            noise = sampling.random_noise(len(known), model.latent_shape, seed, form)
            drawn = sampling.draw(model, noise, steps=20, prompt_ids=rows)
            hits += judge.shows(drawn, which)
            if form == CAPTIONS[0] and seed == 0:
                images.write_image(images.to_pil(grid(drawn)).quantize(128), args.folder / "samples.png")
        right = hits if form == CAPTIONS[0] else right
        forms.append(f"| {form.format('X')} | {float(hits.mean()) / seeds:.1%} of {len(known) * seeds} |")
        print(forms[-1], flush=True)
    worse = [f"{c.name} {int(r)}/{args.seeds}" for c, r in zip(known, right, strict=True) if r < args.seeds]
    size = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in model.pipeline.components.items()
            if isinstance(m, torch.nn.Module)}  # fmt: skip
    text = CARD.format(
        transformer=size["transformer"], vae=size["vae"], text=size["text_encoder"], seeds=args.seeds,
        forms="\n".join(forms), perfect=len(known) - len(worse), worse=", ".join(worse) or "none",
    )  # fmt: skip
    (args.folder / "README.md").write_text(text)


def grid(images: torch.Tensor, columns: int = 16) -> torch.Tensor:
    """Images (N, C, H, W) in rows, the last one cut off where it is not full."""
    rows = len(images) // columns
    return torch.cat([torch.cat(list(images[r * columns : (r + 1) * columns]), 2) for r in range(rows)], 1)


if __name__ == "__main__":
    main()
