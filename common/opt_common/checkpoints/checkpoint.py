"""A checkpoint as a mapping from names to stored tensors, each read on demand."""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..config import DTYPES
from ..files import abridged, read_json
from .commit import SAVED
from .layouts import LAYOUTS, layout_named
from .tensors import CAN_HOLD, Entry, Index, holding, numpy_dtype

# The files that a folder can be opened by.
FILES = tuple(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.main))
_MOST_HELD = 128  # files; a process may have 1,024 open
T = TypeVar("T")


class Checkpoint(Mapping[str, Entry]):
    """The tensors of a checkpoint by name. Opening reads headers only.

    `path` is a folder or a weight file. `layout` is one of `LAYOUTS`, or None for the one found; if there are
    several, `prefer` takes the first. `main` is the file that the checkpoint was opened by, `files` the weight files.
    All that is read comes from one save, even if another replaces it meanwhile: the files stay open. Layouts of very
    many files are the exception; their tensors raise OSError once they have been replaced.
    Raises FileNotFoundError if there are no weights, ValueError if there are weights of several layouts and neither
    `layout` nor `prefer` chooses, and ValueError, naming the file, if one is damaged.
    """

    def __init__(self, path: str | Path, layout: str | None = None, prefer: bool = False) -> None:
        self.path = Path(path)
        of_one_save(self.folder, lambda: self._open(layout, prefer))

    def _open(self, layout: str | None, prefer: bool) -> None:
        found = recognize(self.path, layout)
        if len(found) > 1 and not prefer:
            there = ", ".join(f"{name} ({main.name})" for name, main in found.items())
            raise ValueError(
                f"{self.path}: holds weights of {len(found)} layouts: {there}; choose one (--from, layout=)"
            )
        self.layout, self.main = next(iter(found.items()))
        self.files, entries = LAYOUTS[self.layout].read(self.main)
        self._entries = {name: self._of_this_save(entry) for name, entry in entries.items()}
        # the layouts that make folders make very many files
        self._all_held = len(self.files) <= _MOST_HELD and all(f.parent == self.main.parent for f in self.files)
        held, stack = {self.main, *(self.files if self._all_held else ())}, ExitStack()
        weakref.finalize(self, stack.close)
        self._held = {path: stack.enter_context(open(path, "rb", buffering=0)) for path in held if CAN_HOLD}
        self._all_held &= CAN_HOLD
        self._stamp = _stamp(self.main)

    def _of_this_save(self, entry: Entry) -> Entry:
        def checked(read: Callable[[], np.ndarray]) -> np.ndarray:
            with holding(self._held):
                try:
                    array = read()
                except (OSError, ValueError):
                    if self._is_there():
                        raise
                else:
                    if self._is_there():
                        return array
            raise OSError(f"{self.main}: another save took its place while it was read; open it again")

        def cut(index: Index, copied: bool) -> np.ndarray:
            return checked(lambda: entry.part(index, copied))

        whole = (lambda: checked(entry.read)), (lambda: checked(entry.map))
        return Entry(entry.shape, entry.dtype, entry.file, *whole, cut if entry.cut else None)

    def _is_there(self) -> bool:
        """Whether the files are open, or still those that were opened. `main` is the first that a save removes, and its
        number is not given to another file while it is open."""
        return self._all_held or _stamp(self.main) == self._stamp

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bits."""
        a, b = self[first], self[second]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        bits = f"u{numpy_dtype(a.dtype).itemsize}"
        x, y = (np.atleast_1d(entry.map().view(bits)) for entry in (a, b))
        return all(np.array_equal(x[i : i + 1024], y[i : i + 1024]) for i in range(0, len(x), 1024))

    @property
    def folder(self) -> Path:
        """The folder of config.json and the tokenizer."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def dtype(self) -> str:
        """The floating-point dtype of most of its bytes."""
        sizes: dict[str, int] = {}
        for entry in self.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=lambda name: (name in DTYPES, sizes[name]))

    def rearrange(self, change: Callable[[Mapping[str, Entry]], dict[str, Entry]]) -> None:
        """Replace the tensors by others, which are read from them."""
        self._entries = change(self._entries)


def of_one_save(folder: Path, read: Callable[[], T]) -> T:
    """What `read` gives of the files in `folder`, all of one save: again, if another took its place meanwhile.

    Raises what `read` does, and OSError if it has been tried a hundred times."""
    problem: Exception = OSError(f"{folder}: saved into too often to be read")
    for _ in range(100):
        with ExitStack() as held:
            if CAN_HOLD and folder.is_dir():  # while it is open, its number is not given to another folder
                held.callback(os.close, os.open(folder, os.O_RDONLY))
            before = _version(folder)
            try:
                result = read()
            except (OSError, ValueError) as error:
                if (folder / SAVED).is_dir():  # files are being moved in
                    problem = error
                    time.sleep(0.01)
                elif _version(folder) == before:
                    raise
            else:
                if _version(folder) == before:
                    return result
    raise problem


def _version(folder: Path) -> list[tuple[int, ...] | None]:
    """What is another after another save."""
    there = _stamp(folder)
    return [there and there[:1], *(_stamp(os.path.join(folder, name)) for name in ("config.json", *FILES))]


def _stamp(path: Path | str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # a name may hold a null byte
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def recognize(path: Path, layout: str | None = None) -> dict[str, Path]:
    """The layouts of the weights at `path`, the preferred first, and the file to open each by.

    Goes by the names of files and of the tensors in them, never by the name of a folder. If a layout has a complete set
    of shards and an unsharded file, the shards win, with a warning: the file is older (opt-13b's flax_model.msgpack).
    Raises FileNotFoundError, listing what it found, if there are no weights, or none of `layout`.
    """
    path, chosen = Path(path), [layout] if layout else list(LAYOUTS)
    found: dict[str, Path] = {}
    for name in chosen:
        kind = layout_named(name)
        if kind.find:
            main = kind.find(path)
            mains = [main] if main else []
        elif path.is_file():
            mains = [path] if any(path.name.endswith(_ending(main)) for main in kind.main) else []
        else:
            mains = [path / main for main in kind.main if (path / main).is_file()]
        if mains and kind.holds(main := _newest(mains)):
            found[name] = main
    if found:
        return found
    if (path / SAVED).is_dir():
        raise FileNotFoundError(
            f"{path}: no weights: a save was stopped while it moved its files in; move the rest out of {path / SAVED}, "
            "or save again"
        )
    wanted = f"weights of layout {layout}" if layout else "weights"
    names = ", ".join(layout_named(layout).main if layout else FILES)
    there = abridged(sorted(p.name for p in path.iterdir())) if path.is_dir() else "a file" if path.exists() else ""
    raise FileNotFoundError(f"{path}: no {wanted}; wanted one of {names}; found: {there or 'nothing'}")


def _ending(main: str) -> str:
    """The suffix that all files of this kind have: .h5, or .h5.index.json."""
    return "".join(Path(main).suffixes) if main.endswith(".json") else Path(main).suffix


def _newest(mains: list[Path]) -> Path:
    """Of a layout's files, the one to open: the index if no shard is missing, else the preferred."""
    indexes = [main for main in mains if main.name.endswith(".index.json")]
    if not indexes or len(mains) == 1:
        return mains[0]
    try:
        shards = read_json(indexes[0]).get("weight_map", {}).values()
        complete = bool(shards) and all(indexes[0].with_name(name).is_file() for name in set(shards))
    except (ValueError, TypeError, AttributeError):
        complete = False
    read = indexes[0] if complete else next(main for main in mains if main not in indexes)
    ignored = [main.name for main in mains if main != read]
    why = "whose shards are all there" if complete else "because shards of the index are missing"
    warnings.warn(f"{read.parent}: reading {read.name}, {why}, and not {', '.join(ignored)}", stacklevel=7)
    return read
