"""The Hub's safetensors: `model.safetensors`, or shards with `model.safetensors.index.json`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import OPTConfig
from ..tensors import Entry, Source, map_bytes, numpy_dtype, read_bytes, read_sharded, split

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


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    return read_sharded(main, _entries) if main.name.endswith(".index.json") else ([main], _entries(main))


def _entries(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, "np"):  # the library checks the header: lengths, offsets, overlaps
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)

    def entry(tensor: dict[str, Any]) -> Entry:
        shape, dtype = tuple(tensor["shape"]), _CODES.get(tensor["dtype"])
        start = 8 + length + tensor["data_offsets"][0]
        if dtype is None:  # formats newer than this reader: named in the table check, never read
            return Entry(shape, tensor["dtype"], path, lambda: np.empty(0), lambda: np.empty(0))
        size = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize

        def array(get: Callable[[Path, int, int], np.ndarray]) -> np.ndarray:
            return get(path, start, size).view(numpy_dtype(dtype)).reshape(shape)

        return Entry(shape, dtype, path, lambda: array(read_bytes), lambda: array(map_bytes))

    return {name: entry(tensor) for name, tensor in header.items()}


def write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Callable[[int], None]
) -> list[str]:
    shards = split(tensors, limit)
    n = len(shards)
    names = [MAIN[0]] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write(folder / name, shard, advance)
    if n > 1:
        total = sum(t.nbytes for shard in shards for t in shard)
        weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / MAIN[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _write(path: Path, tensors: list[Source], advance: Callable[[int], None]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for t in tensors:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, start + t.nbytes]}
        start += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to eight bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            array = np.ascontiguousarray(t.read())  # a transposed view would go out in the wrong order
            if (array.shape, array.dtype) != (t.shape, numpy_dtype(t.dtype)):
                raise ValueError(f"{t.name}: found {array.dtype}{list(array.shape)}, wanted {t.dtype}{list(t.shape)}")
            file.write(array.reshape(-1).view(np.uint8).data)
            advance(t.nbytes)
