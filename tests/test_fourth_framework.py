"""A fourth framework is a package and an entry point. `fourth/opt_np`, in a distribution of its own, proves it: the
command and the shared tests run on it, and no file of this repository knows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture
def site(tmp_path) -> Path:
    """A folder with opt_np installed in it, as pip leaves it."""
    shutil.copytree(TESTS / "fourth" / "opt_np", tmp_path / "opt_np", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = tmp_path / "opt_np-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: opt-np\nVersion: 1.0\nRequires-Dist: opt-zoo\n")
    (metadata / "entry_points.txt").write_text("[opt_zoo.frameworks]\nnp = opt_np.framework:NumPy\n")
    return tmp_path


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": path}
    )


def parity(site: Path) -> subprocess.CompletedProcess[str]:
    return run(site, "opt_common.cli", "parity", "--json", "--new-tokens", "6", "--framework", "np")


def shared_tests(site: Path, *files: str) -> tuple[Counter[str], str]:
    """How many tests of opt_np came out how, and what pytest printed."""
    paths = [str(TESTS / name) for name in files]
    ran = run(site, "pytest", "-q", "-p", "no:cacheprovider", "-k", "[np", *paths)
    words = ran.stdout.splitlines()[-1].replace(",", "").split()
    counts = {what: int(number) for number, what in pairwise(words) if number.isdigit()}
    return Counter(counts), ran.stdout


def disturb(site: Path) -> None:
    """Add a hundredth to one row of a weight, whenever opt_np runs a model."""
    path = site / "opt_np" / "model.py"
    text = path.read_text()
    line = "        logits, hidden = forward("
    assert line in text
    weight = 'self.weights["model.decoder.layers.1.fc2.weight"][5] += 0.01'
    path.write_text(text.replace(line, f"        {weight}\n{line}"))


def test_the_command_runs_it(site):
    ran = parity(site)
    assert ran.returncode == 0, ran.stderr
    (row,) = json.loads(ran.stdout)["rows"]
    assert (row["framework"], row["version"], row["passed"]) == ("np", "1.0", True)
    assert "np" in run(site, "opt_common.cli", "generate", "--help").stdout


def test_the_shared_tests_run_it(site):
    """They skip what it does not have."""
    files = ("parity", "generate", "heads", "training", "checkpoint", "packaging")
    counts, printed = shared_tests(site, *(f"test_{name}.py" for name in files))
    assert counts["passed"] >= 100 and counts["skipped"] > 0, printed
    assert counts["failed"] + counts["errors"] + counts["error"] == 0, printed


def test_a_disturbed_weight_turns_it_red(site):
    disturb(site)
    ran = parity(site)
    assert ran.returncode == 1
    (row,) = json.loads(ran.stdout)["rows"]
    assert (row["passed"], row["problem"]) == (False, "")
    counts, printed = shared_tests(site, "test_parity.py::test_outputs")
    assert counts["failed"] >= 40, printed
