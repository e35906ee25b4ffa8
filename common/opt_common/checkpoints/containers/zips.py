"""Where the records of a zip file lie.

The zipfile module is not made for hostile files: it takes twenty times the directory's size in memory, and keeps the
last of two records of one name. This reads uncompressed records only, which PyTorch and Keras write: nothing grows when
it is read.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_DIRECTORY_BYTES = 1 << 24


class Records:
    """The records of an open zip file. Raises ValueError that says what is damaged, without the file's name."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        # where each header begins and its record's size; where the directory begins
        self.names, self.end = _directory(file)

    def locate(self, name: bytes) -> tuple[int, int]:
        """Where the bytes of a record begin, and how many they are. KeyError if there is none of that name."""
        start, size = self.names[name]
        self.file.seek(start)
        header = self.file.read(30)
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise ValueError(f"record {shown(name)}: no header at byte {start}")
        name_size, extra_size = struct.unpack("<2H", header[26:])
        if self.file.read(name_size) != name:
            raise ValueError(f"record {shown(name)}: its header names another")
        start += 30 + name_size + extra_size
        if start + size > self.end:
            raise ValueError(f"record {shown(name)}: {size} bytes from byte {start}, which runs past byte {self.end}")
        return start, size


def shown(name: bytes) -> str:
    """A record's name, safe to print in an error."""
    return repr(name[:80].decode("utf-8", "replace"))


def _directory(file: BinaryIO) -> tuple[dict[bytes, tuple[int, int]], int]:
    length = file.seek(0, 2)
    file.seek(max(0, length - 42))
    tail = file.read()
    if len(tail) < 42 or tail[20:24] != b"PK\5\6":
        raise ValueError("no zip directory at its end: is it cut short?")
    size, start = struct.unpack("<2L", tail[32:40])
    if tail[:4] == b"PK\6\7":  # 64-bit
        (position,) = struct.unpack("<Q", tail[8:16])
        file.seek(min(position, length))
        record = file.read(56)
        if len(record) < 56 or record[:4] != b"PK\6\6":
            raise ValueError(f"zip directory: no 64-bit record at byte {position}")
        size, start = struct.unpack("<2Q", record[40:56])
    if size > _DIRECTORY_BYTES or start + size > length:
        raise ValueError(f"zip directory: {size} bytes from byte {start} of {length}")
    file.seek(start)
    directory, at = file.read(size), 0
    records: dict[bytes, tuple[int, int]] = {}
    while at < size:
        if directory[at : at + 4] != b"PK\1\2" or at + 46 > size:
            raise ValueError(f"zip directory: damaged at byte {start + at}")
        flags, method = struct.unpack_from("<2H", directory, at + 8)
        packed, plain, name_size, extra_size, note_size = struct.unpack_from("<2L3H", directory, at + 20)
        (header,) = struct.unpack_from("<L", directory, at + 42)
        name = directory[at + 46 : at + 46 + name_size]
        extra = directory[at + 46 + name_size : at + 46 + name_size + extra_size]
        at += 46 + name_size + extra_size + note_size
        field_at = 0
        while field_at + 4 <= len(extra):
            kind, length_of = struct.unpack_from("<2H", extra, field_at)
            if kind == 1:  # 64-bit numbers, for those that are full
                wide = list(struct.iter_unpack("<Q", extra[field_at + 4 : field_at + 4 + length_of // 8 * 8]))
                plain, packed, header = (wide.pop(0)[0] if n == 0xFFFFFFFF else n for n in (plain, packed, header))
            field_at += 4 + length_of
        if name in records:
            raise ValueError(f"record {shown(name)}: appears twice")
        if method or flags & 1 or packed != plain:
            raise ValueError(f"record {shown(name)}: is compressed or encrypted, wanted plain bytes")
        records[name] = header, plain
    return records, start
