"""Checkpoints as mappings from tensor names to what lies on disk, read one tensor at a time, and written whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from .config import OPTConfig
from .layouts import LAYOUTS
from .tensors import MAX_SHARD_SIZE, Entry, Source, parse_size

# What a folder is opened by, the preferred first, and its layout.
FILES = {name: layout for layout, module in LAYOUTS.items() for name in module.MAIN}


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
        self.layout = FILES[present[0]]
        self.files, self._entries = LAYOUTS[self.layout].read(self.path / present[0])

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


def save_checkpoint(
    folder: str | Path,
    tensors: Iterable[Source],
    texts: Mapping[str, str],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Callable[[int], None] = lambda nbytes: None,
    layout: str = "safetensors",
    config: OPTConfig | None = None,
) -> list[Path]:
    """Write `tensors` in `layout` and `texts` (file name -> contents: config.json ...) into `folder`.

    Tensors are read and written one at a time, in order, in shards of at most `max_shard_size` bytes (a tensor larger
    than that gets a shard of its own). `progress` is told the bytes of each. Everything is written to a folder beside,
    which one rename commits: killed at any moment, `folder` holds the old checkpoint or the new one. Weight files of
    the old checkpoint that the new one does not have are removed. Returns the weight files. `config` is for layouts
    that keep it in their own way.
    """
    limit, folder = parse_size(max_shard_size), Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file, wanted a folder to save into")
    finish_interrupted_save(folder)
    staged = folder / ".saving" if folder.exists() else folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staged, ignore_errors=True)  # what a killed save left
    staged.mkdir(parents=True)
    try:
        for name, text in texts.items():
            (staged / name).write_text(text, encoding="utf-8")
        names = LAYOUTS[layout].write(staged, list(tensors), config, limit, progress)
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
_SHARD = re.compile("|".join(module.SHARD for module in LAYOUTS.values()))


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
