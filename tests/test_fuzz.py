"""Damaged files of every layout, ten thousand here; OPT_ZOO_FUZZ=100000 and OPT_ZOO_FUZZ_SEED for more.

In a process of its own: memory is limited there (fuzz_readers.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz_readers


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(__file__).parent / "fuzz_readers.py"
    return subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory through Linux")
def test_damaged_files():
    examples, seed = os.environ.get("OPT_ZOO_FUZZ", "10000"), os.environ.get("OPT_ZOO_FUZZ_SEED", "0")
    ran = fuzz("--examples", examples, "--seed", seed)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    print(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory through Linux")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{}['x']", "KeyError"),
        ("int('x')", "does not name the file"),
        ("numpy.ones(4 * 10**9, 'u1')", "MemoryError"),
        ("time.sleep(60)", "most recent call first"),
        ("socket.socket().connect(('127.0.0.1', 9))", "socket.connect"),
        ("subprocess.run(['true'])", "subprocess.Popen"),
        ("pickle.loads(pickle.dumps(Path))", "pickle.find_class"),
    ],
)
def test_the_fuzz_sees(damage, message):
    """A reader that raises something else, names nothing, takes memory, hangs, or reaches out, is found."""
    program = f"""
import pickle, socket, subprocess, sys, time, numpy
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fuzz_readers
read, fuzz_readers.SECONDS = fuzz_readers.open_checkpoint, 2
def broken(folder, *args, **options):
    if "damaged" in folder.parts:
        {damage}
    return read(folder, *args, **options)
fuzz_readers.open_checkpoint = broken
sys.argv = ["fuzz", "--examples", "50", "--reader", "safetensors"]
fuzz_readers.main()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode != 0
    assert message in ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the file that cannot be read is Linux's")
@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_a_file_that_cannot_be_read_is_named(tmp_path, reader):
    """Each file of a folder in turn: it opens, and then reading it fails, as on a bad disk."""
    for number, (_, folder, path) in enumerate(fuzz_readers.valid(tmp_path, (reader,))):
        if (reader, path.name) == ("keras", "config.json") or (folder / "manifest.ocdbt").exists():
            continue  # the config within the file counts; TensorStore names only the store
        read, work = fuzz_readers.READ.get(reader, fuzz_readers.read_weights), tmp_path / f"work-{number}"
        shutil.copytree(folder, work)
        changed = work / path.relative_to(folder)
        changed.unlink()
        changed.symlink_to("/proc/self/mem")
        with pytest.raises((OSError, ValueError)) as error:
            read(work, None if reader in fuzz_readers.READ else reader)
        assert str(work) in str(error.value) and str(path.relative_to(folder)) in str(error.value)
