"""The benchmarks' pictures, which are drawn beside their numbers, as files of the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add benchmarks/NAME.png and .svg as benchmarks/NAME.png and .svg of the site."""
    for path in sorted(BENCHMARKS.iterdir()):
        if path.suffix in (".png", ".svg"):
            files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files
