"""Zarr arrays (version 2): `.zarray`, which is JSON, and chunks, in a folder an array or in TensorStore's OCDBT files.

Orbax writes OCDBT, and reads either. `write` makes folders, whose chunks are the numbers as they are, so that only
reading OCDBT takes a library.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ...files import parse_json, read_bytes
from ..tensors import Entry, Source, map_bytes, numpy_dtype

_DTYPES = {"<f2": "float16", "bfloat16": "bfloat16", "<f4": "float32", "<f8": "float64"}
_HEADER_BYTES = 1 << 16
# Weights compress little: arrays that claim this many times the bytes of their files are made to fill the memory.
_RATIO = 256


class Store:
    """The arrays beside `main`, which errors name, by their names. `files` are those that hold them."""

    def __init__(self, main: Path) -> None:
        self.main = main
        self.files, self._records = _ocdbt(main) if (main.parent / "manifest.ocdbt").is_file() else _folders(main)
        if any(path.endswith("/zarr.json") for path in self._records):
            raise ValueError(
                f"{main}: its arrays are of Zarr version 3, wanted version 2 (use_zarr3=False, the default)"
            )
        self.names = {path.removesuffix("/.zarray") for path in self._records if path.endswith("/.zarray")}

    def read(self, names: Iterable[str]) -> dict[str, Entry]:
        """Those arrays, by name; headers only."""
        counts = Counter(path.rpartition("/")[0] for path in self._records)
        entries: dict[str, Entry] = {}
        for name in names:
            array = _array(self.main, name, self._records, counts[name] - 1)
            entries[name] = Entry(array.shape, array.dtype, self.main, array.read, array.map)
        claimed = sum(entry.nbytes for entry in entries.values())
        there = sum(file.stat().st_size for file in self.files)
        if claimed > _RATIO * there + (1 << 20):
            raise ValueError(f"{self.main}: its arrays claim {claimed} bytes, its files hold {there}")
        return entries


def write(folder: Path, tensor: Source) -> Path:
    """Write one array, in one chunk, to `folder`; returns the chunk's file."""
    folder.mkdir()
    chunk = folder / _chunk_name(tensor)
    with open(chunk, "wb") as file:
        for piece in tensor.pieces():
            file.write(piece)
    (folder / ".zarray").write_text(_header(tensor))
    return chunk


def sizes(tensor: Source) -> list[tuple[str, int]]:
    """The names of the files that `write` makes in the folder of an array, and their bytes."""
    return [(_chunk_name(tensor), tensor.nbytes), (".zarray", len(_header(tensor)))]


def _chunk_name(t: Source) -> str:
    return ".".join("0" * len(t.shape))


def _header(t: Source) -> str:
    dtype = next(stored for stored, name in _DTYPES.items() if name == t.dtype)
    shape = list(t.shape)
    return json.dumps({
        "chunks": shape, "compressor": None, "dimension_separator": ".", "dtype": dtype, "fill_value": None,
        "filters": None, "order": "C", "shape": shape, "zarr_format": 2,
    })  # fmt: skip


class _Record:
    """A file, or a value in OCDBT's files."""

    def __init__(self, name: str, size: int | None, file: Path | None, load: Callable[[], bytes]) -> None:
        self.name, self.size, self.file, self.load = name, size, file, load


def _folders(main: Path) -> tuple[list[Path], dict[str, _Record]]:
    folders = [path for path in main.parent.glob("[!.]*") if path.is_dir()]  # a save into it is in `.saving`
    files = sorted(path for folder in folders for path in folder.iterdir())
    files = [path for path in files if path.is_file()]
    names = {f"{path.parent.name}/{path.name}": path for path in files}
    return files, {n: _Record(n, p.stat().st_size, p, lambda p=p: read_bytes(p)) for n, p in names.items()}


def _ocdbt(main: Path) -> tuple[list[Path], dict[str, _Record]]:
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(f"{main}: reading it requires tensorstore: pip install 'opt-zoo[orbax]'") from error
    folder = main.parent.absolute()

    def tried(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ValueError, OSError) as error:  # many lines, which point into TensorStore's own source
            raise ValueError(f"{main}: not readable as OCDBT: {' '.join(str(error).split())[:400]}") from error

    def load(key: bytes) -> bytes:
        found = tried(lambda: store.read(key).result())
        if found.state != "value":
            raise ValueError(f"{main}: record {key.decode(errors='replace')!r} is missing")
        return found.value

    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    store = tried(lambda: tensorstore.KvStore.open(spec).result())
    keys = tried(lambda: store.list().result())
    records = {}
    for key in keys:
        name = key.decode(errors="replace")
        records[name] = _Record(name, None, None, lambda key=key: load(key))
    return [path for path in sorted(folder.rglob("*")) if path.is_file()], records


@dataclass(frozen=True)
class _Array:
    """One Zarr array, in chunks of the shape `chunk`; those at the edges are padded to it."""

    main: Path
    stored: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    compressed: bool
    records: dict[str, _Record]

    def places(self) -> Iterator[tuple[int, ...]]:
        return product(*(range(-(-size // step)) for size, step in zip(self.shape, self.chunk, strict=True)))

    def record(self, place: tuple[int, ...]) -> _Record | None:
        return self.records.get(f"{self.stored}/{'.'.join(map(str, place)) or '0'}")

    def read(self) -> np.ndarray:
        out = np.empty(self.shape, numpy_dtype(self.dtype))
        if self.chunk == self.shape:
            self._load((0,) * len(self.shape), out)
            return out
        piece = np.empty(self.chunk, out.dtype)
        for place in self.places():
            self._load(place, piece)
            spans = tuple(
                slice(i * n, min((i + 1) * n, end)) for i, n, end in zip(place, self.chunk, self.shape, strict=True)
            )
            out[spans] = piece[tuple(slice(0, span.stop - span.start) for span in spans)]
        return out

    def map(self) -> np.ndarray:
        record = self.record((0,) * len(self.shape))
        if self.compressed or self.chunk != self.shape or not record or not record.file:
            return self.read()
        size = math.prod(self.shape) * numpy_dtype(self.dtype).itemsize
        return map_bytes(record.file, 0, size).view(numpy_dtype(self.dtype)).reshape(self.shape)

    def _load(self, place: tuple[int, ...], out: np.ndarray) -> None:
        """Read a chunk into an array of its shape."""
        record = self.record(place)
        assert record is not None  # `_array` has looked
        data, into = record.load(), out.reshape(-1).view(np.uint8)
        if self.compressed:
            count, more = self._decompressed(record, data, into)
        else:
            count, more = len(data), False
            if count == len(into):
                into[:] = np.frombuffer(data, np.uint8)
        if count != len(into) or more:
            found = f"more than {count}" if more else count
            raise ValueError(f"{self.main}: {record.name}: found {found} bytes, wanted {len(into)}")

    def _decompressed(self, record: _Record, data: bytes, into: np.ndarray) -> tuple[int, bool]:
        """Decompress into `into`, and no further; returns the bytes decompressed, and whether more would follow."""
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f"{self.main}: reading it requires zstandard: pip install 'opt-zoo[orbax]'") from error
        try:
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                count = 0
                while count < len(into) and (n := reader.readinto(into[count:].data)):
                    count += n
                return count, bool(reader.read(1))
        except zstandard.ZstdError as error:
            raise ValueError(f"{self.main}: {record.name}: not readable as zstd: {error}") from error


def _array(main: Path, stored: str, records: dict[str, _Record], chunks: int) -> _Array:
    """An array by its `.zarray`, checked against its `chunks` records."""
    header = records[f"{stored}/.zarray"]
    where = f"{main}: {header.name}"
    if header.size is not None and header.size > _HEADER_BYTES:
        raise ValueError(f"{where}: found {header.size} bytes, wanted at most {_HEADER_BYTES}")
    said = parse_json(header.load(), where)

    def field(name: str, right: Callable[[Any], bool], wanted: str) -> Any:
        value = said.get(name)
        if not right(value):
            raise ValueError(f"{where}: {name}: found {value!r:.80}, wanted {wanted}")
        return value

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and len(value) < 9 and all(type(n) is int and 0 < n < 2**48 for n in value)

    field("zarr_format", lambda v: v == 2, "2")
    shape = tuple(field("shape", sizes, "positive numbers"))
    chunk = field("chunks", lambda v: sizes(v) and len(v) == len(shape), f"{len(shape)} positive numbers")
    field("chunks", lambda v: all(n <= m for n, m in zip(v, shape, strict=True)), f"no more than {list(shape)}")
    dtype = field("dtype", lambda v: isinstance(v, str) and v in _DTYPES, f"one of {', '.join(_DTYPES)}")
    field("order", lambda v: v == "C", "C")
    field("filters", lambda v: v is None, "null")
    field("dimension_separator", lambda v: v in (None, "."), '"."')
    packed = field("compressor", lambda v: v is None or (isinstance(v, dict) and v.get("id") == "zstd"), "null or zstd")
    array = _Array(main, stored, shape, _DTYPES[dtype], tuple(chunk), packed is not None, records)
    wanted = math.prod(-(-size // step) for size, step in zip(shape, chunk, strict=True))
    # Zarr reads a missing chunk as zeros
    absent = wanted > chunks or any(array.record(place) is None for place in array.places())
    if absent:
        raise ValueError(f"{main}: {stored}: wanted {wanted} chunks, some are missing")
    first = array.record((0,) * len(shape))
    nbytes = math.prod(chunk) * numpy_dtype(array.dtype).itemsize
    if not array.compressed and first and first.size not in (None, nbytes):
        raise ValueError(f"{main}: {first.name}: found {first.size} bytes, wanted {nbytes}")
    return array
