"""HDF5 files of tensors.

h5py reads the headers; the numbers are read from the file at the offsets it gives. A file is refused if it holds
anything through which an HDF5 file can reach outside itself or grow when it is read: links, virtual and external
datasets, chunks, compression, types with pointers. Neither TensorFlow nor Keras writes any of these.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5t  # pyright: ignore[reportAttributeAccessIssue]

from ...files import naming
from ..tensors import PIECE, Entry, Source, map_bytes, numpy_dtype, read_bytes

# Bytes; sign bit, exponent, bits of it, mantissa, bits of it; bias: of the little-endian floats.
_FLOATS = {
    (2, (15, 10, 5, 0, 10), 15): "float16",
    (2, (15, 7, 8, 0, 7), 127): "bfloat16",
    (4, (31, 23, 8, 0, 23), 127): "float32",
    (8, (63, 52, 11, 0, 52), 1023): "float64",
}
# Of groups; OPT's names have 8 parts at most. Of objects; Keras's file of opt-175b and its optimizer has 6,300. HDF5
# takes a tenth of a millisecond for one.
_DEPTH, _OBJECTS = 16, 10_000


def read_hdf5(path: Path, start: int = 0, size: int | None = None) -> dict[str, Entry]:
    """The datasets of an HDF5 file by their full names ("a/b/c"), as they are stored; headers only.

    start, size: the part of `path` that is the HDF5 file, if it lies inside another file. Two-byte opaque values are
    bfloat16, which HDF5 has no type for: h5py stores it like this. Raises ValueError, naming file and dataset.
    """
    with naming(path), open(path, "rb") as file:
        whole = size is None
        size = file.seek(0, 2) if size is None else size
        try:
            # never locked: the Hub's cache may be read-only
            with h5py.File(path if whole else _Part(file, start, size), "r", locking=False) as h5:
                stored = dict(_walk(h5.id, "", set(), 0))
                return {name: _entry(path, start, size, name, dataset) for name, dataset in stored.items()}
        except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, TypeError and more
            raise ValueError(f"{path}: not readable as HDF5 weights: {error}") from error


def _walk(group: Any, prefix: str, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    for key in group:
        name = prefix + key.decode("utf-8")
        if group.links.get_info(key).type != h5l.TYPE_HARD:
            raise ValueError(f"{name} is a link to elsewhere, wanted a dataset")
        child = h5o.open(group, key)
        address = h5o.get_info(child).addr
        if address in seen:
            raise ValueError(f"{name} appears in the file under another name too")
        seen.add(address)
        if len(seen) > _OBJECTS:
            raise ValueError(f"it holds more than {_OBJECTS} groups and datasets, which no OPT needs")
        if isinstance(child, h5d.DatasetID):
            yield name, child
        elif isinstance(child, h5g.GroupID) and depth < _DEPTH:
            yield from _walk(child, name + "/", seen, depth + 1)
        else:
            raise ValueError(f"{name} is neither a dataset nor a group, or is nested more than {_DEPTH} groups deep")


def _entry(path: Path, start: int, size: int, name: str, dataset: h5d.DatasetID) -> Entry:
    shape, plist, offset = dataset.shape, dataset.get_create_plist(), dataset.get_offset()
    if shape is None or plist.get_layout() != h5d.CONTIGUOUS or plist.get_external_count() or offset is None:
        raise ValueError(f"{name} is chunked, compressed, virtual, empty or in another file; wanted plain numbers")
    dtype = _dtype(dataset.get_type())
    if dtype is None:
        raise ValueError(f"{name} has the type {dataset.dtype}, wanted little-endian numbers")
    nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
    if dataset.get_storage_size() != nbytes or offset + nbytes > size:
        raise ValueError(f"{name} needs {nbytes} bytes at {offset}, but the file ends at {size}")

    def array(get: Callable[[Path, int, int], np.ndarray]) -> np.ndarray:
        return get(path, start + offset, nbytes).view(numpy_dtype(dtype)).reshape(shape)

    return Entry(shape, dtype, path, lambda: array(read_bytes), lambda: array(map_bytes))


def _dtype(stored: h5t.TypeID) -> str | None:
    """The name of a type of numbers, or None for another."""
    if isinstance(stored, h5t.TypeFloatID) and stored.get_order() == h5t.ORDER_LE:
        return _FLOATS.get((stored.get_size(), stored.get_fields(), stored.get_ebias()))
    if isinstance(stored, h5t.TypeIntegerID) and (stored.get_order() == h5t.ORDER_LE or stored.get_size() == 1):
        return f"{'u' if stored.get_sign() == h5t.SGN_NONE else ''}int{8 * stored.get_size()}"
    if isinstance(stored, h5t.TypeOpaqueID) and stored.get_size() == 2:
        return "bfloat16"
    return None


@contextmanager
def create_hdf5(path: Path, start: int = 0) -> Iterator[h5py.File]:
    """An HDF5 file to write, from byte `start` of `path` on. Raises OSError on leaving, if a write failed."""
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


class _Part(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, (0, self.at, self.size)[whence] + offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        view = memoryview(buffer).cast("B")
        view = view[: max(0, min(len(view), self.size - self.at))]
        n = self.file.readinto(view)  # type: ignore[attr-defined]
        self.at += n
        return n
