"""Images in and out, the retain set, and the noised batches that training draws from them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from unforget import processes
from unforget.domain import Family, Instance, Noised, Pool
from unforget.errors import CannotRun, UsageError
from unforget.metrics import pairwise_rms
from unforget.storage import open_tensors, read_json, replacing, write_bytes, write_tensors

if TYPE_CHECKING:
    from unforget.schedule import Schedule

T = TypeVar("T")
MAX_SIDE = 8192
"""Longest side of an image that is decoded at all, in pixels."""
PIXELS_DRAWN = PIXELS_TRAINED = 32 * 32 * 32
"""Pixels in one pass, without and with gradients, unless the user says how many pictures."""
UNPROMPTED = 0.2
"""Share of the prompted pictures to keep that training shows under the empty prompt."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_image(
    path: Path, shape: tuple[int, int, int], *, resize: bool = False, note: Callable[[str], object] = lambda s: None
) -> Tensor:
    """One picture of the model's size, (C, H, W) in [-1, 1].

    Args:
        path: The file.
        shape: (C, H, W) of the model.
        resize: Centre-crop and scale a picture of another size instead of refusing it.
        note: Told whatever was converted.

    Raises:
        UsageError: If it is not one readable picture of that size.
    """
    channels, height, width = shape
    image = _open(path)
    if image.mode not in ("RGB", "L"):
        note(f"{path}: {image.mode} converted to RGB" + (", on white" if "A" in image.mode else ""))
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
        elif "A" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        if not resize:
            found = f"{image.size[0]}x{image.size[1]}"
            raise UsageError(
                f"'{path}' is {found} pixels, the model's images are {width}x{height}",
                "Say --resize to crop and scale it.",
            )
        from PIL import ImageOps

        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return from_pil(image)


def _open(path: Path) -> Image.Image:
    """The decoded picture, or a sentence about why not."""
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder", "Give one image file.")
    if not path.exists():
        raise UsageError(f"there is no file '{path}'", "Check the path.")
    if path.stat().st_size == 0:
        raise UsageError(f"'{path}' is empty", "Give an image file.")
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        image = Image.open(path)
        if max(image.size) > MAX_SIDE:
            raise UsageError(
                f"'{path}' is {image.size[0]}x{image.size[1]} pixels, more than {MAX_SIDE} on a side",
                "Scale it to the model's size first.",
            )
        if getattr(image, "n_frames", 1) > 1:
            raise UsageError(f"'{path}' has {image.n_frames} frames", "Save the one frame you mean as PNG.")  # type: ignore[attr-defined]
        image.load()
    except UnidentifiedImageError:
        raise UsageError(f"'{path}' is not an image", "Give a PNG or JPEG file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"'{path}' cannot be decoded: {error}", "The file looks truncated or damaged.") from None
    return image


def read_folder(folder: Path, shape: tuple[int, int, int], *, resize: bool = False) -> Tensor:
    """Every picture of a folder, by name, (N, C, H, W) in [-1, 1]."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise UsageError(f"'{folder}' is not a folder with images", f"Put {', '.join(SUFFIXES)} files into it.")
    return torch.stack([read_image(p, shape, resize=resize) for p in paths])


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty: prompts."""
    try:
        lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read '{path}': {error}", "Give a text file with one prompt a line.") from None
    if not lines:
        raise UsageError(f"'{path}' holds no prompt", "Write one prompt a line.")
    return lines


def from_pil(image: Image.Image) -> Tensor:
    """An 8-bit RGB or grey picture as (C, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) in [-1, 1] as 8-bit."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def write_image(image: Tensor | Image.Image, path: Path) -> None:
    """Write a PNG, complete or not at all."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else to_pil(image)).save(buffer, "PNG")
    write_bytes(buffer.getvalue(), path)


def eight_bit(images: Tensor) -> Tensor:
    """Pictures as a file would hold them: rounded to 8 bits, again in [-1, 1]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def image_id(image: Tensor, salt: str = "") -> str:
    """First 16 hex digits of the salted SHA-256 of an image's 8-bit pixels: the same for every lossless file of it."""
    return hashlib.sha256(salt.encode() + to_pil(image).tobytes()).hexdigest()[:16]


def random_noise(count: int, shape: tuple[int, int, int], seed: int, purpose: str, *, first: int = 0) -> Tensor:
    """Standard normal (count, C, H, W), rows from `first` on; row i depends on purpose, seed and i alone.

    The purpose keeps apart what must be independent: two uses of one seed share no row, nor do two seeds of one use.
    """
    keys = (hashlib.sha256(f"{purpose}/{seed}/{i}".encode()).digest() for i in range(first, first + count))
    generators = (torch.Generator().manual_seed(int.from_bytes(key[:7])) for key in keys)
    return torch.stack([torch.randn(shape, generator=g) for g in generators]) if count else torch.empty(0, *shape)


def in_one_pass(pixels: int, shape: tuple[int, int, int]) -> int:
    """How many pictures of a shape make up `pixels`, at least one."""
    return max(1, pixels // (shape[1] * shape[2]))


def start_level(family: Family, share: float, *, steps: int) -> int:
    """The schedule row nearest to a share of the schedule, of those that sampling in `steps` visits."""
    return min(family.levels(steps), key=lambda t: abs(t - share * len(family.schedule)))


@torch.no_grad()
def draw(
    family: Family,
    noise: Tensor,
    *,
    steps: int,
    start: int | None = None,
    condition: Tensor | None = None,
    advance: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Sample pictures from `noise` (or from noised x_0 at `start`) a batch at a time, (N, C, H, W) in [-1, 1].

    Args:
        family: The model.
        noise: What to start from, (N, ...).
        steps: Steps of a whole sampling run.
        start: Schedule row to start from, if not pure noise.
        condition: Prompts, (N,), or (1,) for the same everywhere.
        advance: Told how many pictures are done.
    """
    if condition is None:
        condition = torch.zeros(1, dtype=torch.long)
    size = in_one_pass(PIXELS_DRAWN, family.picture)
    parts = list(zip(torch.split(noise, size), torch.split(condition.expand(len(noise)), size), strict=True))

    def make(part: tuple[Tensor, Tensor]) -> Tensor:
        pictures = family.decode(family.denoise(part[0], steps=steps, start=start, condition=part[1]))
        advance(len(pictures) * processes.count())
        return pictures

    return processes.gathered(parts, [len(part) for part, _ in parts], make)


def cache_folder() -> Path:
    """`$UNFORGET_CACHE`, else `unforget` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("UNFORGET_CACHE") or home / "unforget")


def drawn_cached(
    family: Family, digest: str, prompts: Sequence[str], *, seed: int, steps: int,
    advance: Callable[[int], object] = lambda n: None,
) -> Tensor:  # fmt: skip
    """One picture for every prompt that the base draws for this seed, from the cache if it was asked before.

    Args:
        family: The base.
        digest: Of its weights.
        prompts: Empty ones for a model without.
        seed: Of the draws.
        steps: Sampler steps.
        advance: Told how many pictures are done.
    """

    def make() -> Tensor:
        noise = random_noise(len(prompts), family.shape, seed, "retain")
        return draw(family, noise, steps=steps, condition=family.condition(prompts), advance=advance)

    return cached(["retain", digest, list(prompts), seed, steps, family.picture, family.guidance], make)


def cached(key: Sequence[object], make: Callable[[], Tensor]) -> Tensor:
    """Pictures (N, C, H, W) in [-1, 1], in 8 bits, made once for a key and then read from the cache."""
    path = _place(key, "safetensors")

    def read() -> Tensor:
        return open_tensors(path).load()["images"].float() / 127.5 - 1

    if (known := _known(read)) is not None:
        return known
    # Contiguous as what is read from a file is: sums depend on how tensors lie in memory.
    eight = ((make().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).contiguous()
    _keep(path, lambda beside: write_tensors({"images": eight}, {}, beside))
    return eight.float() / 127.5 - 1


def cached_figures(key: Sequence[object], make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Figures by name, made once for a key and then read from the cache."""
    path = _place(key, "json")
    if (known := _known(lambda: {str(k): float(v) for k, v in read_json(path).items()})) is not None:
        return known
    figures = make()
    _keep(path, lambda beside: beside.write_text(json.dumps(figures)))
    return figures


def _known(read: Callable[[], T]) -> T | None:
    """What the cache holds, if it does for the first process; a damaged one is only a cache."""

    def attempt() -> T | None:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
            return read()
        return None

    found = attempt()
    if not processes.agreed(found is not None):
        return None
    if found is None:  # the first process may have written it a moment ago
        found = attempt()
    if found is None:
        raise CannotRun("a process does not see the cache of the first one", "Put $UNFORGET_CACHE where all see it.")
    return found


def _place(key: Sequence[object], suffix: str) -> Path:
    asked = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return cache_folder() / f"{key[0]}-4-{asked[:32]}.{suffix}"


def _keep(path: Path, write: Callable[[Path], object]) -> None:
    """Store in the cache; one that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            write(beside)


def nearest(images: Tensor, target: Tensor, count: int) -> Tensor:
    """The `count` images nearest to a target (C, H, W), nearest first."""
    order = pairwise_rms(images, target[None])[:, 0].argsort(stable=True)
    return images[order[:count]]


def batches(
    instances: Sequence[Instance],
    keep: Pool,
    neighbours: Pool,
    schedule: Schedule,
    *,
    steps: int,
    forget_batch: int,
    retain_batch: int,
    neighbour_share: float,
    forget_range: tuple[float, float],
    retain_range: tuple[float, float] = (0.0, 1.0),
    seed: int,
    first: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Noised, Noised]]:
    """Pairs of noised batches; every draw comes from one CPU generator: that of the seed, or one that is on its way.

    Targets take turns, each under every prompt of its own. Of a retain batch, `neighbour_share` are pictures near a
    target, the rest any; where they have prompts, some are shown without, as guidance asks.
    """
    generator = generator or torch.Generator().manual_seed(seed)
    cases = [(i, c) for i in instances for c in i.conditions]
    targets = torch.stack([i.target for i, _ in cases])
    surrogates = torch.stack([i.surrogate for i, _ in cases])
    asked = torch.tensor([c for _, c in cases])
    near = round(retain_batch * neighbour_share) if len(neighbours) else 0
    for step in range(first, steps):
        turn = (torch.arange(forget_batch) + step * forget_batch) % len(cases)
        forget = noised(targets[turn], surrogates[turn], asked[turn], schedule, generator, forget_range)
        kept = Pool.cat(_choose(neighbours, near, generator), _choose(keep, retain_batch - near, generator))
        condition = kept.condition
        if condition.any():
            condition = condition.where(torch.rand(len(kept), generator=generator) >= UNPROMPTED, 0)
        yield forget, noised(kept.x_0, kept.x_0, condition, schedule, generator, retain_range)


def _choose(pool: Pool, count: int, generator: torch.Generator) -> Pool:
    return pool[torch.randint(len(pool), (count,), generator=generator)] if count else pool[:0]


def noised(
    x_0: Tensor, x_s: Tensor, condition: Tensor, schedule: Schedule, generator: torch.Generator,
    span: tuple[float, float],
) -> Noised:  # fmt: skip
    """Noise at levels that cover `span` (shares of the schedule) evenly, in random order."""
    size = len(x_0)
    low, high = (round(s * len(schedule)) for s in span)
    place = (torch.rand((), generator=generator) + torch.arange(size) / size) % 1
    index = low + (place * (high - low)).long().clamp(max=high - low - 1)
    index = index[torch.randperm(size, generator=generator)]
    noise = torch.randn(x_0.shape, generator=generator)
    return Noised(x_0, noise, index, schedule.add_noise(x_0, noise, index), x_s, condition)
