"""Saving a checkpoint, all or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..config import OPTConfig
from .layouts import LAYOUTS, WRITABLE, layout_named
from .shards import MAX_SHARD_SIZE, parse_size
from .tensors import Source

_FILES_LIST = ".files.json"
# The names of the Hub's own layouts, which a save may clear away; a `model.pt` may be anything of the user's.
_CLEARED = re.compile("|".join(
    pattern for layout in LAYOUTS.values() if layout.shards for pattern in (layout.shards, *map(re.escape, layout.main))
))  # fmt: skip


def save_checkpoint(
    folder: str | Path,
    tensors: Iterable[Source],
    texts: Mapping[str, str | bytes],
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Callable[[int], None] = lambda nbytes: None,
    layout: str = "safetensors",
    config: OPTConfig | None = None,
) -> list[Path]:
    """Write `tensors` in `layout` and `texts` (file name -> contents: config.json ...) into `folder`.

    Reads and writes tensors one at a time, in order, in shards of at most `max_shard_size` bytes (a larger tensor gets
    a shard of its own), and tells `progress` the bytes of each. `config` is for layouts that store it their own way.
    Writes to a staging folder that one rename commits: killed at any moment, `folder` holds the old checkpoint or the
    new one. Removes the old checkpoint's weight files that the new one lacks, if their names are the Hub's; and, with a
    warning, what a killed save left behind. Returns the weight files.
    Raises OSError if the disk is full, or if another process is saving into `folder`.
    """
    limit, folder = parse_size(max_shard_size), Path(folder).resolve()
    write = layout_named(layout).write
    if write is None:
        raise ValueError(f"layout: {layout} can only be read, wanted one of {', '.join(WRITABLE)}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file, wanted a folder to save into")
    inside, beside = folder / ".saving", folder.with_name(f".{folder.name}.saving")
    over = folder.exists()
    staged = inside if over else beside
    staged.parent.mkdir(parents=True, exist_ok=True)
    # if the folder was created or removed since a save into it began, the staging folder is in the other place
    places = [p for p in (inside, beside) if p == staged or p.exists() or _lock(p).exists()]
    with ExitStack() as locks:
        for place in places:
            locks.enter_context(_locked(place, folder))
        finish_interrupted_save(folder)
        for left in places:
            if left.exists():
                warnings.warn(f"{left}: removed, an interrupted save left it", stacklevel=2)
                shutil.rmtree(left)
        staged.mkdir()
        try:
            for name, text in texts.items():
                (staged / name).write_bytes(text.encode() if isinstance(text, str) else text)
            names = write(staged, list(tensors), config, limit, progress)
            if over:
                (staged / _FILES_LIST).write_text(json.dumps(sorted(p.name for p in staged.iterdir())))
            for path in staged.rglob("*"):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            os.rename(staged, folder / ".saved" if over else folder)
        except BaseException as error:
            shutil.rmtree(staged, ignore_errors=True)
            if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk names no file
                raise OSError(error.errno, f"{folder}: not saved: {error.strerror}") from error
            raise
        finish_interrupted_save(folder)
    return [folder / name for name in names]


@contextmanager
def _locked(staged: Path, folder: Path) -> Iterator[None]:
    """Lets one process at a time save into `folder`. The kernel drops the lock when the process ends."""
    path = _lock(staged)
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout as error:
        raise BlockingIOError(f"{folder}: another process is saving into it") from error


def _lock(staged: Path) -> Path:
    return staged.with_name(f"{staged.name}.lock")


def finish_interrupted_save(folder: Path) -> None:
    """Move a committed save into place: the second half of `save_checkpoint`, which a kill may have cut short.

    Several files cannot be renamed at once. So a save is complete when `.saved` exists, and whoever opens the folder
    next finishes the moving. Two may do so at once: either may find that the other has done a step.
    """
    saved = folder / ".saved"
    listing = saved / _FILES_LIST
    if not saved.is_dir() or saved.is_symlink():
        return
    with suppress(FileNotFoundError):  # the list is missing only if everything has been moved
        new = _listed(listing)
        for name in sorted(new):
            if not (saved / name).exists():
                continue
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                shutil.rmtree(folder / name)
            with suppress(FileNotFoundError):
                os.replace(saved / name, folder / name)
        for path in folder.iterdir():
            if _CLEARED.fullmatch(path.name) and path.name not in new and not path.is_dir():
                path.unlink(missing_ok=True)
        listing.unlink()
    with suppress(FileNotFoundError):
        saved.rmdir()


def _listed(listing: Path) -> set[str]:
    """The names in the list of files to move, which may come with a downloaded folder and must not lead out of it."""
    try:
        names = json.loads(listing.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listing}: not readable as JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(n, str) and n and Path(n).name == n != ".." for n in names):
        raise ValueError(f"{listing}: wanted a list of file names inside the folder")
    return set(names)
