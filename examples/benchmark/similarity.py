"""What each similarity backend is worth, on data: the share of damaged copies it finds at a fixed false-positive rate.

    cd examples/flags && npm install && cd -   # for the flags
    pip install scikit-image                   # for the photos
    python examples/benchmark/similarity.py [faces] [flags] [photos] [--backend KIND[=PATH] ...] [--copies 64]
    python examples/benchmark/similarity.py constants

Sets: `faces`, 32 px: the held-out faces and draws of the bundled model, near-copies of each other removed; `flags`,
64 px: as the bundled model learnt them; `photos`, up to four 256 px tiles of every photo inside scikit-image. What is
not installed is left out, with a note. The threshold is the 0.1 % quantile of the distances between different images of
a set, so a backend cannot win by calling everything a copy. Shift is a share of the side (3 % is 1 px of 32).

`constants`: what the thresholds of an edit say of whole photographs at 256, 512 and 1024 px, by their figures at full
size and at the working size.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageFilter, ImageOps
from tables import row, table
from torch import Tensor
from torch.nn import functional

from unforget import families
from unforget.config.base import DrawConfig
from unforget.core import metrics, sampling
from unforget.core.metrics import at_working_size, pairwise_rms, redrawn, rms, sharpness
from unforget.files import images
from unforget.surrogate.canvas import ellipse_mask
from unforget.surrogate.ranking import QUALITY, REDRAWN
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


def jpeg(quality: int) -> Damage:
    def saved(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return each(saved)


def blur(pixels: float | None = None) -> Damage:
    return each(lambda i: i.filter(ImageFilter.GaussianBlur(max(0.8, i.width / 80) if pixels is None else pixels)))


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
    "jpeg 30": jpeg(30),
    "blur": blur(),
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


def opened() -> dict[str, Image.Image]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise LookupError("install scikit-image")
    return {name: Image.open(Path(spec.origin).parent / "data" / name).convert("RGB") for name in PHOTOS}


def photos() -> Tensor:
    out, side = [], 256
    for name, image in opened().items():
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


def inside(mask: Tensor, batch: Tensor) -> Tensor:
    """Each photograph with another one inside the mask."""
    return mask * batch.roll(1, 0) + (1 - mask) * batch


def box(batch: Tensor) -> Tensor:
    quarter = batch.shape[-1] // 4
    return inside(functional.pad(torch.ones(1, 2 * quarter, 2 * quarter), (quarter,) * 4), batch)


SIZES = (256, 512, 1024)
COPIES: dict[str, Damage] = {
    "jpeg 75": jpeg(75),
    "jpeg 90": jpeg(90),
    "jpeg 90, lighter": lambda batch: jpeg(90)((0.9 * batch + 0.3).clamp(-1, 1)),
    "blur 0.7 px": blur(0.7),
    "shift 1 px": lambda batch: shift(1 / batch.shape[-1])(batch),
    "shift 2 px": lambda batch: shift(2 / batch.shape[-1])(batch),
    "half size": half,
    "2 % brighter": lambda batch: batch + 0.04,
    "noise 5": noise(5),
}
EDITS: dict[str, Damage] = {
    "another photograph": lambda batch: batch.roll(1, 0),
    "region of another": box,
    "ellipse of another": lambda batch: inside(ellipse_mask(*batch.shape[-2:]), batch),
    "blur of 1/128": lambda batch: blur(batch.shape[-1] / 128)(batch),
}


def said_of(made: Tensor, photograph: Tensor) -> Tensor:
    """Distance, share redrawn, sharpness; whether it is another instance, and of fair quality: (5, N)."""
    far, drawn = rms(made, photograph), redrawn(made, photograph)
    share = sharpness(at_working_size(made)) / sharpness(at_working_size(photograph))
    another = (far >= DrawConfig.model_fields["min_distance"].default) & (drawn >= REDRAWN)
    return torch.stack([far, drawn, share, another.float(), ((share >= QUALITY) & (share <= 1 / QUALITY)).float()])


def constants() -> None:
    """One table: what edits and copies of whole photographs count as, at full size and at the working size."""
    working, every, changes = metrics.WORKING_SIZE, list(opened().values()), {**COPIES, **EDITS}
    print(f"\n## {len(every)} photographs: at full size / at {working} px, least to most", flush=True)
    table("size", "what", "distance", "redrawn", "sharpness", "another instance, %", "of fair quality, %")
    for size in SIZES:
        whole = torch.stack([images.from_pil(ImageOps.fit(i, (size, size), Image.Resampling.LANCZOS)) for i in every])
        found: dict[float, list[Tensor]] = {math.inf: [], working: []}
        for pair in zip(whole, whole.roll(1, 0), strict=True):
            made = torch.stack([change(torch.stack(pair))[0] for change in changes.values()]).clamp(-1, 1)
            for metrics.WORKING_SIZE in found:
                found[metrics.WORKING_SIZE].append(said_of(made, pair[0]))
        sides = [torch.stack(said, 2) for said in found.values()]
        for k, name in enumerate(changes):
            told = [
                [f"{float(v[k].min()):.2f}-{float(v[k].max()):.2f}" for v in side[:3]]
                + [f"{100 * float(v[k].mean()):.0f}" for v in side[3:]]
                for side in sides
            ]
            row(size, name, *map(" / ".join, zip(*told, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="*", help=f"of {', '.join(SETS)}; or constants")
    parser.add_argument("--backend", action="append", help="KIND or KIND=PATH; repeats; pixels and structure if none")
    parser.add_argument("--copies", type=int, default=64, help="images of a set that are damaged")
    args = parser.parse_args()
    if args.set == ["constants"]:
        return constants()
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
