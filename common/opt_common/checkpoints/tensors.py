"""Tensors that lie in a file, and tensors to be written to one.

Arrays are numpy's, in the checkpoint's own dtype (bfloat16 through ml_dtypes), so that every framework reads through
the same door.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ..files import read_json

MAX_SHARD_SIZE = "5GB"

PIECE = 2**19  # bytes to write at once
_BLOCK = 2**23  # bytes: stays in the processor's cache from being turned to being written
_MADV_POPULATE_READ = 22


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype called `name`, bfloat16 included."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its shape, the name of its dtype, its file, and how to read it: `read` makes a fresh array,
    `map` one of the file's own pages, perhaps not aligned, for those who copy it elsewhere at once and let it go.
    Either may be a transposed view of what is stored; see `contiguous`."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]
    map: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Source:
    """A tensor to be written: what is known before it is read, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def array(self) -> np.ndarray:
        """What `read` gives, its elements in order. ValueError, naming the tensor, if it is not what was promised."""
        return contiguous(self._checked())

    def blocks(self) -> Iterator[np.ndarray]:
        """As `array`, all of it or some rows at a time, so that little is copied before it is written; perhaps not
        aligned in memory."""
        array = self._checked()
        if array.flags.c_contiguous:
            yield array
            return
        rows = max(1, _BLOCK * len(array) // array.nbytes)
        with ThreadPoolExecutor(1) as pool:  # one block is turned while another is written
            ahead = pool.submit(contiguous, array[:rows])
            for i in range(rows, len(array) + rows, rows):
                block, ahead = ahead.result(), pool.submit(contiguous, array[i : i + rows])
                yield block

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of `array`, few enough at a time to be in the processor's cache still when they are written."""
        for block in self.blocks():
            data = block.reshape(-1).view(np.uint8).data
            for at in range(0, len(data), PIECE):
                yield data[at : at + PIECE]

    def _checked(self) -> np.ndarray:
        array = self.read()
        if (array.shape, array.dtype) != (self.shape, numpy_dtype(self.dtype)):
            found, wanted = f"{array.dtype}{list(array.shape)}", f"{self.dtype}{list(self.shape)}"
            raise ValueError(f"{self.name}: found {found}, wanted {wanted}")
        return array


def turned(entry: Entry) -> Entry:
    """A matrix that its file stores [in, out], as [out, in]."""
    return Entry(entry.shape[::-1], entry.dtype, entry.file, lambda: entry.read().T, lambda: entry.map().T)


def rearranged(entry: Entry, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Entry:
    """The stored tensor made into one of `shape` when it is read."""
    return Entry(shape, entry.dtype, entry.file, lambda: change(entry.read()), lambda: change(entry.map()))


def renamed(tensor: Source, name: str, transposed: bool) -> Source:
    """A tensor as a layout calls and stores it."""
    if transposed:
        return Source(name, tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)
    return Source(name, tensor.shape, tensor.dtype, tensor.read)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it whose elements lie in order, and aligned.

    numpy copies a transposed matrix element by element across its rows, which fall into few lines of the cache when
    they are powers of two long; a block copied aside, its rows a little longer, goes four to five times as fast.
    """
    if array.ndim != 2 or array.flags.c_contiguous or array.strides[0] != array.itemsize:
        return np.require(array, requirements=["C", "A"])
    stored, size = array.T.view(np.uint8), array.itemsize  # bytes: not every map of a file is aligned
    rows, columns = array.shape
    block, out = 256, np.empty(array.shape, f"u{size}")  # bits: numpy copies bfloat16 slowly
    aside = np.empty((block, block + 32), out.dtype)
    for i in range(0, columns, block):
        for j in range(0, rows, block):
            piece = stored[i : i + block, j * size : (j + block) * size]
            copy = aside[: len(piece), : piece.shape[1] // size]
            copy.view(np.uint8)[...] = piece
            out[j : j + block, i : i + block] = copy.T
    return out.view(array.dtype)


def split(tensors: Sequence[Source], limit: int) -> list[list[Source]]:
    """The tensors in order, as shards of at most `limit` bytes; one larger than that gets a shard of its own."""
    shards: list[list[Source]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def name_shards(main: str, tensors: Sequence[Source], limit: int) -> dict[str, list[Source]]:
    """The files that hold the tensors: `main`, or shards named after it."""
    shards, (stem, _, suffix) = split(tensors, limit), main.partition(".")
    n = len(shards)
    names = [main] if n == 1 else [f"{stem}-{i:05}-of-{n:05}.{suffix}" for i in range(1, n + 1)]
    return dict(zip(names, shards, strict=True))


def write_sharded(
    folder: Path,
    main: str,
    tensors: Sequence[Source],
    limit: int,
    write: Callable[[Path, list[Source]], None],
    in_index: Callable[[str], str] = lambda name: name,
) -> list[str]:
    """Write the tensors to the file `main`, or to shards named after it and an index. Returns the names of the files
    with weights. `in_index` is what the index calls a tensor."""
    shards = name_shards(main, tensors, limit)
    for name, shard in shards.items():
        write(folder / name, shard)
    if len(shards) > 1:
        (folder / f"{main}.index.json").write_bytes(_index(shards, in_index))
    return list(shards)


def plan_sharded(
    main: str,
    tensors: Sequence[Source],
    limit: int,
    size: Callable[[list[Source]], int],
    in_index: Callable[[str], str] = lambda name: name,
) -> list[tuple[str, int]]:
    """The files that `write_sharded` would make, and their bytes; `size` tells those of one."""
    shards = name_shards(main, tensors, limit)
    files = [(name, size(shard)) for name, shard in shards.items()]
    return files + ([(f"{main}.index.json", len(_index(shards, in_index)))] if len(shards) > 1 else [])


def _index(shards: dict[str, list[Source]], in_index: Callable[[str], str]) -> bytes:
    weight_map = {in_index(tensor.name): name for name, shard in shards.items() for tensor in shard}
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def parse_size(size: int | str) -> int:
    """A number of bytes: 1000, "5GB", "200MB" (decimal), "5GiB" (binary). ValueError for anything else."""
    if isinstance(size, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
        if found:
            number, unit, binary = found.groups()
            size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f"max_shard_size: found {size!r}, wanted bytes > 0 such as 1000000, '200MB' or '5GB'")
    return size


def read_sharded(
    index: Path, read: Callable[[Path], dict[str, Entry]], hub_name: Callable[[str], str] = lambda name: name
) -> tuple[list[Path], dict[str, Entry]]:
    """The shards that an index names, and their tensors. Each tensor must lie where the index says, once.

    `hub_name` gives the Hub's name, by which `read` knows a tensor, for the one in the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map: wanted an object of tensor names and file names")
    named, weight_map = weight_map, {}
    for name, file in named.items():
        if hub_name(name) in weight_map:
            raise ValueError(f"{index}: weight_map names {hub_name(name)} twice, once as {name}")
        weight_map[hub_name(name)] = file
    files = shard_files(index, weight_map.values())
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read(file).items():
            if weight_map.get(name) != file.name:
                said = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise ValueError(f"{file}: holds {name}, which {index.name} puts {said}")
            entries[name] = entry
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise ValueError(f"{index}: names tensors that its shards do not hold: {some(absent)}")
    return files, entries


def shard_files(index: Path, names: Iterable[str]) -> list[Path]:
    """The shards beside an index that it names. ValueError for a name that leads elsewhere, FileNotFoundError."""
    names = sorted(set(names))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise ValueError(f"{index}: weight_map names files outside the folder: {some(map(repr, outside))}")
    files = [index.with_name(name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: names shards that are not there: {some(missing)}")
    return files


def some(names: Iterable[str]) -> str:
    """The names, or the first of very many."""
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def read_bytes(path: Path, start: int, size: int) -> np.ndarray:
    # a plain read, not a memory map: the pages of a map count as this process's memory for as long as it is open
    data = np.fromfile(path, np.uint8, size, offset=start)
    if data.nbytes != size:
        raise ValueError(f"{path}: ends at {start + data.nbytes} bytes, wanted {start + size}")
    return data


def map_bytes(path: Path, start: int, size: int) -> np.ndarray:
    """Bytes of a file that are its own pages, and perhaps not aligned; what is written to them stays in memory. OSError
    that names the file if they cannot be read."""
    if size == 0 or path.stat().st_size < start + size:  # a map cannot be empty, nor go beyond the file
        return read_bytes(path, start, size)
    before = start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=start - before)
    if sys.platform == "linux":
        # all at once, which is faster; and later a page that cannot be read would end the process
        try:
            pages.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
    return np.frombuffer(pages, np.uint8, size, before)
