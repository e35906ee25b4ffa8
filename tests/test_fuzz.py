"""Damaged files of every layout, a few hundred of each here; OPT_ZOO_FUZZ=100000 and OPT_ZOO_FUZZ_SEED for more.

In a process of its own: memory is limited there (fuzz_readers.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opt_common.checkpoints.layouts import WRITABLE


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory through Linux")
@pytest.mark.parametrize("layout", WRITABLE)
def test_damaged_files(layout):
    examples, seed = os.environ.get("OPT_ZOO_FUZZ", "300"), os.environ.get("OPT_ZOO_FUZZ_SEED", "0")
    program = Path(__file__).parent / "fuzz_readers.py"
    command = [sys.executable, str(program), "--examples", examples, "--seed", seed, "--layout", layout]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory through Linux")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{}['x']", "KeyError"),
        ("int('x')", "does not name the file"),
        ("numpy.ones(4 * 10**9, 'u1')", "MemoryError"),
        ("time.sleep(60)", "Timeout"),
    ],
)
def test_the_fuzz_sees(damage, message):
    """A reader that raises something else, names nothing, takes memory, or hangs, is found."""
    program = f"""
import sys, time, numpy
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fuzz_readers
read, fuzz_readers.SECONDS = fuzz_readers.open_checkpoint, 2
def broken(folder, *args, **options):
    if folder.name == "damaged":
        {damage}
    return read(folder, *args, **options)
fuzz_readers.open_checkpoint = broken
sys.argv = ["fuzz", "--examples", "50", "--layout", "safetensors"]
fuzz_readers.main()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode != 0
    assert message in ran.stderr
