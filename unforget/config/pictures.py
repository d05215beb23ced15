"""Pictures as people have them: a file, a folder, one of those in this package."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif")
"""Files of a folder that are pictures; other things may lie there, too."""
DEMO = Path(__file__).parents[1] / "families" / "models" / "planted"
"""What the embedded model `faces` knows by heart: `demo:0` to `demo:3`."""


def located(path: Path, home: Path = Path()) -> Path:
    """Where a path that was given in a folder leads; `demo:N` is in this package. ValueError for one that is not."""
    named = re.fullmatch(r"demo:(\w*)", str(path))
    if not named:
        return home / path
    if not (found := DEMO / f"{named[1]}.png").is_file():
        raise ValueError(f"there is no {path}, only {', '.join(f'demo:{p.stem}' for p in sorted(DEMO.iterdir()))}")
    return found


def listed(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Files, and in the place of a folder its pictures, by name; ValueError for a folder without any."""
    return tuple(found for path in map(located, paths) for found in (_inside(path) if path.is_dir() else (path,)))


def matched(targets: Sequence[Path], surrogates: Sequence[Path]) -> tuple[Path, ...]:
    """As `listed`; of one folder, the picture with each target's name. ValueError for a target without one."""
    if len(surrogates) != 1 or not surrogates[0].is_dir():
        return listed(surrogates)
    inside = _inside(surrogates[0])
    return tuple(_like(target, inside, surrogates[0]) for target in targets)


def _inside(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
    if not found:
        raise ValueError(f"there are no pictures in '{folder}'")
    return found


def _like(target: Path, pictures: list[Path], folder: Path) -> Path:
    """The picture of that name, whatever its kind unless there are several."""
    same = [p for p in pictures if p.name == target.name] or [p for p in pictures if p.stem == target.stem]
    if len(same) != 1:
        raise ValueError(f"{'no' if not same else 'more than one'} picture in '{folder}' is called as '{target}'")
    return same[0]


def _matched(value: tuple[Path, ...], known: ValidationInfo) -> tuple[Path, ...]:
    return matched(known.data.get("target", ()), value)


Picture = Annotated[Path, AfterValidator(located)]
Pictures = Annotated[tuple[Path, ...], AfterValidator(listed)]
Surrogates = Annotated[tuple[Path, ...], AfterValidator(_matched)]
"""Those of the field `target`."""
