"""Damages valid checkpoints of every layout and reads them: a clean read, or one error that names the file.

    python tests/fuzz_readers.py --examples 100000 --seed 7 [--layout safetensors]

Runs under a limit of memory, so that a small file that asks for much shows, and of time, so that a hang does. A failure
is shrunk, printed, and ends the run. See test_fuzz.py.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tensorstore
import zstandard
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from checkpoints import random_checkpoint, tiny_config
from opt_common.checkpoints.layouts import WRITABLE
from opt_common.checkpoints.open import open_checkpoint

MEMORY = 1_500_000_000  # above what the process has mapped when it starts; every file here is smaller than 100 kB
SECONDS = 20  # for one input

# Files that lie in the folders, and are not opened when weights are read.
UNREAD = (
    "vocab.json",
    "vocabulary.json",
    "merges.txt",
    "tokenizer.json",
    "generation_config.json",
    "metadata.json",
    "_METADATA",
    "_CHECKPOINT_METADATA",
)

# What takes the place of bytes: the values that lengths, offsets and types go wrong at.
PIECES = [
    b"", b"\0", b"\xff", b"\x80", b"\x7f", b"0", b"9" * 30, b"-1", b"1e99", b"null", b"NaN", b'"', b"\\", b"{",
    b"[" * 2000, b"}", b"../", b"/etc/passwd", b"\0" * 64, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\0\0\0\0\x80",
    b"\xdf\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x81" * 3000, b"cos\nsystem\n",
    b"\x80\x04",
]  # fmt: skip

changes = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "set", "cut", "drop", "insert", "copy"]),
        st.floats(0, 1, exclude_max=True),  # where
        st.floats(0, 1, exclude_max=True),  # from where
        st.integers(0, 255),
        st.one_of(st.sampled_from(PIECES), st.binary(max_size=12)),
    ),
    min_size=1,
    max_size=6,
)


def damaged(data: bytes, changes: list[tuple[str, float, float, int, bytes]]) -> bytes:
    for what, where, other, number, piece in changes:
        # headers are where the mistakes are: half of the changes hit the first or last 600 bytes
        spans = [(0, len(data)), (0, min(600, len(data))), (max(0, len(data) - 600), len(data)), (0, len(data))]
        low, high = spans[number % 4]
        at, source = low + int(where * (high - low)), int(other * len(data))
        if what == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << number % 8)]) + data[at + 1 :]
        elif what == "set":
            data = data[:at] + piece + data[at + len(piece) :]
        elif what == "cut":
            data = data[:at]
        elif what == "drop":
            data = data[:at] + data[at + 1 + number :]
        elif what == "insert":
            data = data[:at] + piece + data[at:]
        elif what == "copy":
            chunk = data[source : source + 1 + number]
            data = data[:at] + chunk + data[at + len(chunk) :]
    return data


def valid(folder: Path, layouts: tuple[str, ...]) -> list[tuple[str, Path, Path]]:
    """(layout, folder, one of its files that is read), each layout whole and in shards, each of two models."""
    files = []
    for layout in layouts:
        for size, shards in (("125m", "5GB"), ("125m", "900B"), ("350m", "5GB")):
            config = tiny_config(size, layers=1, vocab_size=8, hidden_size=4, num_attention_heads=2, ffn_dim=4)
            made = folder / f"{layout}-{size}-{shards}"
            try:
                random_checkpoint(made, config, layout=layout, shards=shards)
            except ValueError:  # a size that the layout has no place for
                continue
            if layout == "orbax" and shards == "900B":  # which it has none of
                in_one_store(made)
            read = (path for path in made.rglob("*") if path.is_file() and path.name not in UNREAD)
            files += [(layout, made, path) for path in sorted(read)]
    return files


def in_one_store(folder: Path) -> None:
    """The arrays of an Orbax checkpoint as Orbax itself writes them: compressed, in OCDBT's files."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    for place in [path for path in folder.iterdir() if path.is_dir() and (path / ".zarray").exists()]:
        for path in place.iterdir():
            header = path.name == ".zarray"
            compressor = json.dumps({"id": "zstd", "level": 1}).encode()
            data = path.read_bytes().replace(b'"compressor": null', b'"compressor": ' + compressor)
            store.write(f"{place.name}/{path.name}", data if header else zstandard.compress(data)).result()
        shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", action="append", default=[])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    layouts = tuple(options.layout) or WRITABLE
    outcomes: Counter[str] = Counter()
    start = time.monotonic()

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        files = valid(root, layouts)
        work = root / "damaged"
        for layout, folder, _ in files:  # import what reading takes before memory is limited
            read(folder, layout)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))

        @seed(options.seed)
        @settings(
            max_examples=options.examples,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )
        @given(st.sampled_from(files), changes)
        def every_reader(file: tuple[str, Path, Path], changes: list[tuple[str, float, float, int, bytes]]) -> None:
            layout, folder, path = file
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder, work, copy_function=os.link)
            changed = work / path.relative_to(folder)
            changed.unlink()
            changed.write_bytes(damaged(path.read_bytes(), changes))
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                read(work, layout if len(changes) % 2 else None)
                outcomes["read"] += 1
            except (ValueError, FileNotFoundError) as error:
                # UnicodeError and the like are ValueErrors too, of a library that does not know the file
                assert str(work) in str(error), f"does not name the file: {error!r}"
                outcomes["refused"] += 1
            finally:
                faulthandler.cancel_dump_traceback_later()

        every_reader()
    print(f"{sum(outcomes.values())} inputs, {dict(outcomes)}, {len(files)} files of {', '.join(layouts)}, "
          f"seed {options.seed}, {time.monotonic() - start:.0f} s, "
          f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB")  # fmt: skip


def read(folder: Path, layout: str | None) -> None:
    """Everything that a reader does with a checkpoint; None for whatever layout the damage leaves recognizable."""
    opened = open_checkpoint(folder, layout, prefer=True)
    for name in opened.names.values():
        entry = opened.checkpoint[name]
        for array in (entry.read(), entry.map()):
            assert (array.shape, array.nbytes) == (tuple(entry.shape), entry.nbytes), name


if __name__ == "__main__":
    main()
