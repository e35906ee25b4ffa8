"""Tensors stored in a file, and tensors to write to one.

Arrays are numpy's, in the checkpoint's own dtype (bfloat16 through ml_dtypes), so that all frameworks read alike.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import ml_dtypes
import numpy as np

from ..files import naming

PIECE = 2**19  # bytes to write at once
_BLOCK = 2**23  # bytes: stays in the processor's cache between transposing and writing
_AHEAD = 2**28  # bytes to read before they are asked for
_MADV_POPULATE_READ = 22
_AXES, _NUMBERS = 32, 2**59  # of any tensor: HDF5's limit; numpy's, for complex numbers


Index = tuple[slice, ...]  # a start and a stop for each axis of a tensor


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype called `name`, bfloat16 included."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its shape, the name of its dtype, its file, and how to read it. `read` gives a new array;
    `map` is zero-copy and perhaps not aligned, so copy its array and drop it. Either may be a transposed view of what
    is stored; see `contiguous`. `cut`, where the file stores the numbers in order, reads a part alone; see
    `read_part`."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]
    map: Callable[[], np.ndarray]
    cut: Callable[[Index, bool], np.ndarray] | None = None

    def part(self, index: Index, copied: bool) -> np.ndarray:
        """Some of its rows and columns. `copied`: the caller copies the array and drops it, as one of `map`."""
        return self.map()[index] if self.cut is None else self.cut(index, copied)

    def __post_init__(self) -> None:
        # Sizes beside a 0 need no bytes, so that a file can claim any; numpy cannot hold them.
        if len(self.shape) > _AXES or math.prod(size or 1 for size in self.shape) >= _NUMBERS:
            shown = ", ".join(map(str, self.shape[:6])) + (", ..." if len(self.shape) > 6 else "")
            wanted = f"at most {_AXES} axes and {_NUMBERS:,} numbers"
            raise ValueError(f"{self.file}: found a tensor of shape [{shown}], wanted {wanted}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Source:
    """A tensor to write: what is known before it is read, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def array(self) -> np.ndarray:
        """What `read` gives, contiguous. ValueError, naming the tensor, if shape or dtype are not as declared."""
        return contiguous(self._checked())

    def blocks(self) -> Iterator[np.ndarray]:
        """As `array`, at once or some rows at a time, so that little is copied before it is written; perhaps not
        aligned in memory."""
        array = self._checked()
        if array.flags.c_contiguous:
            yield array
            return
        rows = max(1, _BLOCK * len(array) // array.nbytes)
        with ThreadPoolExecutor(1) as pool:  # transposes one block while another is written
            ahead = pool.submit(contiguous, array[:rows])
            for i in range(rows, len(array) + rows, rows):
                block, ahead = ahead.result(), pool.submit(contiguous, array[i : i + rows])
                yield block

    def pieces(self) -> Iterator[memoryview]:
        """The bytes of `array`, in pieces small enough to stay in the processor's cache until they are written."""
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
    """The stored matrix, transposed when it is read."""
    return Entry(entry.shape[::-1], entry.dtype, entry.file, lambda: entry.read().T, lambda: entry.map().T)


def rearranged(entry: Entry, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> Entry:
    """The stored tensor, changed into one of `shape` when it is read."""
    return Entry(shape, entry.dtype, entry.file, lambda: change(entry.read()), lambda: change(entry.map()))


def renamed(tensor: Source, name: str, turned: bool) -> Source:
    """A tensor under another name, transposed or not."""
    if turned:
        return Source(name, tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)
    return Source(name, tensor.shape, tensor.dtype, tensor.read)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array, or a copy of it that is contiguous and aligned.

    numpy copies a transposed matrix element by element across its rows, which share few cache lines if their length is
    a power of two. Copying block by block through a buffer with slightly longer rows is four to five times as fast.
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


def ahead(reads: Iterable[tuple[int, Callable[[], np.ndarray]]]) -> Iterator[np.ndarray]:
    """What each of (bytes, how to read them) gives, in order. While one is in use the next are read, as many as fit in
    `_AHEAD` bytes beside it. An error is raised in its turn."""
    waiting: deque[tuple[int, Future[np.ndarray]]] = deque()
    pool, held = ThreadPoolExecutor(1), 0  # more readers are slower: they wait for each other in the kernel
    try:
        for size, read in reads:
            while waiting and held + size > _AHEAD:
                held -= waiting[0][0]
                yield waiting.popleft()[1].result()
            waiting.append((size, pool.submit(read)))
            held += size
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


# Whether an open file can be replaced, and read at an offset: not on Windows.
CAN_HOLD = hasattr(os, "preadv")
_HELD: ContextVar[Mapping[Path, FileIO]] = ContextVar("held")


@contextmanager
def holding(files: Mapping[Path, FileIO]) -> Iterator[None]:
    """Within the block, read these files where they would be opened by their names, which others may have taken."""
    token = _HELD.set(files)
    try:
        yield
    finally:
        _HELD.reset(token)


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    if file := _HELD.get({}).get(path):
        yield file
    else:
        with open(path, "rb", buffering=0) as file:
            yield file


def read_bytes(path: Path, start: int, size: int) -> np.ndarray:
    data = np.empty(size, np.uint8)
    fill(path, start, data)
    return data


def fill(path: Path, start: int, out: np.ndarray) -> None:
    """Read bytes of a file from `start` on into a contiguous array. OSError or ValueError, naming the file, if they
    cannot be read, or if it ends before."""
    # a plain read: the pages of a memory map count as the process's memory while it is open
    with naming(path), _opened(path) as file:
        _fill(file, path, start, memoryview(out.reshape(-1).view(np.uint8)))  # pyright: ignore[reportArgumentType]


def _fill(file: FileIO, path: Path, start: int, view: memoryview) -> None:
    at, end = start, start + view.nbytes
    while view.nbytes:
        if CAN_HOLD:
            got = os.preadv(file.fileno(), [view], at)
        else:
            file.seek(at)
            got = file.readinto(view)
        if not got:
            raise ValueError(f"{path}: ends at {at} bytes, wanted {end}")
        view, at = view[got:], at + got


def read_part(path: Path, start: int, shape: tuple[int, ...], dtype: str, index: Index, copied: bool) -> np.ndarray:
    """Some rows, or some columns of some rows, of a tensor that a file stores in order from `start` on. Other rows are
    not read; other columns are only mapped, which costs less than a read for each row, and the system would read ahead
    over them. `copied`: as in `Entry.part`."""
    kind, (rows, *others) = numpy_dtype(dtype), index
    row, n = math.prod(shape[1:]) * kind.itemsize, rows.stop - rows.start
    at = start + rows.start * row
    if all(cut == slice(0, size) for cut, size in zip(others, shape[1:], strict=True)):
        return (map_bytes if copied else read_bytes)(path, at, n * row).view(kind).reshape(n, *shape[1:])
    (columns,) = others
    first, last = columns.start * kind.itemsize, columns.stop * kind.itemsize
    out, step = np.empty((n, last - first), np.uint8), max(1, _BLOCK // row)
    for i in range(0, n, step):
        block = out[i : i + step]
        block[...] = map_bytes(path, at + i * row, len(block) * row).reshape(-1, row)[:, first:last]
    return out.view(kind)


def map_bytes(path: Path, start: int, size: int) -> np.ndarray:
    """Bytes of a file, mapped copy-on-write, perhaps not aligned. OSError, naming the file, if they cannot be read."""
    before = start % mmap.ALLOCATIONGRANULARITY
    with naming(path), _opened(path) as file:
        if size == 0 or os.fstat(file.fileno()).st_size < start + size:  # a map can be neither empty nor longer
            return read_bytes(path, start, size)
        pages = mmap.mmap(file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=start - before)
    if sys.platform == "linux":
        # all at once, which is faster; and an unreadable page would kill the process later
        try:
            pages.madvise(_MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path)) from error
    return np.frombuffer(pages, np.uint8, size, before)
