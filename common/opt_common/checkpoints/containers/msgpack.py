"""Flax's msgpack files: one map of maps ({"model": {"decoder": {"layers": {"0": ...), whose leaves are arrays.

An array is an extension of msgpack, of type 1, that holds the packed triple of shape, name of dtype, and bytes; one of
more than 2^30 bytes is a map of pieces of its flat form. Reading goes through the headers only and keeps the offsets of
the numbers. A tensor's name is the path to it, joined by "/".
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgpack
import numpy as np

from ...config import DTYPES
from ...files import naming
from ..tensors import Entry, Source, map_bytes, numpy_dtype, read_bytes

_ARRAY = 1  # the extension's number
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 2**30  # bytes
_DEPTH, _NAMES = 16, 2**16  # OPT nests 7 maps, and has 2,000 names at 175b


def read(path: Path) -> dict[str, Entry]:
    """The arrays of a file by their names; headers only."""
    with naming(path), open(path, "rb") as file:
        scan = _Scan(path, file)
        tree = scan.value("", 0)
        if not isinstance(tree, dict) or scan.at != scan.size:
            raise scan.wrong("", "wanted one map of names, and nothing after it")
    entries: dict[str, Entry] = {}
    for name, entry in _flat(path, "", tree):
        if name in entries:
            raise ValueError(f"{path}: holds {name} twice")
        entries[name] = entry
    return entries


def _flat(path: Path, prefix: str, tree: dict[str, Any]) -> list[tuple[str, Entry]]:
    found = []
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, dict) and _CHUNKED in value:
            value = _join(path, name, value)
        if isinstance(value, dict):
            found += _flat(path, name + "/", value)
        elif isinstance(value, Entry):
            found.append((name, value))
        else:
            raise ValueError(f"{path}: {name}: found {value!r}, wanted an array or a map")
    return found


def _join(path: Path, name: str, parts: dict[str, Any]) -> Entry:
    """The array that the file holds in pieces."""

    def row(key: str, kind: type) -> list[Any]:
        found = parts.get(key)
        values = [found.get(str(i)) for i in range(len(found))] if isinstance(found, dict) else [None]
        if not all(type(value) is kind for value in values):
            raise ValueError(f"{path}: {name}: found an array in pieces whose {key} are not numbered from 0")
        return values

    shape, pieces = tuple(row("shape", int)), row("chunks", Entry)
    dtypes = {piece.dtype for piece in pieces}
    if len(dtypes) != 1 or math.prod(shape) != sum(math.prod(piece.shape) for piece in pieces):
        raise ValueError(f"{path}: {name}: its pieces do not add up to an array of shape {list(shape)}")
    (dtype,) = dtypes

    def array() -> np.ndarray:
        whole, at = np.empty(math.prod(shape), numpy_dtype(dtype)), 0
        for piece in pieces:
            part = piece.map().reshape(-1)
            whole[at : at + part.size] = part
            at += part.size
        return whole.reshape(shape)

    return Entry(shape, dtype, path, array, array)


class _Scan:
    """Scans a file's headers. Checks each number in them against the size of the file before using it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.at, self.size, self.names = path, file, 0, file.seek(0, 2), 0
        file.seek(0)

    def wrong(self, name: str, what: str) -> ValueError:
        return ValueError(f"{self.path}: not readable as Flax weights: byte {self.at}: {name or 'the file'}: {what}")

    def take(self, name: str, n: int) -> bytes:
        data = self.file.read(n) if n <= self.size - self.at else b""
        if len(data) != n:
            raise self.wrong(name, f"ends here, {n} bytes wanted")
        self.at += n
        return data

    def number(self, name: str, form: str) -> Any:
        return struct.unpack(form, self.take(name, struct.calcsize(form)))[0]

    def skip(self, name: str, n: int) -> int:
        """Skip `n` bytes; returns where they begin."""
        if n > self.size - self.at:
            raise self.wrong(name, f"{n} bytes wanted, but the file ends after {self.size - self.at}")
        start, self.at = self.at, self.at + n
        self.file.seek(self.at)
        return start

    def text(self, name: str, code: int) -> str:
        """A key of a map, or the name of a dtype."""
        if 0xA0 <= code <= 0xBF:
            n = code & 0x1F
        elif code == 0xD9:
            n = self.number(name, ">B")
        else:
            raise self.wrong(name, f"found code {code:#x}, wanted a name")
        try:
            return self.take(name, n).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(name, "a name that is not UTF-8") from error

    def whole(self, name: str, code: int) -> int | None:
        """A number ≥ 0, or None if `code` does not begin one."""
        forms = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
        return code if code < 0x80 else self.number(name, forms[code]) if code in forms else None

    def value(self, name: str, depth: int) -> Any:
        """A map of values, an array's Entry, a number, or True."""
        code = self.number(name, "B")
        if 0x80 <= code <= 0x8F or code in (0xDE, 0xDF):
            n = code & 0xF if code < 0x90 else self.number(name, ">H" if code == 0xDE else ">I")
            return self.map(name, n, depth)
        extensions = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
        if code in extensions or 0xD4 <= code <= 0xD8:
            n = self.number(name, extensions[code]) if code in extensions else 1 << (code - 0xD4)
            return self.array(name, n)
        if code == 0xC3:
            return True
        number = self.whole(name, code)
        if number is None:
            raise self.wrong(name, f"found code {code:#x}, wanted a map or an array")
        return number

    def map(self, name: str, n: int, depth: int) -> dict[str, Any]:
        if depth >= _DEPTH:
            raise self.wrong(name, f"maps nested more than {_DEPTH} deep")
        values: dict[str, Any] = {}
        for _ in range(n):  # each takes bytes of the file, so a false n ends with the file
            self.names += 1
            if self.names > _NAMES:
                raise self.wrong(name, f"more than {_NAMES} names")
            key = self.text(name, self.number(name, "B"))
            if key in values:
                raise self.wrong(name, f"holds {key!r} twice")
            values[key] = self.value(f"{name}/{key}" if name else key, depth + 1)
        return values

    def array(self, name: str, n: int) -> Entry:
        kind, end = self.number(name, "b"), self.at + n
        rank = self.number(name, "B") - 0x90 if self.number(name, "B") == 0x93 else -1
        if kind != _ARRAY or not 0 <= rank < 16:
            raise self.wrong(name, f"found an extension of type {kind}, wanted {_ARRAY}: shape, dtype and bytes")
        sizes = [self.whole(name, self.number(name, "B")) for _ in range(rank)]
        shape = tuple(size for size in sizes if size is not None)
        dtype = self.text(name, self.number(name, "B"))
        code = self.number(name, "B")
        forms = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
        size = self.number(name, forms[code]) if code in forms else -1
        start = self.skip(name, max(size, 0))
        if len(shape) != rank or dtype not in DTYPES:
            raise self.wrong(name, f"found {dtype}{sizes}, wanted one of {', '.join(DTYPES)}")
        if self.at != end or math.prod(shape) * numpy_dtype(dtype).itemsize != size:
            raise self.wrong(name, f"found {size} bytes for {dtype}{list(shape)}")
        path = self.path

        def array(get: Callable[[Path, int, int], np.ndarray]) -> np.ndarray:
            return get(path, start, size).view(numpy_dtype(dtype)).reshape(shape)

        return Entry(shape, dtype, path, lambda: array(read_bytes), lambda: array(map_bytes))


def write(path: Path, tensors: Sequence[Source], advance: Callable[[int], None]) -> None:
    """Write one file."""
    with open(path, "wb") as file:
        for item in _items(_tree(tensors)):
            if isinstance(item, bytes):
                file.write(item)
                continue
            heads, left = iter(_heads(item)), 0
            for data in item.pieces():
                while data:
                    while not left:
                        head, left = next(heads)
                        file.write(head)
                    n = min(left, len(data))
                    file.write(data[:n])
                    data, left = data[n:], left - n
            data = None  # before the next tensor is read
            advance(item.nbytes)


def size(tensors: Sequence[Source]) -> int:
    """The bytes of the file that `write` makes."""
    return sum(
        len(item) if isinstance(item, bytes) else sum(len(head) + nbytes for head, nbytes in _heads(item))
        for item in _items(_tree(tensors))
    )


def _tree(tensors: Sequence[Source]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for t in tensors:
        *parts, last = t.name.split("/")
        place = tree
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = t
    return tree


def _items(tree: dict[str, Any]) -> Iterator[bytes | Source]:
    """The contents of a file in order: the bytes of maps and keys, and the tensors."""
    packer = msgpack.Packer()
    yield packer.pack_map_header(len(tree))
    for key, value in tree.items():
        yield packer.pack(key)
        if isinstance(value, dict):
            yield from _items(value)
        else:
            yield value


def _heads(t: Source) -> list[tuple[bytes, int]]:
    """The headers of a stored tensor, each with the number of bytes that follow it; several for a large tensor."""
    packer = msgpack.Packer()
    if t.nbytes <= _CHUNK:
        return [(_array_header(t.shape, t.dtype, t.nbytes), t.nbytes)]
    itemsize = numpy_dtype(t.dtype).itemsize
    whole = _CHUNK // itemsize * itemsize
    sizes = [min(whole, t.nbytes - at) for at in range(0, t.nbytes, whole)]
    shape = {str(i): size for i, size in enumerate(t.shape)}
    head = packer.pack_map_header(3) + packer.pack(_CHUNKED) + packer.pack(True) + packer.pack("shape")
    head += packer.pack(shape) + packer.pack("chunks") + packer.pack_map_header(len(sizes))
    return [(head, 0)] + [
        (packer.pack(str(i)) + _array_header((size // itemsize,), t.dtype, size), size) for i, size in enumerate(sizes)
    ]


def _array_header(shape: tuple[int, ...], dtype: str, nbytes: int) -> bytes:
    packer = msgpack.Packer()
    head = packer.pack_array_header(3) + packer.pack(shape) + packer.pack(dtype)
    head += _header(nbytes, (0xC4, 0xC5, 0xC6))
    return _header(len(head) + nbytes, (0xC7, 0xC8, 0xC9)) + bytes([_ARRAY]) + head


def _header(size: int, codes: tuple[int, int, int]) -> bytes:
    """The code of a value whose length takes 8, 16 or 32 bits, and that length."""
    width = 0 if size < 2**8 else 1 if size < 2**16 else 2
    return bytes([codes[width]]) + size.to_bytes(1 << width, "big")
