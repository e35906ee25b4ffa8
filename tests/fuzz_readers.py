"""Damages valid checkpoints of every layout, configs and tokenizers, and reads them: a clean read, or one error that
names the file.

    python tests/fuzz_readers.py --examples 100000 --seed 7 [--reader safetensors] [--first 4711]

Runs under a limit of memory, so that a small file that asks for much shows, and of time, so that a hang does; a
connection, a program or a class that is about to be used is a failure. A failure ends the run and leaves the damaged
folder, whose name it prints; it comes again with the seed and the number printed, or, if it ended the process, with
those in the file `input` beside that folder. See test_fuzz.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import h5py
import numpy as np
import tensorstore
import zstandard

from checkpoints import gptq_folder, random_checkpoint, tiny_config
from fuzz_mutations import change_of, mutate
from opt_common.checkpoints.containers import hdf5_headers
from opt_common.checkpoints.containers.hdf5 import read_hdf5
from opt_common.checkpoints.convert import convert
from opt_common.checkpoints.layouts import LAYOUTS, WRITABLE
from opt_common.checkpoints.open import open_checkpoint
from opt_common.checkpoints.quantized import as_table
from opt_common.config import OPTConfig
from opt_common.files import read_json
from opt_common.generation import GenerationConfig
from opt_common.hub import DEMO, TOKENIZER_FILES, fetch
from opt_common.quantization import QuantizationConfig
from opt_common.tokenizer import AutoTokenizer, GPT2Tokenizer
from opt_common.weights import table

MEMORY = 1_500_000_000  # above what the process has mapped when it starts; every file here is smaller than 250 kB
SECONDS = 20  # for one input
READERS = (*WRITABLE, "hdf5", "quantized", "tokenizer", "config")

# Files that lie in the folders, and are not opened when weights are read.
UNREAD = ("vocab.json", "vocabulary.json", "merges.txt", "tokenizer.json", "generation_config.json", "metadata.json",
          "_METADATA", "_CHECKPOINT_METADATA")  # fmt: skip
# What no reader does.
FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
             "pickle.find_class")  # fmt: skip


def valid(folder: Path, readers: tuple[str, ...]) -> list[tuple[str, Path, Path]]:
    """(reader, folder, one of its files that is read): each layout whole and in shards, each of two models."""
    files = []
    for reader in readers:
        make = {"hdf5": _hdf5, "tokenizer": _tokenizers, "config": _tokenizers}.get(reader)
        for made in make(folder) if make else _checkpoints(folder, reader):
            names = {"tokenizer": TOKENIZER_FILES, "config": ("config.json", "generation_config.json")}.get(reader)
            read = sorted(path for path in made.rglob("*") if path.is_file())
            read = [path for path in read if path.name in names or ()] if names else read
            files += [(reader, made, path) for path in read if names or path.name not in UNREAD]
    return files


def _checkpoints(folder: Path, layout: str) -> list[Path]:
    found = []
    if layout == "quantized":
        return _quantized(folder)
    for size, shards in (("125m", "5GB"), ("125m", "900B"), ("350m", "5GB")):
        # few tensors, which are read many times; keras-hub's models all have biases
        biases = (size, shards) == ("125m", "5GB") or layout == "keras-hub"
        small = dict(vocab_size=8, hidden_size=4, num_attention_heads=2, ffn_dim=4, enable_bias=biases)
        config = tiny_config(size, layers=1, **small)
        made = folder / f"{layout}-{size}-{shards}"
        try:
            random_checkpoint(made, config, layout=layout, shards=shards)
        except ValueError:  # a size that the layout has no place for
            continue
        if layout == "orbax" and size == "125m":
            in_one_store(made, {} if shards == "900B" else {"compression": None, "max_inline_value_bytes": 0})
        found.append(made)
    return found


def _quantized(folder: Path) -> list[Path]:
    """Linears of 8 and 4 bits, and GPTQ's, with zero points and without."""
    config = tiny_config(layers=1, vocab_size=8, hidden_size=32, num_attention_heads=2, ffn_dim=32)
    floats = random_checkpoint(folder / "floats", config)
    for bits, size in ((8, None), (4, 16)):
        convert(floats, folder / f"quantized-{bits}", quantization=QuantizationConfig.rounding(bits, size))
    gptq_folder(folder / "gptq", config, 4, 16)
    gptq_folder(folder / "gptq-zeros", config, 8, 16, symmetric=False, shuffled=True)
    return [folder / name for name in ("quantized-8", "quantized-4", "gptq", "gptq-zeros")]


def _hdf5(folder: Path) -> list[Path]:
    """Files of HDF5 1.6's and later structures, with groups small and large enough for each of them."""
    versions: list[dict[str, Any]] = [dict(libver=name) for name in ("earliest", "v108", "latest")]
    for i, how in enumerate([*versions, dict(libver="earliest", track_order=True)]):
        (folder / f"hdf5-{i}").mkdir(parents=True)
        with h5py.File(folder / f"hdf5-{i}" / "x.h5", "w", **how) as file:
            for links in (2, 9, 60 if i == 2 else 10):
                for j in range(links):
                    file.create_group(f"a/{links}/{'x' * (j % 5)}{j}")
                file[f"a/{links}/w"] = np.ones((2, 3), "f4")
            file["a"].attrs["names"] = ["x" * 300] * 3
    return sorted(folder.glob("hdf5-*"))


def _tokenizers(folder: Path) -> list[Path]:
    """The demo's files as the Hub has them, and as transformers 5 writes them, of fewer tokens."""
    parts, whole = folder / "tokenizer-parts", folder / "tokenizer-whole"
    if not parts.is_dir():
        demo = fetch(DEMO, [])
        shutil.copytree(demo, parts, ignore=shutil.ignore_patterns("*.safetensors"))
        merges = (demo / "merges.txt").read_text(encoding="utf-8").splitlines()[:60]
        tokens = {"".join(line.split(" ")) for line in merges[1:]}
        old = json.loads((demo / "vocab.json").read_text(encoding="utf-8"))
        kept = [token for token in old if len(token) == 1 or token in tokens or old[token] < 4]
        (parts / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(kept)}), encoding="utf-8")
        (parts / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        GPT2Tokenizer.from_pretrained(parts).save_pretrained(whole)
        shutil.copy(parts / "config.json", whole)
        (whole / "vocab.json").unlink()
        (whole / "merges.txt").unlink()
    return [parts, whole]


def in_one_store(folder: Path, config: dict[str, object]) -> None:
    """The arrays of an Orbax checkpoint as Orbax itself writes them: compressed, in OCDBT's files."""
    spec = {"driver": "ocdbt", "base": f"file://{folder}/", "config": config}
    store = tensorstore.KvStore.open(spec).result()
    for place in [path for path in folder.iterdir() if path.is_dir() and (path / ".zarray").exists()]:
        for path in place.iterdir():
            header = path.name == ".zarray"
            compressor = json.dumps({"id": "zstd", "level": 1}).encode()
            data = path.read_bytes().replace(b'"compressor": null', b'"compressor": ' + compressor)
            store.write(f"{place.name}/{path.name}", data if header else zstandard.compress(data)).result()
        shutil.rmtree(place)


def read_weights(folder: Path, layout: str | None) -> None:
    """Everything that a reader does with a checkpoint; None for whatever layout the damage leaves recognizable."""
    opened = open_checkpoint(folder, layout, prefer=True)
    for name in opened.names.values():
        entry = opened.checkpoint[name]
        for array in (entry.read(), entry.map()):
            assert (array.shape, array.nbytes) == (tuple(entry.shape), entry.nbytes), name


def read_quantized(folder: Path, layout: str | None) -> None:
    """As it is stored, and as floats."""
    opened = open_checkpoint(folder, prefer=True)
    held = {name: opened.checkpoint[stored] for name, stored in opened.names.items()}
    for config in (opened.config, dataclasses.replace(opened.config, quantization_config=None)):
        for spec, entry in as_table(held, table(config, opened.architecture)):
            assert entry.read().shape == tuple(entry.shape) == spec.shape, spec.name


def read_at_once(folder: Path, layout: str) -> None:
    """The layout's own reader and no more: other layouts are not looked for, and headers are not read twice."""
    kind = LAYOUTS[layout]
    main = kind.find(folder) if kind.find else next((m for name in kind.main if (m := folder / name).is_file()), None)
    if main is None:
        raise FileNotFoundError(f"{folder}: no weights of layout {layout}")
    _, entries = kind.read(main)
    if kind.config(main, entries) is None:
        OPTConfig.from_dict(read_json(folder / "config.json"), source=str(folder / "config.json"))
    for name, entry in entries.items():
        for array in (entry.read(), entry.map()):
            assert (array.shape, array.nbytes) == (tuple(entry.shape), entry.nbytes), name


def read_tokenizer(folder: Path, layout: str | None) -> None:
    tokenizer = (GPT2Tokenizer if layout else AutoTokenizer).from_pretrained(folder)
    ids = tokenizer("The <pad> </s> caf\u00e9 1234 " * 9)["input_ids"]
    assert tokenizer.decode(ids) is not None and repr(tokenizer)


def read_config(folder: Path, layout: str | None) -> None:
    config = OPTConfig.from_pretrained(folder)
    assert OPTConfig.from_dict(json.loads(config.to_json())).to_json() == config.to_json()
    GenerationConfig.from_folder(folder, config).to_json_string()


class NoChecksum:
    """That of any bytes."""

    def __init__(self, data: bytes) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return True


CHECKSUM = hdf5_headers.checksum


def ignore_checksums(ignored: bool) -> None:
    """Read HDF5 files as if their damage came with checksums that fit."""
    hdf5_headers.checksum = NoChecksum if ignored else CHECKSUM


def read_datasets(folder: Path, layout: str | None) -> None:
    for name, entry in read_hdf5(folder / "x.h5").items():
        assert entry.read().nbytes == entry.nbytes, name


READ: dict[str, Callable[[Path, str | None], None]] = {
    "hdf5": read_datasets,
    "quantized": read_quantized,
    "tokenizer": read_tokenizer,
    "config": read_config,
}


class Peak:
    """The most memory that the process held since the start, above what it held then."""

    def __init__(self) -> None:
        self.status, self.forget = os.open("/proc/self/status", os.O_RDONLY), None
        with suppress(OSError):
            self.forget = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def start(self) -> None:
        if self.forget:
            os.pwrite(self.forget, b"5", 0)
        self.before = self._status(b"VmRSS")

    def grown(self) -> int:
        """In bytes; 0 where the kernel does not forget an older peak."""
        return self._status(b"VmHWM") - self.before if self.forget else 0

    def _status(self, name: bytes) -> int:
        text = os.pread(self.status, 4096, 0)
        return int(text[text.index(name) :].split(maxsplit=2)[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--reader", action="append", default=[])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable()  # for crashes in native code
    faulthandler.register(signal.SIGALRM, chain=True)  # for what takes too long: the stack, then the end
    readers = tuple(options.reader) or READERS
    weights = [1 if reader == "orbax" else 3 for reader in readers]  # TensorStore takes its time
    outcomes: Counter[str] = Counter()
    slowest, largest, start = (0.0, ""), (0, ""), time.monotonic()

    root = Path(tempfile.mkdtemp(prefix="opt-zoo-fuzz-"))
    files = {reader: valid(root / "valid", (reader,)) for reader in readers}
    texts = {path: path.read_bytes() for each in files.values() for _, _, path in each}
    shutil.copytree(root / "valid", root / "damaged", copy_function=os.link)
    for reader, folder, _ in (file for each in files.values() for file in each):
        READ.get(reader, read_weights)(folder, reader)  # import what reading takes before memory is limited
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.RLIM_INFINITY))
    used: list[str] = []
    sys.addaudithook(lambda event, _: used.append(event) if event in FORBIDDEN else None)
    current = open(root / "input", "wb", buffering=0)
    peak = Peak()
    gc.freeze()

    for number in range(options.first, options.first + options.examples):
        random = Random(f"{options.seed}/{number}")
        (reader,) = random.choices(readers, weights)
        _, folder, path = random.choice(files[reader])
        work = root / "damaged" / folder.relative_to(root / "valid")
        changed = work / path.relative_to(folder)
        damaged = mutate(change_of(path), texts[path], random)
        changed.unlink()
        changed.write_bytes(damaged)
        label = f"{reader}, {path.relative_to(root)}, --seed {options.seed} --first {number}"
        os.pwrite(current.fileno(), f"{label:300}".encode(), 0)
        ignore_checksums(random.random() < 0.5)
        peak.start()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        began = time.monotonic()
        try:
            if reader in READ or random.random() < 0.3:
                READ.get(reader, read_weights)(work, random.choice([reader, None]))
            else:
                read_at_once(work, reader)
            outcomes["read"] += 1
        except (ValueError, OSError) as error:
            assert not used, f"{used}: {label}: {work}"
            # UnicodeError and the like are ValueErrors too, of a library that does not know the file
            assert str(work) in str(error), f"does not name the file: {label}: {work}: {error!r}"
            outcomes["refused"] += 1
        except BaseException:
            print(f"failed: {label}: {work}", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert not used, f"{used}: {label}: {work}"
        slowest = max(slowest, (time.monotonic() - began, f"{label}, {len(damaged):,} bytes"))
        largest = max(largest, (peak.grown(), f"{label}, {len(damaged):,} bytes"))
        changed.unlink()
        os.link(path, changed)
        if number % 1000 == 0:
            gc.collect()
    shutil.rmtree(root)
    print(f"{sum(outcomes.values()):,} inputs, {dict(outcomes)}, {sum(map(len, files.values()))} files of "
          f"{', '.join(readers)}, seed {options.seed}, {time.monotonic() - start:.0f} s\n"
          f"slowest: {slowest[0]:.2f} s, {slowest[1]}\nlargest: {largest[0] / 1e6:.1f} MB, {largest[1]}")  # fmt: skip


if __name__ == "__main__":
    main()
