"""safetensors files: a JSON header, and the numbers of each tensor at its offset."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ...files import naming, parse_json
from ..tensors import Entry, Source, map_bytes, numpy_dtype, read_bytes, read_part

# The names the safetensors format gives to dtypes.
_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_NAMES = {name: code for code, name in _CODES.items()}
_MAX_HEADER = 10_000_000  # opt-175b's, in one file, is 200 kB; more would be Python objects of ten times the size


def read(path: Path) -> dict[str, Entry]:
    """The tensors of a file by the names it gives them; headers only."""
    header, begin = _header(path)
    header.pop("__metadata__", None)
    return {name: _entry(path, name, tensor, begin) for name, tensor in header.items()}


def describe(path: Path) -> tuple[list[str], str | None]:
    """The names of a file's tensors, and the format that its metadata gives: "pt", "tf", "flax" ..., or None."""
    header, _ = _header(path)
    said = (header.pop("__metadata__", None) or {}).get("format")
    return list(header), said


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, checked, and where its data begin."""
    try:
        with naming(path), open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes, wanted at most {_MAX_HEADER}")
            text = file.read(length)
        with safe_open(path, "np"):  # the library checks the header: lengths, offsets, overlaps
            pass
    except (SafetensorError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    return parse_json(text, path), 8 + length


def _entry(path: Path, name: str, tensor: dict[str, Any], begin: int) -> Entry:
    shape, dtype, start = tuple(tensor["shape"]), _CODES.get(tensor["dtype"]), begin + tensor["data_offsets"][0]
    if dtype is None:
        raise ValueError(f"{path}: {name}: found dtype {tensor['dtype']}, wanted one of {', '.join(_CODES)}")
    size = math.prod(shape) * numpy_dtype(dtype).itemsize

    def array(get: Callable[[Path, int, int], np.ndarray]) -> np.ndarray:
        return get(path, start, size).view(numpy_dtype(dtype)).reshape(shape)

    cut = partial(read_part, path, start, shape, dtype)
    return Entry(shape, dtype, path, lambda: array(read_bytes), lambda: array(map_bytes), cut)


def write(path: Path, tensors: Sequence[Source], advance: Callable[[int], None], style: str) -> None:
    """Write one file, whose metadata gives `style` as its format."""
    with open(path, "wb") as file:
        file.write(_head(tensors, style))
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece)
            piece = None  # before the next tensor is read
            advance(tensor.nbytes)


def size(tensors: Sequence[Source], style: str) -> int:
    """The bytes of the file that `write` makes."""
    return len(_head(tensors, style)) + sum(tensor.nbytes for tensor in tensors)


def _head(tensors: Sequence[Source], style: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": style}}
    start = 0
    for t in tensors:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + t.nbytes]}
        start += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to eight bytes
    return struct.pack("<Q", len(text)) + text
