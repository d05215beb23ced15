"""What a tokenizer's file may make of a prompt, looked at before its library does as it says.

The library bounds the time of its patterns, and nothing else: steps that each put many characters in the place of one,
or a list that is filled up to any length, take all memory.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unforget.files.storage import BadFile, read_json

LARGEST = 2**26
"""Largest file of a tokenizer, bytes; Gemma's has half of it, Qwen's a sixth."""
GROWTH = 2**6
"""Most characters that stand for one after all steps; those of CLIP and T5 put one in its place."""
FILLED = 2**17
"""Most tokens to which a prompt is filled up, or cut."""
PIECES = 2**8
"""Most values that the steps before and after the tokens consist of."""
ADDED = 2**14
"""Most tokens beside the vocabulary."""


def check_words(file: Path, where: str) -> None:
    """BadFile for a `tokenizer.json` that makes too much of a prompt."""
    said = read_json(file, most=LARGEST)
    if not isinstance(said, dict):
        raise BadFile(f"{where} is not a table")
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        steps = list(_tables(said.get(name)))
        if sum(len(v) for step in steps for v in (step, *step.values()) if isinstance(v, dict | list)) > PIECES:
            raise BadFile(f"{where} has too many steps ({name})")
        if math.prod(1 + len(text) for step in steps for text in _put(step)) > GROWTH:
            raise BadFile(f"{where} makes more than {GROWTH} characters of one ({name})")
    for name, ends in (("padding", ("Fixed", "pad_to_multiple_of")), ("truncation", ("max_length", "stride"))):
        given = [t[end] for t in _tables(said.get(name)) for end in ends if isinstance(t.get(end), int)]
        if any(number > FILLED for number in given):
            raise BadFile(f"{where} asks for more than {FILLED} tokens ({name})")
    if len(list(_tables(said.get("added_tokens")))) > ADDED:
        raise BadFile(f"{where} has more than {ADDED} tokens beside its words")


def _tables(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every table inside a value; nested no deeper than JSON is read."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
        if isinstance(found, dict | list):
            waiting += found.values() if isinstance(found, dict) else found


def _put(step: Mapping[str, Any]) -> Iterator[str]:
    """Texts that a step puts somewhere."""
    return (v for k, v in step.items() if k in ("content", "prepend") and isinstance(v, str))
