"""Runs the notebooks and writes each as a page with its pictures: NAME.py -> NAME.md, NAME_files/*.png.

python docs/notebooks/render.py             # all; needs the extra "notebooks"
python docs/notebooks/render.py in_jax      # some
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

HERE = Path(__file__).parent
NAMES = ("in_pytorch", "in_tensorflow", "in_jax", "three_frameworks")


def render(name: str) -> None:
    """Run a notebook and write its page and its pictures."""
    notebook = jupytext.read(HERE / f"{name}.py")
    NotebookClient(notebook, timeout=600).execute()
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        cell["outputs"] = [out for out in outputs if out.get("name") != "stderr"]  # what libraries log of this machine
    files = HERE / f"{name}_files"
    given = {"unique_key": name, "output_files_dir": files.name}
    page, resources = MarkdownExporter().from_notebook_node(notebook, given)
    files.mkdir(exist_ok=True)
    for old in files.iterdir():
        old.unlink()
    for path, data in resources["outputs"].items():
        (HERE / path).write_bytes(data)
    page = re.sub(r"[ \t]+$", "", page, flags=re.MULTILINE).replace("![png]", "![what this cell draws]")
    (HERE / f"{name}.md").write_text(page.strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        render(name)
        print(HERE / f"{name}.md")
