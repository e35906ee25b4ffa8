"""Files of `torch.save`, read and written without PyTorch."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..tensors import Entry, Source, numpy_dtype
from .unpickle import STORAGES, Tensor, load

_ROOT = "archive/"
_DATA = f"{_ROOT}data/"
_SMALL = {f"{_ROOT}byteorder": b"little", f"{_ROOT}version": b"3\n"}
_ALIGNED = 64  # as in PyTorch, so that numbers can be used straight from a memory map
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


def read(path: Path) -> dict[str, Entry]:
    """The tensors of a file that holds a state_dict; headers only."""
    tensors = load(path)
    if not isinstance(tensors, dict) or not all(is_name(name) for name in tensors):
        raise ValueError(f"{path}: found {type(tensors).__name__}, wanted a state_dict: names and tensors")
    other = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if other:
        raise ValueError(f"{path}: {other[0]}: found {type(tensors[other[0]]).__name__}, wanted a tensor")
    return {name: tensor.entry() for name, tensor in tensors.items()}


def is_name(name: Any) -> bool:
    """Whether `name` is acceptable as the name of a tensor, which errors print."""
    return isinstance(name, str) and name.isprintable() and len(name) <= 200


@dataclass(frozen=True)
class Stacked:
    """A tensor to write that is the concatenation of others along their rows."""

    parts: Sequence[Source]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype


Written = Source | Stacked | np.ndarray


def write(path: Path, tree: Any, advance: Callable[[int], None]) -> None:
    """What `torch.save(tree, path)` writes, for dicts, lists, strings, numbers and tensors: Source or Stacked, read one
    part at a time, in order, or a small array. `advance` is told the bytes of each Source."""
    content, tensors = _pickle(tree)
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, padding, _, wide in _records(content, tensors):
            info = zipfile.ZipInfo(name)
            info.extra = padding
            with archive.open(info, "w", force_zip64=wide) as record:
                key = name.removeprefix(_DATA)
                if key == name:
                    record.write(_SMALL.get(name, content))
                    continue
                tensor = tensors[int(key)]
                if isinstance(tensor, np.ndarray):
                    record.write(tensor.tobytes())
                    continue
                for part in tensor.parts if isinstance(tensor, Stacked) else [tensor]:
                    for piece in part.pieces():
                        record.write(piece)
                    piece = None  # before the next tensor is read
                    advance(part.nbytes)


def size(tree: Any) -> int:
    """The bytes of the file that `write` makes."""
    content, tensors = _pickle(tree)
    at, directory, count = 0, 0, 0
    for name, padding, nbytes, wide in _records(content, tensors):
        numbers = 2 * (nbytes > zipfile.ZIP64_LIMIT) + (at > zipfile.ZIP64_LIMIT)
        directory += 46 + len(name) + len(padding) + (4 + 8 * numbers if numbers else 0)
        at += 30 + len(name) + len(padding) + 20 * wide + nbytes
        count += 1
    limit = zipfile.ZIP64_LIMIT
    large = count > zipfile.ZIP_FILECOUNT_LIMIT or at > limit or directory > limit
    return at + directory + 22 + 76 * large


def _records(content: bytes, tensors: Sequence[Written]) -> Iterator[tuple[str, bytes, int, bool]]:
    """The records of the file in order: name, padding of the header, size, and whether the size exceeds 32 bits."""
    sizes = {f"{_ROOT}data.pkl": len(content)} | {name: len(value) for name, value in _SMALL.items()}
    for key, t in enumerate(tensors):
        sizes[f"{_DATA}{key}"] = int(np.prod(t.shape, dtype=np.int64)) * numpy_dtype(str(t.dtype)).itemsize
    at = 0
    for name, nbytes in sizes.items():
        wide = nbytes > zipfile.ZIP64_LIMIT
        start = at + 30 + len(name) + 20 * wide + 4
        padding = struct.pack("<2s", b"FB") + struct.pack("<H", -start % _ALIGNED) + b"Z" * (-start % _ALIGNED)
        yield name, padding, nbytes, wide
        at = start + len(padding) - 4 + nbytes


def _pickle(tree: Any) -> tuple[bytes, list[Written]]:
    """The pickle of a tree, as `torch.load(weights_only=True)` accepts it, and the tensors in it."""
    out, tensors = bytearray(pickle.PROTO + b"\2"), []

    def text(value: str) -> None:
        data = value.encode()
        out.extend(pickle.BINUNICODE + struct.pack("<L", len(data)) + data)

    def whole(value: int) -> None:
        small = -(2**31) <= value < 2**31
        data = struct.pack("<l", value) if small else pickle.encode_long(value)
        out.extend(pickle.BININT + data if small else pickle.LONG1 + bytes([len(data)]) + data)

    def numbers(values: Sequence[int]) -> None:
        out.extend(pickle.MARK)
        for value in values:
            whole(value)
        out.extend(pickle.TUPLE)

    def tensor(value: Written) -> None:
        strides, step = [], 1
        for n in reversed(value.shape):
            strides.insert(0, step)
            step *= max(n, 1)
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + pickle.MARK)
        text("storage")
        out.extend(b"ctorch\n" + _STORAGE_NAMES[str(value.dtype)].encode() + b"\n")
        text(str(len(tensors)))
        text("cpu")
        whole(int(np.prod(value.shape, dtype=np.int64)))
        out.extend(pickle.TUPLE + pickle.BINPERSID)
        whole(0)
        numbers(value.shape)
        numbers(strides)
        out.extend(pickle.NEWFALSE + b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE)
        out.extend(pickle.TUPLE + pickle.REDUCE)
        tensors.append(value)

    def put(value: Any) -> None:
        match value:
            case Source() | Stacked() | np.ndarray():
                tensor(value)
            case dict():
                out.extend(pickle.EMPTY_DICT + pickle.MARK)
                for key, item in value.items():
                    text(key)
                    put(item)
                out.extend(pickle.SETITEMS)
            case list():
                out.extend(pickle.EMPTY_LIST + pickle.MARK)
                for item in value:
                    put(item)
                out.extend(pickle.APPENDS)
            case None:
                out.extend(pickle.NONE)
            case bool():
                out.extend(pickle.NEWTRUE if value else pickle.NEWFALSE)
            case int():
                whole(value)
            case float():
                out.extend(pickle.BINFLOAT + struct.pack(">d", value))
            case str():
                text(value)
            case _:
                raise TypeError(f"found {type(value).__name__}, wanted plain data and tensors")

    put(tree)
    return bytes(out + pickle.STOP), tensors
