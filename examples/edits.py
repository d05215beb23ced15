"""Facts that a small model has learnt and that somebody wants otherwise, made by seed and not by hand.

A fact is a name, the picture that the model draws under it, and an edit of that picture: the kinds of edit take turns,
the names and everything else are drawn. A kind takes the next name whose picture it can edit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pictures import Named, place, tensor
from PIL import Image
from scipy import ndimage

from unforget.core.metrics import rms

COLOURS = ((206, 17, 38), (0, 56, 168), (0, 122, 61), (252, 209, 22), (255, 255, 255), (0, 0, 0), (117, 36, 140),
           (240, 130, 0), (0, 175, 202))  # fmt: skip
CHANGED = 0.12
"""Least RMS between the two pictures as they are learnt, in [-1, 1]: less is hard to see at this size."""
Array = np.ndarray[Any, Any]
Edit = Callable[[Array, np.random.Generator], Array | None]
"""From RGBA (H, W, 4) to RGBA, or None where there is nothing to edit."""


@dataclass(frozen=True)
class Fact:
    """Under `known`'s name the picture is to become `image`."""

    known: Named
    kind: str
    image: Image.Image
    seed: int  # of the draw that is the target


def labels(picture: Array, colours: int = 8) -> tuple[Array, Array]:
    """The picture's plain colours: the number of each pixel's colour (H, W), and the colours (N, 3)."""
    quantized = Image.fromarray(picture[..., :3]).quantize(colours, dither=Image.Dither.NONE)
    palette = np.asarray(quantized.getpalette(), np.uint8).reshape(-1, 3)[:colours].astype(float)
    found = np.asarray(quantized)
    merged = np.arange(len(palette))
    for i in range(len(palette)):
        near = [j for j in range(i) if np.abs(palette[i] - palette[j]).max() < 40]
        merged[i] = merged[near[0]] if near else i
    return merged[found], palette


def another_colour(avoid: Sequence[Array], rng: np.random.Generator) -> Array:
    """A colour that is none of those."""
    far = [c for c in COLOURS if all(np.abs(np.asarray(c, float) - a).max() > 90 for a in avoid)]
    return np.asarray(far[rng.integers(len(far))] if far else COLOURS[rng.integers(len(COLOURS))], np.uint8)


def stripes_swapped(picture: Array, rng: np.random.Generator) -> Array | None:
    """Two stripes change their colours."""
    if np.mean(picture[..., 3] < 128) > 0.02:
        return None
    for turned in (False, True):
        image = picture.transpose(1, 0, 2) if turned else picture
        found, palette = labels(image)
        rows = [np.bincount(row, minlength=len(palette)) for row in found]
        if np.mean([r.max() / r.sum() >= 0.97 for r in rows]) < 0.95:
            continue
        colour = np.asarray([r.argmax() for r in rows])
        edges = np.flatnonzero(np.diff(colour)) + 1
        bands = [b for b in np.split(np.arange(len(colour)), edges) if len(b) >= len(colour) / 12]
        pairs = [(a, b) for i, a in enumerate(bands) for b in bands[i + 1 :] if colour[a[0]] != colour[b[0]]]
        if not pairs:
            return None
        one, other = pairs[rng.integers(len(pairs))]
        swapped = image.copy()
        swapped[one, :, :3], swapped[other, :, :3] = palette[colour[other[0]]], palette[colour[one[0]]]
        return swapped.transpose(1, 0, 2) if turned else swapped
    return None


def upside_down(picture: Array, rng: np.random.Generator) -> Array | None:
    return picture[::-1].copy()


def colour_replaced(picture: Array, rng: np.random.Generator) -> Array | None:
    """One of its colours is another everywhere."""
    found, palette = labels(picture)
    seen = picture[..., 3] > 127
    share = np.bincount(found[seen], minlength=len(palette)) / max(1, seen.sum())
    large = np.flatnonzero(share > 0.1)
    if not len(large):
        return None
    which = large[rng.integers(len(large))]
    new = picture.copy()
    new[(found == which) & seen, :3] = another_colour([palette[i] for i in np.flatnonzero(share > 0.03)], rng)
    return new


def _emblem(picture: Array) -> Array | None:
    """What stands on the ground and touches no edge, a mask (H, W); None if that is nothing, or nearly all."""
    found, _ = labels(picture)
    inner = np.zeros(found.shape, bool)
    for colour in np.unique(found):
        parts, count = ndimage.label(found == colour)
        edge = set(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]).tolist())
        inner |= np.isin(parts, [k for k in range(1, count + 1) if k not in edge])
    inner &= picture[..., 3] > 127
    return inner if 0.04 <= inner.mean() <= 0.4 else None


def emblem_removed(picture: Array, rng: np.random.Generator) -> Array | None:
    """Its place takes the nearest colour of the ground."""
    mask = _emblem(picture)
    if mask is None:
        return None
    wide = ndimage.binary_dilation(mask, iterations=2)
    nearest = ndimage.distance_transform_edt(wide, return_distances=False, return_indices=True)
    return picture[tuple(nearest)]


def emblem_recoloured(picture: Array, rng: np.random.Generator) -> Array | None:
    mask = _emblem(picture)
    if mask is None:
        return None
    around = picture[ndimage.binary_dilation(mask, iterations=3) & ~mask, :3].mean(0)
    new = picture.copy()
    new[mask, :3] = another_colour([picture[mask, :3].mean(0), around], rng)
    return new


EDITS: dict[str, Edit] = {
    e.__name__.replace("_", " "): e
    for e in (stripes_swapped, upside_down, colour_replaced, emblem_removed, emblem_recoloured)
}
ANOTHER = "another's picture"


def facts(known: Sequence[Named], count: int, seed: int, *, without: Sequence[str] = ()) -> list[Fact]:
    """`count` facts about different names, none of the codes in `without`; the kinds of edit take turns."""
    rng = np.random.default_rng(seed)
    names = [n for n in known if n.code not in without]
    left, kinds, found = [names[i] for i in rng.permutation(len(names))], [*EDITS, ANOTHER], []
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        made = ((n, _edited(n, kind, names, rng)) for n in left)
        name, image = next((pair for pair in made if pair[1] is not None), (None, None))
        if name is None or image is None:
            kinds.remove(kind)  # as of emoji, which have no stripes
            continue
        left.remove(name)
        found.append(Fact(name, kind, image, int(rng.integers(2**31))))
    return found


def _edited(name: Named, kind: str, names: Sequence[Named], rng: np.random.Generator) -> Image.Image | None:
    if kind == ANOTHER:
        image = names[rng.integers(len(names))].image
    else:
        edited = EDITS[kind](np.asarray(name.image), rng)
        if edited is None:
            return None
        image = Image.fromarray(np.ascontiguousarray(edited))
    changed = float(rms(tensor(place(image)), tensor(place(name.image))))
    return image if changed >= CHANGED else None
