"""Orbax checkpoints of opt_flax: `StandardCheckpointer().save(folder, nnx.state(model))`.

An array is a Zarr one (version 2): `.zarray`, which is JSON, and its chunks. They lie in a folder each, or all together
in TensorStore's OCDBT files, which is what Orbax writes; Orbax reads either. Written are folders, whose bytes are the
numbers as they are, so that OCDBT's files alone take a library. Whatever else a training state holds is passed over.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ...config import OPTConfig
from ...files import abridged, parse_json
from ..tensors import Entry, Source, map_bytes, numpy_dtype

MAIN = ("_METADATA",)
SHARD = r"(?!)"
BESIDE = ("manifest.ocdbt", "d/*", "ocdbt.process_*/*", "*/.zarray", "*/[0-9]*")

_DTYPES = {"<f2": "float16", "bfloat16": "bfloat16", "<f4": "float32", "<f8": "float64"}
_LEAVES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}
_EMBEDDING = re.compile(r"((?:.+\.)??)(?:model\.)?decoder\.embed_tokens\.embedding(?:\.value)?")
_MODULES = ("model", "decoder", "lm_head", "score", "qa_outputs")
_HEADER_BYTES = 1 << 16
# Weights shrink little. What says that it holds so many times its files' bytes is made to fill the memory.
_RATIO = 256


def find(path: Path) -> Path | None:
    main = path if path.is_file() else path / MAIN[0]
    return main if main.name == MAIN[0] and main.is_file() else None


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    files, records = _ocdbt(main) if (main.parent / "manifest.ocdbt").is_file() else _folders(main)
    arrays = {path.removesuffix("/.zarray") for path in records if path.endswith("/.zarray")}
    if any(path.endswith("/zarr.json") for path in records):
        raise ValueError(f"{main}: its arrays are of Zarr version 3, wanted version 2 (use_zarr3=False, the default)")
    found = sorted(
        {match[1] for name in arrays if (match := _EMBEDDING.fullmatch(name))},
        key=lambda prefix: (_depth(prefix), prefix),
    )
    if not found:
        raise ValueError(
            f"{main}: holds no array decoder.embed_tokens.embedding; found: {abridged(sorted(arrays)) or 0}"
        )
    if len(found) > 1 and _depth(found[0]) == _depth(found[1]):  # an optimizer's lie deeper than the model's own
        raise ValueError(f"{main}: holds several models: {abridged(prefix or 'at its top' for prefix in found)}")
    entries: dict[str, Entry] = {}
    counts = Counter(path.rpartition("/")[0] for path in records)
    for stored in sorted(arrays):
        name = stored.removeprefix(found[0])
        if stored.startswith(found[0]) and name.split(".")[0] in _MODULES:
            array = _array(main, stored, records, counts[stored] - 1)
            entries[_hub_name(name)] = Entry(array.shape, array.dtype, main, array.read, array.map)
    said, there = sum(entry.nbytes for entry in entries.values()), sum(file.stat().st_size for file in files)
    if said > _RATIO * there + (1 << 20):
        raise ValueError(f"{main}: its arrays say {said} bytes, its files hold {there}")
    return files, entries


def _depth(prefix: str) -> int:
    return prefix.count(".")


def _hub_name(name: str) -> str:
    path, _, leaf = name.removesuffix(".value").rpartition(".")
    path = f"model.{path}" if path.startswith("decoder.") else path
    # an unknown name is left as it is, for the check against the config to tell
    return f"{path}.{_LEAVES[leaf]}" if leaf in _LEAVES else name


class _Record:
    """Some bytes of the checkpoint: a file, or a value in OCDBT's."""

    def __init__(self, name: str, size: int | None, file: Path | None, load: Callable[[], bytes]) -> None:
        self.name, self.size, self.file, self.load = name, size, file, load


def _folders(main: Path) -> tuple[list[Path], dict[str, _Record]]:
    files = sorted(path for folder in main.parent.iterdir() if folder.is_dir() for path in folder.iterdir())
    files = [path for path in files if path.is_file()]
    names = {f"{path.parent.name}/{path.name}": path for path in files}
    return files, {n: _Record(n, p.stat().st_size, p, p.read_bytes) for n, p in names.items()}


def _ocdbt(main: Path) -> tuple[list[Path], dict[str, _Record]]:
    try:
        import tensorstore
    except ImportError as error:
        raise ImportError(f"{main}: reading it takes tensorstore: pip install 'opt-zoo[orbax]'") from error
    folder = main.parent.absolute()

    def tried(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ValueError, OSError) as error:  # of many lines, with places in TensorStore's own source
            raise ValueError(f"{main}: not readable as OCDBT: {' '.join(str(error).split())[:400]}") from error

    def load(key: bytes) -> bytes:
        found = tried(lambda: store.read(key).result())
        if found.state != "value":
            raise ValueError(f"{main}: record {key.decode(errors='replace')!r} is not there")
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
    """One Zarr array: chunks of `chunk`, of which those at the edges are as large as the others."""

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
        """The numbers of a chunk into an array of its shape."""
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
        """How many bytes came, and whether there were more; never more than wanted are made."""
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f"{self.main}: reading it takes zstandard: pip install 'opt-zoo[orbax]'") from error
        try:
            with zstandard.ZstdDecompressor().stream_reader(data) as reader:
                count = 0
                while count < len(into) and (n := reader.readinto(into[count:].data)):
                    count += n
                return count, bool(reader.read(1))
        except zstandard.ZstdError as error:
            raise ValueError(f"{self.main}: {record.name}: not readable as zstd: {error}") from error


def _array(main: Path, stored: str, records: dict[str, _Record], chunks: int) -> _Array:
    """An array by what its `.zarray` says, which is held against what is there. It has `chunks` records."""
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
    # a chunk that is not there would be read as zeros
    absent = wanted > chunks or any(array.record(place) is None for place in array.places())
    if absent:
        raise ValueError(f"{main}: {stored}: wanted {wanted} chunks, not all are there")
    first = array.record((0,) * len(shape))
    nbytes = math.prod(chunk) * numpy_dtype(array.dtype).itemsize
    if not array.compressed and first and first.size not in (None, nbytes):
        raise ValueError(f"{main}: {first.name}: found {first.size} bytes, wanted {nbytes}")
    return array


def write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Callable[[int], None]
) -> list[str]:
    """A folder an array, whatever `limit`."""
    names = []
    for t in tensors:
        place = folder / _stored(t)
        place.mkdir()
        chunk = place / _chunk(t)
        with open(chunk, "wb") as file:
            for piece in t.pieces():
                file.write(piece)
        (place / ".zarray").write_text(_header(t))
        names.append(f"{place.name}/{chunk.name}")
        advance(t.nbytes)
    for name, text in _texts(tensors).items():
        (folder / name).write_text(text)
    return names


def plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    files = [(name, len(text)) for name, text in _texts(tensors).items()]
    for t in tensors:
        files += [(f"{_stored(t)}/{_chunk(t)}", t.nbytes), (f"{_stored(t)}/.zarray", len(_header(t)))]
    return files


def _stored(t: Source) -> str:
    """The name of an array: the path in nnx.state(model), and of a variable its value."""
    path, _, leaf = t.name.rpartition(".")
    norm = path.endswith("layer_norm")
    embedding = path.endswith(("embed_tokens", "embed_positions"))
    return f"{path}.{'bias' if leaf == 'bias' else 'scale' if norm else 'embedding' if embedding else 'kernel'}.value"


def _chunk(t: Source) -> str:
    return ".".join("0" * len(t.shape))


def _header(t: Source) -> str:
    dtype = next(stored for stored, name in _DTYPES.items() if name == t.dtype)
    shape = list(t.shape)
    return json.dumps({
        "chunks": shape, "compressor": None, "dimension_separator": ".", "dtype": dtype, "fill_value": None,
        "filters": None, "order": "C", "shape": shape, "zarr_format": 2,
    })  # fmt: skip


def _texts(tensors: Sequence[Source]) -> dict[str, str]:
    """What Orbax asks for beside the arrays: the tree that they are the leaves of, and what wrote it."""
    tree = {}
    for t in tensors:
        keys = tuple(_stored(t).split("."))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(t.shape)},
        }
    handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    return {
        "_METADATA": json.dumps({"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False}),
        "_CHECKPOINT_METADATA": json.dumps({"item_handlers": handler, "metrics": {}, "custom_metadata": {}}),
    }
