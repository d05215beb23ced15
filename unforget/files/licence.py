"""What the card of somebody's model says of its licence."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import ModelCard

MAX_CARD = 2**20
"""Largest card that is read, bytes."""
MAX_SAID = 2**12
"""Most characters that its licence may take there."""


def licence(card: Path) -> dict[str, str | list[str]]:
    """`license`, `license_name` and `license_link` of a card; nothing, if it cannot be read.

    Nothing else of the card is parsed: YAML can say in a few lines what takes for ever to go through.
    """
    try:
        text = card.read_text(encoding="utf-8-sig") if card.is_file() and card.stat().st_size <= MAX_CARD else ""
        begin, _, rest = text.lstrip().partition("\n")
        rows = f"\n{rest}".partition("\n---")[0].split("\n") if begin.rstrip() == "---" else []
        said = "\n".join(_own(rows))
        if not said or len(said) > MAX_SAID:
            return {}
        data = ModelCard(f"---\n{said}\n---\n", ignore_metadata_errors=True).data
        found = {k: data.get(k) for k in ("license", "license_name", "license_link")}
    except Exception:  # another's file may hold anything, and yaml's errors are its own
        return {}
    several = found["license"] if isinstance(found["license"], list) else []  # as the hub takes them
    texts: list[str] = [v for v in several if isinstance(v, str)]
    return {**({"license": texts} if texts else {}), **{k: v for k, v in found.items() if v and isinstance(v, str)}}


def _own(rows: Iterable[str]) -> Iterator[str]:
    """The lines of those keys, and what is indented below them."""
    own = False
    for row in rows:
        if row.strip():
            own = bool(re.match(r"license(_name|_link)?\s*:", row)) or (own and row[0] in " \t-")
            yield from [row] if own else []
