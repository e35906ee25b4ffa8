"""What the site needs beyond Markdown: the benchmarks' pictures, and which pages a search shows first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FIRST = ("Coming from", "How to")  # sections that say how to do things
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add benchmarks/NAME.png and .svg as benchmarks/NAME.png and .svg of the site."""
    for path in sorted(BENCHMARKS.iterdir()):
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **others: Any) -> None:
    """Rank the pages that say how to do things above the reference and the rest."""
    if page.parent and page.parent.title in FIRST:
        page.meta["search"] = {"boost": 2}
