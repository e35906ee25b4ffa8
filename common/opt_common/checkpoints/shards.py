"""Checkpoints in several files: which tensor goes into which, and the index that lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..files import abridged, read_json
from .tensors import Entry, Source

MAX_SHARD_SIZE = "5GB"


def split(tensors: Sequence[Source], limit: int) -> list[list[Source]]:
    """The tensors, in order, in shards of at most `limit` bytes; a larger tensor gets a shard of its own."""
    shards: list[list[Source]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def name_shards(main: str, tensors: Sequence[Source], limit: int) -> dict[str, list[Source]]:
    """The files that hold the tensors: `main`, or shards named after it."""
    shards, (stem, _, suffix) = split(tensors, limit), main.partition(".")
    n = len(shards)
    names = [main] if n == 1 else [f"{stem}-{i:05}-of-{n:05}.{suffix}" for i in range(1, n + 1)]
    return dict(zip(names, shards, strict=True))


def write_sharded(
    folder: Path,
    main: str,
    tensors: Sequence[Source],
    limit: int,
    write: Callable[[Path, list[Source]], None],
    in_index: Callable[[str], str] = lambda name: name,
) -> list[str]:
    """Write the tensors to the file `main`, or to shards named after it and an index. Returns the names of the files
    with weights. `in_index` gives a tensor's name in the index."""
    shards = name_shards(main, tensors, limit)
    for name, shard in shards.items():
        write(folder / name, shard)
    if len(shards) > 1:
        (folder / f"{main}.index.json").write_bytes(_index(shards, in_index))
    return list(shards)


def plan_sharded(
    main: str,
    tensors: Sequence[Source],
    limit: int,
    size: Callable[[list[Source]], int],
    in_index: Callable[[str], str] = lambda name: name,
) -> list[tuple[str, int]]:
    """The files that `write_sharded` would make, and their sizes; `size` gives that of one."""
    shards = name_shards(main, tensors, limit)
    files = [(name, size(shard)) for name, shard in shards.items()]
    return files + ([(f"{main}.index.json", len(_index(shards, in_index)))] if len(shards) > 1 else [])


def _index(shards: dict[str, list[Source]], in_index: Callable[[str], str]) -> bytes:
    weight_map = {in_index(tensor.name): name for name, shard in shards.items() for tensor in shard}
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def parse_size(size: int | str) -> int:
    """A number of bytes: 1000, "5GB", "200MB" (decimal), "5GiB" (binary). ValueError for anything else."""
    if isinstance(size, str):
        found = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
        if found:
            number, unit, binary = found.groups()
            size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f"max_shard_size: found {size!r}, wanted bytes > 0 such as 1000000, '200MB' or '5GB'")
    return size


def read_sharded(
    index: Path, read: Callable[[Path], dict[str, Entry]], hub_name: Callable[[str], str] = lambda name: name
) -> tuple[list[Path], dict[str, Entry]]:
    """The shards that an index names, and their tensors. Each tensor must be in the shard that the index gives, once.

    `hub_name` turns a name in the index into the Hub's, which `read` returns."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index}: weight_map: wanted an object of tensor names and file names")
    named, weight_map = weight_map, {}
    for name, file in named.items():
        if hub_name(name) in weight_map:
            raise ValueError(f"{index}: weight_map names {hub_name(name)} twice, once as {name}")
        weight_map[hub_name(name)] = file
    files = shard_files(index, weight_map.values())
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in read(file).items():
            if weight_map.get(name) != file.name:
                said = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise ValueError(f"{file}: holds {name}, which {index.name} puts {said}")
            entries[name] = entry
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise ValueError(f"{index}: names tensors that its shards do not hold: {abridged(absent)}")
    return files, entries


def shard_files(index: Path, names: Iterable[str]) -> list[Path]:
    """The shards that an index names, beside it. ValueError if a name leads out of the folder, FileNotFoundError if a
    shard is missing."""
    names = sorted(set(names))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise ValueError(f"{index}: weight_map names files outside the folder: {abridged(map(repr, outside))}")
    files = [index.with_name(name) for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index}: names missing shards: {abridged(missing)}")
    return files
