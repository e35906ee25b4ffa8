"""What a layout is: how the files of a checkpoint are named, recognized, read and written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...config import OPTConfig
from ..shards import plan_sharded, read_sharded, write_sharded
from ..tensors import Entry, Source
from .names import Names

Progress = Callable[[int], None]
Read = Callable[[Path], tuple[list[Path], dict[str, Entry]]]
Write = Callable[[Path, Sequence[Source], OPTConfig | None, int, Progress], list[str]]
Plan = Callable[[Sequence[Source], OPTConfig | None, int], list[tuple[str, int]]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to store a checkpoint. Tensors go in and come out by their Hub names, matrices [out, in].

    main: the files that a folder of this layout is opened by, the preferred first.
    read: from such a file to the weight files and the tensors, from the headers alone. Raises ValueError, naming the
        file, if one is damaged or would take more memory than its size warrants.
    write: from an empty folder, the tensors, the config, the bytes of a shard, and a function to tell the bytes done,
        to the names of the weight files; None if this layout is only read.
    plan: from tensors, config and the bytes of a shard to the files that `write` would make and their sizes; None if
        that cannot be known without reading tensors.
    shards: a pattern of the names of shards, in the Hub's own layouts: files that a save over them removes.
    find: from a folder or file to the file to open it by, or None; for layouts without fixed names.
    holds: whether a file called as in `main` is of this layout; several share names.
    config: from such a file and its tensors to the OPTConfig it holds; None where config.json does.
    companions: from such a file to the tokenizer's files by their Hub names, for layouts that keep their own: `assets`.
    beside: patterns of more files to fetch from the Hub, which neither `main` nor an index names.
    lost: what of a model this layout has no place for, as a sentence.
    check: raises ValueError for the config of a model that this layout cannot hold.
    check_files: raises ValueError for a folder whose tokenizer this layout cannot hold.
    headed: whether it can hold the heads `score` and `qa_outputs`.
    """

    main: tuple[str, ...]
    read: Read
    write: Write | None = None
    plan: Plan | None = None
    shards: str | None = None
    find: Callable[[Path], Path | None] | None = None
    holds: Callable[[Path], bool] = lambda main: True
    config: Callable[[Path, Mapping[str, Entry]], OPTConfig | None] = lambda main, tensors: None
    companions: Callable[[Path], dict[str, bytes]] | None = None
    assets: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    lost: str | None = None
    check: Callable[[OPTConfig], None] = lambda config: None
    check_files: Callable[[Path], object] = lambda folder: None
    headed: bool = False


@dataclass(frozen=True)
class Container:
    """A kind of file that holds tensors by name: how to read one, how to write one, and the bytes that would take."""

    read: Callable[[Path], Mapping[str, Entry]]
    write: Callable[[Path, Sequence[Source], Progress], None]
    size: Callable[[Sequence[Source]], int]


def hub_layout(
    file: str,
    container: Container,
    names: Names | None = None,
    scope: str = "",
    holds: Callable[[Path], bool] = lambda main: True,
    headed: bool = False,
    one_file: str = "",
) -> Layout:
    """A layout of the Hub: tensors in `file`, or in shards named after it with an index.

    `names` are the layout's names of tensors, None for the Hub's own; the index puts `scope` before them. `one_file`
    names who cannot load shards, for a warning.
    """
    stem, _, suffix = file.partition(".")

    def stored(tensors: Sequence[Source]) -> Sequence[Source]:
        return [names.to_stored(tensor) for tensor in tensors] if names else tensors

    def in_index(name: str) -> str:
        return scope + name

    def write(
        folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Progress
    ) -> list[str]:
        def one(path: Path, shard: list[Source]) -> None:
            container.write(path, shard, advance)

        files = write_sharded(folder, file, stored(tensors), limit, one, in_index)
        if one_file and len(files) > 1:
            text = f"{one_file} loads one file only, not these {len(files)}; a larger max_shard_size makes one"
            warnings.warn(text, stacklevel=2)
        return files

    def plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
        return plan_sharded(file, stored(tensors), limit, container.size, in_index)

    return Layout(
        main=(file, f"{file}.index.json"),
        shards=rf"{stem}-\d+-of-\d+\.{suffix}",
        read=reader(container.read, names),
        write=write,
        plan=plan,
        holds=holds,
        headed=headed,
    )


def reader(read: Callable[[Path], Mapping[str, Entry]], names: Names | None) -> Read:
    """A layout's `read`, of one file or of an index and its shards, from the container's."""

    def entries(path: Path) -> dict[str, Entry]:
        stored = read(path)
        return names.to_hub(path, stored) if names else dict(stored)

    def hub_name(name: str) -> str:
        return (names.hub(name) or (name,))[0] if names else name

    def read_all(main: Path) -> tuple[list[Path], dict[str, Entry]]:
        if main.name.endswith(".index.json"):
            return read_sharded(main, entries, hub_name)
        return [main], entries(main)

    return read_all
