"""Saving a checkpoint, all or nothing; how is at the top of `commit.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..config import OPTConfig
from .commit import replaced
from .layouts import WRITABLE, layout_named
from .shards import MAX_SHARD_SIZE, parse_size
from .tensors import Source


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
    Whenever it is killed, `folder` holds the old checkpoint or the new one (see `commit`). Removes the old checkpoint's
    weight files that the new one lacks, if their names are the Hub's; other files stay. Returns the weight files.
    Raises OSError, with `folder` as it was, if the disk is full or the folder cannot be written; BlockingIOError if
    another process is saving into it.
    """
    limit, folder = parse_size(max_shard_size), Path(folder).resolve()
    write = layout_named(layout).write
    if write is None:
        raise ValueError(f"layout: {layout} can only be read, wanted one of {', '.join(WRITABLE)}")
    try:
        with replaced(folder) as staged:
            for name, text in texts.items():
                (staged / name).write_bytes(text.encode() if isinstance(text, str) else text)
            names = write(staged, list(tensors), config, limit, progress)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk names no file
            raise OSError(error.errno, f"{folder}: not saved: {error.strerror}") from error
        raise
    return [folder / name for name in names]
