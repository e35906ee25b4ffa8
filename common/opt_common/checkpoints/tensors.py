"""Tensors that lie in a file, and tensors to be written to one.

Arrays are numpy's, in the checkpoint's own dtype (bfloat16 through ml_dtypes), so that every framework reads through
the same door.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

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


def transposed(entry: Entry) -> Entry:
    """A matrix that its file stores [in, out], as [out, in]."""
    return Entry(entry.shape[::-1], entry.dtype, entry.file, lambda: entry.read().T, lambda: entry.map().T)


def rearranged(entry: Entry, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Entry:
    """The stored tensor made into one of `shape` when it is read."""
    return Entry(shape, entry.dtype, entry.file, lambda: change(entry.read()), lambda: change(entry.map()))


def renamed(tensor: Source, name: str, turned: bool) -> Source:
    """A tensor as a layout calls and stores it."""
    if turned:
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
