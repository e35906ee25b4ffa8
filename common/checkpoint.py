"""Checkpoints as mappings from tensor names to what lies on disk, read one tensor at a time, and written whole.

A folder holds `model.safetensors`, or shards with `model.safetensors.index.json`, or the same of
`pytorch_model.bin`. Arrays are numpy's, in the checkpoint's own dtype (bfloat16 through ml_dtypes), so that every
framework reads through the same door.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .files import read_json

SAFETENSORS, TORCH_BIN = "model.safetensors", "pytorch_model.bin"
FILES = [SAFETENSORS, f"{SAFETENSORS}.index.json", TORCH_BIN, f"{TORCH_BIN}.index.json"]
MAX_SHARD_SIZE = "5GB"

# The names the safetensors format gives to dtypes.
_CODES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_NAMES = {name: code for code, name in _CODES.items()}


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype called `name`, bfloat16 included."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


@dataclass(frozen=True)
class Entry:
    """One stored tensor: its shape, the name of its dtype, its file, and how to read it: `read` makes a fresh array,
    `map` one of the file's own pages, for those who copy it elsewhere at once and let it go."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]
    map: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


class Checkpoint(Mapping[str, Entry]):
    """The tensors of a checkpoint folder by name. Opening reads headers only.

    `layout` is "safetensors" or "torch", `files` the weight files, `path` the folder.
    Raises FileNotFoundError if the folder holds no weights, ValueError that names the file for one that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        finish_interrupted_save(self.path)
        present = [name for name in FILES if (self.path / name).is_file()]
        if not present:
            there = ", ".join(sorted(p.name for p in self.path.iterdir())) if self.path.is_dir() else "no such folder"
            wanted = ", ".join(FILES)
            raise FileNotFoundError(f"{self.path}: no weights; wanted one of {wanted}; found: {there or 'nothing'}")
        main = present[0]
        self.layout = "safetensors" if main.startswith(SAFETENSORS) else "torch"
        read = _safetensors_entries if self.layout == "safetensors" else _torch_entries
        if main.endswith(".index.json"):
            self.files, self._entries = _sharded(self.path / main, read)
        else:
            self.files = [self.path / main]
            self._entries = read(self.files[0])

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bits."""
        a, b = self[first], self[second]
        return (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().tobytes() == b.read().tobytes()

    @property
    def dtype(self) -> str:
        """The dtype of most of its bytes."""
        sizes: dict[str, int] = {}
        for entry in self.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=lambda name: sizes[name])


def _sharded(index: Path, read: Callable[[Path], dict[str, Entry]]) -> tuple[list[Path], dict[str, Entry]]:
    """The shards that an index names, and their tensors. Each tensor must lie where the index says, once."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map: wanted an object of tensor names and file names")
    names = sorted(set(weight_map.values()))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise ValueError(f"{index}: weight_map names files outside the folder: {', '.join(map(repr, outside))}")
    files = [index.with_name(name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: names shards that are not there: {', '.join(missing)}")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read(file).items():
            if weight_map.get(name) != file.name:
                said = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise ValueError(f"{file}: holds {name}, which {index.name} puts {said}")
            entries[name] = entry
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise ValueError(f"{index}: names tensors that its shards do not hold: {', '.join(absent)}")
    return files, entries


def _safetensors_entries(path: Path) -> dict[str, Entry]:
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

        return Entry(shape, dtype, path, lambda: array(_read_bytes), lambda: array(_map_bytes))

    return {name: entry(tensor) for name, tensor in header.items()}


def _read_bytes(path: Path, start: int, size: int) -> np.ndarray:
    # a plain read, not a memory map: the pages of a map count as this process's memory for as long as it is open
    data = np.fromfile(path, np.uint8, size, offset=start)
    if data.nbytes != size:
        raise ValueError(f"{path}: ends at {start + data.nbytes} bytes, wanted {start + size}")
    return data


def _map_bytes(path: Path, start: int, size: int) -> np.ndarray:
    there = path.stat().st_size
    if size == 0 or start % 8 or there < start + size:  # a map cannot be empty, and is as aligned as its file
        return _read_bytes(path, start, size)
    return np.memmap(path, np.uint8, mode="c", offset=start, shape=(size,))  # "c": what is written stays in memory


def _torch_entries(path: Path) -> dict[str, Entry]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: reading a .bin takes PyTorch: pip install 'opt-zoo[pt]'") from error
    try:
        # weights_only: a .bin is a pickle, and only tensors may come out of it. Old ones are not zip files: no map.
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not readable as PyTorch weights: {first}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: found something other than names and tensors, wanted a state_dict")

    def entry(tensor: torch.Tensor) -> Entry:
        dtype = str(tensor.dtype).removeprefix("torch.")

        def array(whole: torch.Tensor) -> np.ndarray:
            if dtype == "bfloat16":
                return whole.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return whole.numpy()

        def read() -> np.ndarray:
            return array(tensor.detach().clone(memory_format=torch.contiguous_format))

        return Entry(tuple(tensor.shape), dtype, path, read, lambda: array(tensor.detach().contiguous()))

    return {name: entry(tensor) for name, tensor in tensors.items()}


def parse_size(size: int | str) -> int:
    """A number of bytes: 1000, "5GB", "200MB" (decimal), "5GiB" (binary). ValueError for anything else."""
    if isinstance(size, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
        if found:
            number, unit, binary = found.groups()
            size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f"max_shard_size: found {size!r}, wanted bytes > 0 such as 1000000, '200MB' or '5GB'")
    return size


@dataclass(frozen=True)
class Source:
    """A tensor to be written: what is known before it is read, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


def save_checkpoint(
    folder: str | Path,
    tensors: Iterable[Source],
    texts: Mapping[str, str],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[Path]:
    """Write `tensors` as safetensors and `texts` (file name -> contents: config.json ...) into `folder`.

    Tensors are read and written one at a time, in order, in shards of at most `max_shard_size` bytes (a tensor larger
    than that gets a shard of its own). `progress` is told the bytes of each. Everything is written to a folder beside,
    which one rename commits: killed at any moment, `folder` holds the old checkpoint or the new one. Weight files of
    the old checkpoint that the new one does not have are removed. Returns the weight files.
    """
    limit, folder = parse_size(max_shard_size), Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file, wanted a folder to save into")
    finish_interrupted_save(folder)
    shards: list[list[Source]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)

    n = len(shards)
    names = [SAFETENSORS] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    staged = folder / ".saving" if folder.exists() else folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staged, ignore_errors=True)  # what a killed save left
    staged.mkdir(parents=True)
    try:
        for name, text in texts.items():
            (staged / name).write_text(text, encoding="utf-8")
        for name, shard in zip(names, shards, strict=True):
            _write_safetensors(staged / name, shard, progress)
        if n > 1:
            total = sum(t.nbytes for shard in shards for t in shard)
            weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (staged / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            (staged / _FILES_LIST).write_text(json.dumps(sorted(p.name for p in staged.iterdir())))
        for path in staged.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.rename(staged, folder / ".saved" if folder.exists() else folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    finish_interrupted_save(folder)
    return [folder / name for name in names]


_FILES_LIST = ".files.json"
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


def finish_interrupted_save(folder: Path) -> None:
    """Move a committed save into place: the second half of `save_checkpoint`, which a kill may have cut short.

    Several files cannot be renamed at once. So a save is complete when `.saved` exists, and whoever opens the folder
    next ends the moving.
    """
    saved = folder / ".saved"
    if not saved.is_dir():
        return
    listing = saved / _FILES_LIST
    if listing.exists():  # missing only when everything was moved and the empty folder is all that is left
        new = set(json.loads(listing.read_text()))
        for name in sorted(new):
            if (saved / name).exists():
                os.replace(saved / name, folder / name)
        for path in folder.iterdir():
            weights = path.name in FILES or _SHARD.fullmatch(path.name)
            if weights and path.name not in new:
                path.unlink()
        listing.unlink()
    saved.rmdir()


def _write_safetensors(path: Path, tensors: list[Source], progress: Callable[[int], None]) -> None:
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
            progress(t.nbytes)
