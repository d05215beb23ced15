"""Images in and out: read with every doubt said in a sentence, written whole."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor

from unforget.errors import UnforgetError, UsageError
from unforget.files.storage import write_bytes

MAX_SIDE = 8192
"""Longest side of an image that is decoded at all, in pixels."""
MAX_PIXELS = 2**25
"""Most pixels of an image that is decoded: its colours are converted in memory, in copies of four bytes each."""
COPIED = ("WEBP", "AVIF")
"""Of these half as many: their decoders hold several copies."""
MAX_BYTES = 2**28
"""Largest file of an image, which some decoders read whole."""
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
"""What is decoded. Pillow knows more, some of which other programs decode."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif")
"""Names by which a folder's pictures are known; `config`, which has no torch, has the same."""
UPRIGHT = 1
ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held."""
Note = Callable[[str], object]


def read_image(
    path: Path, shape: tuple[int, int, int], *, resize: bool = False, note: Note = lambda sentence: None
) -> Tensor:
    """One image of the model's (C, H, W), in [-1, 1], as a viewer shows it; `note` is told whatever was converted.

    Raises:
        UsageError: If it is not one readable image of that size (which `resize` crops and scales it to).
    """
    with _decoding(path):
        return _read(path, shape, resize, lambda sentence: note(f"{path}: {sentence}"))


def check_picture(path: Path) -> None:
    """Raise `UsageError` for a file that is no picture of a kind that is read here, or is too large."""
    with _decoding(path):
        _open(path).verify()


def _read(path: Path, shape: tuple[int, int, int], resize: bool, note: Note) -> Tensor:
    channels, height, width = shape
    image = _open(path)
    _check(image, path, (width, height), resize)
    image.load()
    image = _upright(image, note)
    if image.mode not in ("RGB", "L"):
        note(f"{image.mode} converted to RGB" + (", on white" if image.has_transparency_data else ""))
        if image.mode.startswith("I"):
            eight = (np.arange(2**16) / 257).round().astype(np.uint8)
            image = Image.fromarray(eight[np.asarray(image).clip(0, 2**16 - 1)])
        elif image.has_transparency_data:
            image = image if image.mode == "RGBA" else image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return from_pil(image)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Say of a file what its decoder raises, which may be anything."""
    try:
        yield
    except (UnforgetError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UsageError(f"'{path}' is not an image of a kind that is read here", f"Give {_listed(FORMATS)}.") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UsageError(f"'{path}' cannot be decoded: {reason}", "The file looks truncated or damaged.") from None


def _open(path: Path) -> Image.Image:
    """The image, not yet decoded, or a sentence about why not."""
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder", "Give one image file.")
    if not path.exists():
        raise UsageError(f"there is no file '{path}'", "Check the path.")
    if path.stat().st_size == 0:
        raise UsageError(f"'{path}' is empty", "Give an image file.")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"'{path}' has more than {MAX_BYTES} bytes", "Scale it to the model's size first.")
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.init()
    known = [kind for kind in FORMATS if kind in Image.OPEN]  # Pillow before 11.3 lacks AVIF
    image: Image.Image = Image.open(path, formats=known)
    most = MAX_PIXELS // 2 if image.format in COPIED else MAX_PIXELS
    if max(image.size) > MAX_SIDE or image.width * image.height > most:
        limit = f"{MAX_SIDE} on a side" if max(image.size) > MAX_SIDE else f"{most:,} in all"
        raise UsageError(f"{_sized(path, image)}, more than {limit}", "Scale it to the model's size first.")
    return image


def _check(image: Image.Image, path: Path, size: tuple[int, int], resize: bool) -> None:
    """Refuse before it is decoded what would not do."""
    turned = image.getexif().get(ORIENTATION, UPRIGHT) > 4
    if not resize and (image.size[::-1] if turned else image.size) != size:
        sentence = f"{_sized(path, image)}, the model's images are {size[0]}x{size[1]}"
        raise UsageError(sentence, "Give --resize to crop and scale it.")
    # A camera's file may hold previews and depth maps, too; to every viewer the first picture is all.
    if image.format != "MPO" and _moves(image):
        raise UsageError(f"'{path}' has several frames", "Save the one frame you mean as PNG.")
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # Pillow 10 opens PNGs of 16 bits so
        raise UsageError(f"'{path}' holds numbers without a fixed range", "Save it with 8 or 16 bits a channel.")


def _sized(path: Path, image: Image.Image) -> str:
    return f"'{path}' is {image.width}x{image.height} pixels"


def _moves(image: Image.Image) -> bool:
    """Whether there is a second frame. They are not counted: that takes as long as there are any."""
    try:
        image.seek(1)
    except EOFError:
        return False
    image.seek(0)
    return True


def _upright(image: Image.Image, note: Note) -> Image.Image:
    """The image as it was meant: held upright, its colours those of sRGB."""
    if getattr(image, "n_frames", 1) > 1:
        note("the first picture is taken, what the camera put beside it is left out")
    if image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
        note("turned upright, as its camera says")
        ImageOps.exif_transpose(image, in_place=True)
    profile = image.info.get("icc_profile")
    if not profile or image.mode.startswith("I"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(own).strip()
        if "srgb" in name.lower():
            return image
        if image.mode not in ("RGB", "L", "CMYK"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"  # transparency is copied
        shown = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        note("its colour profile cannot be used, its colours are taken as they are")
        return image
    assert shown is not None  # it was not asked to change the image in place
    note(f"colours converted from '{name[:40]}' to sRGB")
    return shown


def read_folder(
    folder: Path, shape: tuple[int, int, int], *, resize: bool = False, note: Note = lambda sentence: None
) -> Tensor:
    """Every image of a folder and its subfolders, by name, (N, C, H, W) in [-1, 1]; `note` is told what is left out.

    What is hidden, as a Mac's `._x.png`, is no image.
    """
    found = [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    shown = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    paths = [p for p in shown if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise UsageError(f"'{folder}' is not a folder with images", f"Put {', '.join(SUFFIXES)} files into it.")
    inner = [p for p in paths if p.parent != folder]
    if inner:
        names = _listed(sorted({p.relative_to(folder).parts[0] for p in inner}))
        note(f"{len(paths)} pictures in '{folder}', {len(inner)} of them in subfolders ({names})")
    if left := [p for p in shown if p not in set(paths)]:
        note(f"left out of '{folder}': {len(left)} file(s) that are no pictures ({_listed([p.name for p in left])})")
    said: list[str] = []
    images = [read_image(p, shape, resize=resize, note=said.append) for p in paths]
    for sentence, count in Counter(sentence.partition(": ")[2] for sentence in said).items():
        note(f"{count} of the pictures in '{folder}': {sentence}")
    return torch.stack(images)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names if len(names) <= 8 else [*names[:3], "..."])


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
    return hashlib.sha256(os.fsencode(salt) + to_pil(image).tobytes()).hexdigest()[:16]
