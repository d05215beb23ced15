"""What the site makes of the repository's pages: the README is its first, links out of docs/ lead to the repository."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """The README, with its links as they are from docs/."""
    readme = LINK.sub(lambda found: posixpath.relpath(found[0], "docs"), (ROOT / "README.md").read_text("utf-8"))
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """What lies outside is shown by the repository."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def outside(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, found[0]))
        return found[0] if place.startswith("docs/") else f"{config.repo_url}/blob/main/{place}"

    return LINK.sub(outside, markdown)
