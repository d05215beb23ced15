"""Images in and out: read with every doubt said in a sentence, written whole."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from unforget.errors import UsageError
from unforget.files.storage import write_bytes

MAX_SIDE = 8192
"""Longest side of an image that is decoded at all, in pixels."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_image(
    path: Path, shape: tuple[int, int, int], *, resize: bool = False, note: Callable[[str], object] = lambda s: None
) -> Tensor:
    """One image of the model's (C, H, W), in [-1, 1]; `note` is told whatever was converted.

    Raises:
        UsageError: If it is not one readable image of that size (which `resize` crops and scales it to).
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
            raise UsageError(
                f"'{path}' is {image.width}x{image.height} pixels, the model's images are {width}x{height}",
                "Give --resize to crop and scale it.",
            )
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return from_pil(image)


def _open(path: Path) -> Image.Image:
    """The decoded image, or a sentence about why not."""
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
                f"'{path}' is {image.width}x{image.height} pixels, more than {MAX_SIDE} on a side",
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
    """Every image of a folder, by name, (N, C, H, W) in [-1, 1]."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise UsageError(f"'{folder}' is not a folder with images", f"Put {', '.join(SUFFIXES)} files into it.")
    return torch.stack([read_image(p, shape, resize=resize) for p in paths])


def from_pil(image: Image.Image) -> Tensor:
    """An 8-bit RGB or grey image as (C, H, W) in [-1, 1]."""
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
    """Images as a file would hold them: rounded to 8 bits, again in [-1, 1]."""
    return from_bytes(to_bytes(images))


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8: a quarter of the memory."""
    # In place: of large images one copy is enough.
    return images.clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Images of `to_bytes`, in [-1, 1] again."""
    return images.float().div_(127.5).sub_(1)


def image_id(image: Tensor, salt: str = "") -> str:
    """First 16 hex digits of the salted SHA-256 of an image's 8-bit pixels: the same for every lossless file of it."""
    return hashlib.sha256(salt.encode() + to_pil(image).tobytes()).hexdigest()[:16]
