"""HDF5 files of tensors: read without HDF5's library, written with h5py.

A file is refused if it holds anything through which an HDF5 file can reach outside itself or grow when it is read:
links, virtual and external datasets, chunks, compression, types with pointers. Neither TensorFlow nor Keras writes any
of these.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...files import naming
from ..tensors import PIECE, Entry, Source, map_bytes, numpy_dtype, read_bytes
from .hdf5_headers import Dataset, Headers

if TYPE_CHECKING:
    import h5py


def read_hdf5(path: Path, start: int = 0, size: int | None = None) -> dict[str, Entry]:
    """The datasets of an HDF5 file by their full names ("a/b/c"), as they are stored; headers only.

    start, size: the part of `path` that is the HDF5 file, if it lies inside another file. Two-byte opaque values are
    bfloat16, which HDF5 has no type for: h5py stores it like this. Raises ValueError, naming file and dataset, and
    OSError, naming the file, if it cannot be read.
    """
    try:
        with naming(path), open(path, "rb") as file:
            size = file.seek(0, 2) if size is None else size
            stored = Headers(file, start, size).datasets()
        return {name: _entry(path, start, size, name, dataset) for name, dataset in stored.items()}
    except ValueError as error:
        raise ValueError(f"{path}: not readable as HDF5 weights: {error}") from error


def _entry(path: Path, start: int, size: int, name: str, stored: Dataset) -> Entry:
    dtype, nbytes = numpy_dtype(stored.dtype), math.prod(stored.shape) * numpy_dtype(stored.dtype).itemsize
    if stored.nbytes != nbytes or stored.offset + nbytes > size:
        at = f"{stored.nbytes} bytes at byte {stored.offset}"
        raise ValueError(f"{name}: found {at}, wanted {nbytes} that end before byte {size}")

    def array(get: Callable[[Path, int, int], np.ndarray]) -> np.ndarray:
        return get(path, start + stored.offset, nbytes).view(dtype).reshape(stored.shape)

    return Entry(stored.shape, stored.dtype, path, lambda: array(read_bytes), lambda: array(map_bytes))


@contextmanager
def create_hdf5(path: Path, start: int = 0) -> Iterator[h5py.File]:
    """An HDF5 file to write, from byte `start` of `path` on. Raises OSError on leaving, if a write failed."""
    import h5py

    with open(path, "w+b", buffering=0) as file:
        file.truncate(start)
        sink = _Sink(file, start)
        with h5py.File(sink, "w") as h5:
            yield h5
        if sink.error:
            raise sink.error


def add_variable(file: h5py.File, tensor: Source) -> None:
    """Write a tensor to a file as Keras does."""
    dataset = file.create_dataset(tensor.name, data=tensor.array())
    if tensor.dtype == "bfloat16":
        dataset.attrs["dtype"] = "bfloat16"  # HDF5 has no such type; Keras marks it like this


class _Sink(io.RawIOBase):
    """A file that keeps its error to itself: HDF5 aborts the process if a write fails while it closes."""

    def __init__(self, file: io.RawIOBase, start: int) -> None:
        self.file, self.start = file, start
        self.error: OSError | None = None

    def _tried(self, call: Callable[[], Any]) -> Any:
        if self.error is None:
            try:
                return call()
            except OSError as error:
                self.error = error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset + (0 if whence else self.start), whence) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start

    def readinto(self, buffer: Any) -> int | None:
        return self.file.readinto(buffer)

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        while self.error is None and done < len(view):
            done += self._tried(lambda done=done: self.file.write(view[done : done + PIECE])) or 0
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self._tried(lambda: self.file.truncate(None if size is None else self.start + size))
        return size or 0


@contextmanager
def imagine_hdf5() -> Iterator[tuple[h5py.File, Holes]]:
    """An HDF5 file in memory, to measure its size."""
    import h5py

    memory = Holes()
    with h5py.File(memory, "w") as h5:
        yield h5, memory


class Holes(io.RawIOBase):
    """A sparse file in memory, of `size` bytes: pages of zeros take no memory."""

    _PAGE = 4096

    def __init__(self) -> None:
        self.pages: dict[int, bytes] = {}
        self.at = self.size = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = (0, self.at, self.size)[whence] + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        return self.size

    def _spans(self, n: int) -> Iterator[tuple[int, int, int, int]]:
        """The next `n` bytes, page by page: the page, the offset in it, the offset among the `n`, the length."""
        done = 0
        while done < n:
            page, start = divmod(self.at, self._PAGE)
            length = min(self._PAGE - start, n - done)
            yield page, start, done, length
            done += length
            self.at += length

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self.size - self.at))]
        for page, start, done, length in self._spans(len(view)):
            view[done : done + length] = self.pages.get(page, bytes(self._PAGE))[start : start + length]
        return len(view)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for page, start, done, length in self._spans(len(view)):
            old = self.pages.pop(page, bytes(self._PAGE))
            new = old[:start] + bytes(view[done : done + length]) + old[start + length :]
            if any(new):
                self.pages[page] = new
        self.size = max(self.size, self.at)
        return len(view)
