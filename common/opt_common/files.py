"""Small files: errors name the file, and a kill never leaves half of one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError, naming the file, if it is not UTF-8 JSON, is not an object, or repeats
    a key; FileNotFoundError if it is missing."""
    path = Path(path)
    return parse_json(read_bytes(path), path)


def read_text(path: Path) -> str:
    """The text in a file, whatever ends its lines. ValueError or OSError, naming the file, if it is not UTF-8 or cannot
    be read."""
    try:
        with naming(path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_bytes(path: Path) -> bytes:
    """What a file holds. OSError, naming the file, if it cannot be read."""
    with naming(path):
        return path.read_bytes()


def parse_json(text: bytes, path: Path | str) -> dict[str, Any]:
    """As `read_json`, of text read from `path`, which may also be a description for errors."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"key {key!r} appears twice")
            values[key] = value
        return values

    try:
        # An empty list takes forty times its text in memory; those of real files hold something.
        if text.count(b"[") + text.count(b"{") > 10_000 + len(text) // 8:
            raise ValueError(f"more lists and objects than {len(text)} bytes of any checkpoint hold")
        values = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: found a JSON {type(values).__name__}, wanted an object")
    return values


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError the name of the file, which that of a read from an open file lacks."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary file and rename it to `path`: readers see the old file or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in reversed(range(10)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            return
        except FileNotFoundError:  # a save has just exchanged the folder for another: write into that one
            if not left:
                raise
        finally:
            beside.unlink(missing_ok=True)


def json_text(value: Any) -> str:
    """Indented JSON as it is shown and stored: UTF-8, except for half a surrogate pair, which that cannot hold."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def plain(text: str) -> str:
    """Text for a terminal: what is not printable, as a hostile file's names may not be, is spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def abridged(names: Iterable[str]) -> str:
    """The names for an error message: all, or the first of very many."""
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
