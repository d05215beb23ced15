"""`models`: what a model may be called, by family."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from unforget import families
from unforget.api.computing import memory_plan
from unforget.config import UnlearnConfig
from unforget.errors import UnforgetError


def models() -> list[dict[str, Any]]:
    """Every family with its names: what is trained, what it was tested with, and GiB to unlearn where that is known.

    Memory is planned from a model's configuration, which nothing is downloaded for.
    """
    embedded = {name: families.spec_of(name) for name in families.EMBEDDED}
    return [{
        "family": spec.name, "title": spec.title, "pipelines": [spec.pipeline_class, *spec.also],
        "prompts": spec.prompted, "trained": list(spec.scopes), "formats": list(spec.formats),
        "single_file": spec.layout is not None,
        "names": [
            *(_named(name, "in this package") for name, own in embedded.items() if own is spec),
            *(_named(alias, repo) for alias, repo in spec.aliases.items()),
        ],
    } for spec in families.FAMILIES]  # fmt: skip


def _named(name: str, source: str) -> dict[str, Any]:
    own = name in families.EMBEDDED
    tested = "trained, judged, exported" if own else "tiny random weights"
    return {"name": name, "source": source, "tested": tested, "memory_gib": _memory(name if own else _held(source))}


def _held(source: str) -> str | None:
    """The folder of a hub's model whose configuration lies on this disk."""
    repo, _, revision = source.partition("@")
    found = try_to_load_from_cache(repo, "model_index.json", revision=revision or None)
    return str(Path(found).parent) if isinstance(found, str) else None


def _memory(ref: str | None) -> float | None:
    if ref is not None:
        with suppress(UnforgetError):  # a folder that lacks a part: it will be downloaded
            return memory_plan(UnlearnConfig(model=ref, target=("any.png",), device="cpu"))["peak"]
    return None
