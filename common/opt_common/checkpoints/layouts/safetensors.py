"""The Hub's safetensors: `model.safetensors`, or shards with `model.safetensors.index.json`.

transformers writes the same files from PyTorch, TensorFlow and Flax, each with its own names and its own order of a
matrix; the last two are `safetensors_tf.py` and `safetensors_flax.py`. The names say which it is.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ...config import OPTConfig
from ...files import parse_json, read_json
from ..shards import plan_sharded, read_sharded, write_sharded
from ..tensors import Entry, Source, map_bytes, numpy_dtype, read_bytes, renamed, turned

MAIN = ("model.safetensors", "model.safetensors.index.json")
SHARD = r"model-\d+-of-\d+\.safetensors"

# The names the safetensors format gives to dtypes.
_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_NAMES = {name: code for code, name in _CODES.items()}
_MAX_HEADER = 10_000_000  # opt-175b's, in one file, is 200 kB; more would be Python objects of ten times the size

# From a tensor's name in a file to the Hub's, and whether it is stored [in, out]; None if there is no such tensor.
FromName = Callable[[str], tuple[str, bool] | None]


def holds(main: Path) -> bool:
    """Whether this file is PyTorch's rather than TensorFlow's or Flax's, which have the same name."""
    return style(main) == "pt"


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    return read_styled(main, lambda name: (name, False))


def write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Callable[[int], None]
) -> list[str]:
    return write_styled(folder, tensors, limit, advance, "pt")


def plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    return plan_styled(tensors, limit, "pt")


def style(main: Path) -> str:
    """Whose names a file, or an index, has: "pt", "tf" or "flax"."""
    if main.name.endswith(".index.json"):
        weight_map = read_json(main).get("weight_map")
        return _style(weight_map, None, main) if isinstance(weight_map, dict) else "pt"
    header, _ = _header(main)
    return _style(header, (header.pop("__metadata__", None) or {}).get("format"), main)


def _style(names: Iterable[str], said: str | None, path: Path) -> str:
    # biases are called the same by PyTorch and Flax, and may have a shard of their own
    ends = {name.rpartition(".")[2] for name in names}
    found = None
    if any("/" in name for name in names):
        found = "tf"
    elif ends & {"kernel", "scale", "embedding"}:
        found = "flax"
    elif "weight" in ends:
        found = "pt"
    said = said if said in ("pt", "tf", "flax") else None
    if found and said and found != said:
        raise ValueError(f"{path}: metadata says format {said!r}, but the names of its tensors are those of {found!r}")
    return found or said or "pt"


def read_styled(main: Path, from_name: FromName) -> tuple[list[Path], dict[str, Entry]]:
    """As `read`, of a file with other names."""
    if main.name.endswith(".index.json"):
        names = functools.partial(_entries, from_name=from_name)
        return read_sharded(main, names, lambda name: (from_name(name) or (name,))[0])
    return [main], _entries(main, from_name)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, checked, and where its data begin."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes, wanted at most {_MAX_HEADER}")
            text = file.read(length)
        with safe_open(path, "np"):  # the library checks the header: lengths, offsets, overlaps
            pass
    except (SafetensorError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    return parse_json(text, path), 8 + length


def _entries(path: Path, from_name: FromName) -> dict[str, Entry]:
    header, begin = _header(path)
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for stored, tensor in header.items():
        name, transposed = from_name(stored) or (stored, False)
        if name in entries:
            raise ValueError(f"{path}: holds {name} twice, once as {stored}")
        entry = _entry(path, stored, tensor, begin)
        entries[name] = turned(entry) if transposed else entry
    return entries


def _entry(path: Path, name: str, tensor: dict[str, Any], begin: int) -> Entry:
    shape, dtype, start = tuple(tensor["shape"]), _CODES.get(tensor["dtype"]), begin + tensor["data_offsets"][0]
    if dtype is None:
        raise ValueError(f"{path}: {name}: found dtype {tensor['dtype']}, wanted one of {', '.join(_CODES)}")
    size = math.prod(shape) * numpy_dtype(dtype).itemsize

    def array(get: Callable[[Path, int, int], np.ndarray]) -> np.ndarray:
        return get(path, start, size).view(numpy_dtype(dtype)).reshape(shape)

    return Entry(shape, dtype, path, lambda: array(read_bytes), lambda: array(map_bytes))


def write_styled(
    folder: Path,
    tensors: Sequence[Source],
    limit: int,
    advance: Callable[[int], None],
    style: str,
    to_name: Callable[[str], tuple[str, bool]] = lambda name: (name, False),
    in_index: Callable[[str], str] = lambda name: name,
) -> list[str]:
    """As `write`, with the names of `style`. `in_index` is what the index calls a tensor of that name."""

    def one(path: Path, shard: list[Source]) -> None:
        with open(path, "wb") as file:
            file.write(_head(shard, style))
            for tensor in shard:
                for piece in tensor.pieces():
                    file.write(piece)
                piece = None  # before the next tensor is read
                advance(tensor.nbytes)

    return write_sharded(folder, MAIN[0], [renamed(t, *to_name(t.name)) for t in tensors], limit, one, in_index)


def plan_styled(
    tensors: Sequence[Source],
    limit: int,
    style: str,
    to_name: Callable[[str], tuple[str, bool]] = lambda name: (name, False),
    in_index: Callable[[str], str] = lambda name: name,
) -> list[tuple[str, int]]:
    """The files that `write_styled` would write, and their bytes."""

    def size(shard: list[Source]) -> int:
        return len(_head(shard, style)) + sum(tensor.nbytes for tensor in shard)

    return plan_sharded(MAIN[0], [renamed(t, *to_name(t.name)) for t in tensors], limit, size, in_index)


def _head(tensors: list[Source], style: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": style}}
    start = 0
    for t in tensors:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + t.nbytes]}
        start += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to eight bytes
    return struct.pack("<Q", len(text)) + text
