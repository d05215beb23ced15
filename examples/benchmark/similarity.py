"""What each similarity backend is worth, on data: the share of damaged copies it finds at a fixed false-positive rate.

    cd examples/flags && npm install && cd -   # for the flags
    pip install scikit-image                   # for the photos
    python examples/benchmark/similarity.py [faces] [flags] [photos] [--backend KIND[=PATH] ...] [--copies 64]

Sets: `faces`, 32 px: the held-out faces and draws of the embedded model, near-copies of each other removed; `flags`,
64 px: as the embedded model learnt them; `photos`, up to four 256 px tiles of every photo inside scikit-image. What is
not installed is left out, with a note. The threshold is the 0.1 % quantile of the distances between different images of
a set, so a backend cannot win by calling everything a copy. Shift is a share of the side (3 % is 1 px of 32).
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from tables import row, table
from torch import Tensor
from torch.nn import functional

from unforget import families
from unforget.core import sampling
from unforget.core.metrics import pairwise_rms
from unforget.files import images
from unforget.verification.similarity import Backend, backend, pairwise

ROOT = Path(__file__).parents[2]
FLAGS = ROOT / "examples" / "flags"
DRAWS = 200
FALSE_POSITIVE_RATE = 0.001
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg",
    "rocket.jpg",
)  # fmt: skip
TEXTURES = ("brick.png", "grass.png", "gravel.png")
"""Of these only one tile: two of a brick wall are hardly different images."""
Damage = Callable[[Tensor], Tensor]


def each(edit: Callable[[Image.Image], Image.Image]) -> Damage:
    return lambda batch: torch.stack([images.from_pil(edit(images.to_pil(image))) for image in batch])


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(0.8, image.width / 80)))


def noise(sd: float) -> Damage:
    return lambda images: images + sampling.random_noise(len(images), images.shape[1:], 0, "damage") * sd / 127.5


def tint(images: Tensor) -> Tensor:
    gain, offset = (torch.tensor(v)[:, None, None] for v in ((1.1, 1.0, 0.8), (0.1, 0.0, -0.1)))
    return images * gain + offset


def shift(share: float) -> Damage:
    def moved(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        by = round(width * share)
        return functional.pad(images, (by, 0, by, 0), mode="replicate")[..., :height, :width]

    return moved


def scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(images, size, mode="bicubic", antialias=True)


def crop(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    top, left = round(height * 0.05), round(width * 0.05)
    return scaled(images[..., top : height - top, left : width - left], (height, width))


def half(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    return scaled(scaled(images, (height // 2, width // 2)), (height, width))


DAMAGES: dict[str, Damage] = {
    "jpeg 30": each(jpeg),
    "blur": each(blur),
    "noise 5": noise(5),
    "noise 10": noise(10),
    "noise 25": noise(25),
    "paler": lambda images: 0.7 * images + 0.15,
    "darker": lambda images: 1.2 * images - 0.25,
    "tint": tint,
    "grey": lambda images: images.mean(1, keepdim=True).expand_as(images),
    "shift 3 %": shift(1 / 32),
    "shift 6 %": shift(2 / 32),
    "crop 90 %": crop,
    "half size": half,
    "flip": lambda images: images.flip(-1),
}


def distinct(images: Tensor, apart: float) -> Tensor:
    """The images that are no near-copy of an earlier one."""
    near = pairwise_rms(images, images) < apart
    return images[[not near[i, :i].any() for i in range(len(images))]]


def faces() -> Tensor:
    heldout = images.read_folder(ROOT / "tests" / "data" / "heldout", (3, 32, 32))
    planted = images.read_folder(ROOT / "examples" / "faces" / "planted", (3, 32, 32))
    base = families.load("faces")
    with torch.no_grad():
        drawn = sampling.draw(base, sampling.random_noise(DRAWS, base.latent_shape, 0, "similarity"), steps=25)
    # The model draws the planted ones again and again: copies, not different images.
    drawn = distinct(torch.cat([planted, heldout, drawn]), 0.16)[len(planted) + len(heldout) :]
    return torch.cat([heldout, drawn])


def flags() -> Tensor:
    package = FLAGS / "node_modules" / "svg-country-flags"
    if not package.is_dir():
        raise LookupError("run `npm install` in examples/flags")
    sys.path.insert(0, str(FLAGS))
    from flags import countries
    from pictures import place, tensor

    # Chad and Romania, Indonesia and Monaco: one image at this size.
    return distinct(torch.stack([tensor(place(c.image)) for c in countries(package)]), 0.06)


def photos() -> Tensor:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise LookupError("install scikit-image")
    out, side = [], 256
    for name in PHOTOS:
        image = Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")
        corners = [
            (x, y) for y in range(0, image.height - side + 1, side) for x in range(0, image.width - side + 1, side)
        ]
        out += [
            images.from_pil(image.crop((x, y, x + side, y + side))) for x, y in corners[: 1 if name in TEXTURES else 4]
        ]
    return torch.stack(out)


SETS = {f.__name__: f for f in (faces, flags, photos)}


def measure(how: Backend, images: Tensor, copies: dict[str, Tensor]) -> None:
    """One row: the threshold, the share of each damage's copies below it, and what an image costs."""
    how.embed(images[:1])  # loads what there is to load
    started = time.perf_counter()
    embedded = how.embed(images)
    ms = 1000 * (time.perf_counter() - started) / len(images)
    i, j = torch.triu_indices(len(images), len(images), 1)
    different = pairwise(embedded, embedded)[i, j]
    threshold = different.nanquantile(FALSE_POSITIVE_RATE)
    # A copy in which nothing is seen is one that is missed: NaN is below no threshold.
    found = {}
    for name, damaged in copies.items():
        apart = (how.embed(damaged) - embedded[: len(damaged)]).norm(dim=1)
        found[name] = float((apart < threshold).float().mean())
    unflipped = [share for name, share in found.items() if name != "flip"]
    seen = float((~embedded.isnan().any(1)).float().mean())
    row(how.name, float(threshold), f"{seen:.0%}", *(f"{100 * share:.0f}" for share in found.values()),
        f"{100 * min(unflipped):.0f}", f"{100 * sum(unflipped) / len(unflipped):.0f}", f"{ms:.1f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="*", help=f"of {', '.join(SETS)}")
    parser.add_argument("--backend", action="append", help="KIND or KIND=PATH; repeats; pixels and structure if none")
    parser.add_argument("--copies", type=int, default=64, help="images of a set that are damaged")
    args = parser.parse_args()
    backends = [backend(text) for text in args.backend or ("pixels", "structure")]
    for how in backends:
        how.check()
    for name in args.set or SETS:
        try:
            images = SETS[name]()
        except LookupError as missing:
            print(f"\n## {name}: left out, {missing}")
            continue
        copies = {d: damage(images[: args.copies]).clamp(-1, 1) for d, damage in DAMAGES.items()}
        count, size = min(args.copies, len(images)), images.shape[-1]
        print(f"\n## {name}: {len(images)} images of {size} px, copies of {count}; % found", flush=True)
        table("backend", "threshold", "seen", *DAMAGES, "worst without flip", "mean without flip", "ms an image")
        for how in backends:
            measure(how, images, copies)


if __name__ == "__main__":
    main()
