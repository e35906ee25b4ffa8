"""Reading and writing small files so that an error names the file and a kill leaves no half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError, naming the file, if it is not UTF-8 JSON, is not an object, or repeats
    a key; FileNotFoundError if it is missing."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
        return values

    path = Path(path)
    try:
        values = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found a JSON {type(values).__name__}, wanted an object")
    return values


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it there: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
