"""The notebooks run, and their pages are those of the scripts."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from checkpoints import rewrite
from opt_common.frameworks import registered
from opt_common.hub import DEMO, fetch

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NEEDS = {"in_pytorch": ["pt"], "in_tensorflow": ["tf"], "in_jax": ["flax"], "three_frameworks": []}


def cells(name: str) -> list[str]:
    """The code, and the prose without its "# ", of a script's cells."""
    found = []
    for cell in re.split(r"^# %%", (FOLDER / f"{name}.py").read_text(), flags=re.MULTILINE)[1:]:
        kind, _, text = cell.partition("\n")
        prose = re.sub(r"^# ?", "", text, flags=re.MULTILINE).strip()
        found.append(prose if "[markdown]" in kind else f"```python\n{text.strip()}\n```")
    return found


def test_all_are_listed():
    """Here, by render.py, and on the page that leads to them."""
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"render"}
    linked = set(re.findall(r"\((\w+)\.md\)", (FOLDER / "index.md").read_text()))
    assert scripts == linked == NEEDS.keys()
    assert all(f'"{name}"' in (FOLDER / "render.py").read_text() for name in scripts)


@pytest.mark.parametrize("name", NEEDS)
def test_the_page_is_the_script(name):
    """Cell for cell, in order; and each picture is there. Else: python docs/notebooks/render.py"""
    page = (FOLDER / f"{name}.md").read_text()
    at = 0
    for cell in cells(name):
        found = page.find(cell, at)
        assert found >= 0, f"not on the page, or not there: {cell[:200]}"
        at = found + len(cell)
    shown = re.findall(r"\((\w+_files/\w+\.png)\)", page)
    assert len(shown) >= 3
    assert {str(path.relative_to(FOLDER)) for path in (FOLDER / f"{name}_files").iterdir()} == {*shown}


def skip_without(name: str) -> None:
    for key in NEEDS[name]:
        if missing := registered()[key].missing:
            pytest.skip(missing)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """opt-demo with its first layer alone."""
    folder = shutil.copytree(fetch(DEMO, ["*"]), tmp_path_factory.mktemp("small") / "demo")

    def cut(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if re.search(r"layers\.([1-9]|\d\d)\.", name)]:
            del tensors[name]

    return rewrite(folder, cut, num_hidden_layers=1)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg", "ignore::DeprecationWarning:matplotlib")
@pytest.mark.parametrize("name", NEEDS)
def test_every_cell_runs(name, small, tmp_path, monkeypatch):
    """On a model of one layer and in this process: most of the time goes into imports and into compiling layers."""
    skip_without(name)
    source = (FOLDER / f"{name}.py").read_text()
    assert source.count('name = "opt-demo"\n') == 1
    script = tmp_path / f"{name}.py"
    script.write_text(source.replace('name = "opt-demo"\n', f"name = {str(small)!r}\n"))
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")  # no window
    with plt.rc_context():
        runpy.run_path(str(script), run_name="__main__")
        plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_it_runs(name, tmp_path):
    """As it stands, in a process of its own."""
    skip_without(name)
    one = {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}  # no window; the tests run beside each other
    command = [sys.executable, "-W", "ignore:FigureCanvasAgg", str(FOLDER / f"{name}.py")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | one)
    assert ran.returncode == 0, ran.stderr
