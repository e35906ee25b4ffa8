"""Which datasets an HDF5 file holds, and where their numbers lie.

Written here because HDF5's own library crashes the process on some damaged files, and weights come from strangers. The
library in a child process would survive that, but starting one costs a third of a second for each file, and what it
answers would have to be checked all the same. The part of the format that holds names, shapes and places is small:
groups as HDF5 1.6 stores them (h5py's default) and as 1.8 and later do (`libver="latest"`, and HDF5 2.0), object
headers, and types of plain numbers. Attributes and fill values are passed over. All else is an error that says what it
is: filters, chunks, links, virtual and external datasets, types with pointers.

Lengths and addresses are compared with the file before they are used, and all headers together read no more bytes than
the file has, twice, so that no loop and no overlap takes long. Plain reads and no memory map: a page of a map that
cannot be read kills the process. Structures are called as in the HDF5 File Format Specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_NOWHERE = 2**64 - 1  # the address of what has no place in the file
# Of groups; OPT's names have 8 parts at most. Of groups and datasets; Keras's file of opt-175b and its optimizer has
# 6,300. Bytes of headers; those take 9 MB. Characters of a full name.
_DEPTH, _OBJECTS, _HEADERS, _NAME = 16, 10_000, 1 << 24, 1024

# The messages of an object header that are read.
_SPACE, _LINKS, _TYPE, _LINK, _FILES, _LAYOUT, _FILTERS, _MORE, _TABLE = 1, 2, 3, 6, 7, 8, 11, 16, 17
_KEPT = {_SPACE, _LINKS, _TYPE, _LINK, _FILES, _LAYOUT, _FILTERS, _TABLE}
Message = tuple[int, int, bytes]  # its type; the byte of the file where its data begin; its data

# Bytes; sign bit; exponent's first bit, and bits; mantissa's; bias: of the little-endian floats.
_FLOATS = {
    (2, 15, 10, 5, 0, 10, 15): "float16",
    (2, 15, 7, 8, 0, 7, 127): "bfloat16",
    (4, 31, 23, 8, 0, 23, 127): "float32",
    (8, 63, 52, 11, 0, 52, 1023): "float64",
}


@dataclass(frozen=True)
class Dataset:
    """`offset` is that of its first number from the beginning of the HDF5 file, `nbytes` are all it takes there."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


class Headers:
    """The headers of an HDF5 file, which is `size` bytes of an open file from byte `start` on.

    Raises ValueError, without the name of the file, that says what is wrong at which byte of the HDF5 file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size
        self.left = min(2 * size, _HEADERS)  # bytes to read

    def datasets(self) -> dict[str, Dataset]:
        """The datasets by their full names ("a/b/c")."""
        root = self._root()
        return dict(self._walk(self._messages("the root", root), "", {root}, 0))

    def read(self, what: str, at: int, length: int) -> bytes:
        if at + length > self.size:
            raise ValueError(f"{what} at byte {at}: found the end at byte {self.size}, wanted {length} bytes")
        self.left -= length
        if self.left < 0:
            raise ValueError(f"{what} at byte {at}: found more headers than {self.size} bytes of any checkpoint hold")
        self.file.seek(self.start + at)
        data = self.file.read(length)
        if len(data) < length:
            raise ValueError(f"{what} at byte {at}: found {len(data)} bytes, wanted {length}")
        return data

    def fields(self, what: str, at: int, form: str, *first: object) -> tuple[Any, ...]:
        """The fields of a structure behind its first ones, a signature or a version, which are checked."""
        found = struct.unpack(form, self.read(what, at, struct.calcsize(form)))
        _check(what, at, found[: len(first)], first)
        return found[len(first) :]

    def summed(self, what: str, at: int, length: int, *first: object) -> bytes:
        """A structure that begins with a signature, and perhaps a version, and ends in a checksum."""
        data = self.read(what, at, length)
        _check(what, at, (data[:4], *data[4:5])[: len(first)], first)
        _check(f"checksum of {what}", at, checksum(data[:-4]), _number(data[-4:]))
        return data

    def _root(self) -> int:
        """The address of the root group."""
        _check("signature", 0, self.read("signature", 0, 8), _SIGNATURE)
        (version,) = self.read("superblock", 8, 1)
        if version == 0:
            base, _, end, driver, root = self.fields("sizes of addresses and lengths", 13, "<2B9x4Q8xQ", 8, 8)
            _check("file driver", 48, driver, _NOWHERE)
        elif version in (2, 3):
            data = self.summed("superblock", 0, 48, _SIGNATURE[:4])
            _check("sizes of addresses and lengths", 9, tuple(data[9:11]), (8, 8))
            _check("flags of a file that is open for writing", 11, data[11] & 5, 0)
            base, _, end, root = struct.unpack("<4Q", data[12:44])
        else:
            raise ValueError(f"superblock at byte 8: found version {version}, wanted 0, 2 or 3")
        _check("base address", 0, base, 0)
        if end > self.size:
            raise ValueError(f"superblock at byte 0: found the end at byte {self.size}, wanted {end} bytes")
        return root

    def _walk(self, group: list[Message], prefix: str, seen: set[int], depth: int) -> Iterator[tuple[str, Dataset]]:
        names: set[str] = set()
        for link, address in self._links(group):
            name = prefix + link.decode("utf-8")
            if not link or b"/" in link or b"\0" in link or len(name) > _NAME:
                raise ValueError(f"{name[:_NAME]!r}: found no name of at most {_NAME} characters")
            if name in names:
                raise ValueError(f"{name} appears twice in its group")
            if address is None:
                raise ValueError(f"{name} is a link to elsewhere, wanted a dataset")
            if address in seen:
                raise ValueError(f"{name} appears in the file under another name too")
            names.add(name)
            seen.add(address)
            if len(seen) > _OBJECTS:
                raise ValueError(f"it holds more than {_OBJECTS} groups and datasets, which no OPT needs")
            messages = self._messages(name, address)
            kinds = {kind for kind, _, _ in messages}
            if _LAYOUT in kinds:
                yield name, _dataset(name, messages)
            elif kinds & {_TABLE, _LINKS} and depth < _DEPTH:
                yield from self._walk(messages, name + "/", seen, depth + 1)
            else:
                raise ValueError(
                    f"{name} is neither a dataset nor a group, or is nested more than {_DEPTH} groups deep"
                )

    def _messages(self, name: str, at: int) -> list[Message]:
        """What the header of an object says that is read here, in all of its blocks."""
        what = f"{name}: object header"
        start = self.read(what, at, 8)
        if start[:4] == b"OHDR":
            place, width = 6 + (16 if start[5] & 32 else 0) + (4 if start[5] & 16 else 0), 1 << (start[5] & 3)
            size = _number(self.read(what, at + place, width))
            place += width
            block = self.summed(what, at, place + size + 4, b"OHDR", 2)[place:-4]
            form, head = "<BHB", 6 if start[5] & 4 else 4
        else:
            (size,), place = self.fields(what, at, "<B7xL", 1), 16
            block = self.read(what, at + place, size)
            form, head = "<2HB", 8
        blocks, found = [(at + place, block)], []
        for begin, block in blocks:  # it grows meanwhile
            place = 0
            while place + head <= len(block):
                kind, size, flags = struct.unpack_from(form, block, place)
                place += head
                where, data = begin + place, block[place : place + size] if kind in _KEPT or kind == _MORE else b""
                place += size
                if place > len(block):
                    raise ValueError(
                        f"{what} at byte {at}: found a message of {size} bytes at byte {where}, past its end"
                    )
                if kind == _MORE:
                    more, length = _unpack(f"{what}'s continuation", where, "<2Q", data)
                    if form == "<2HB":
                        blocks.append((more, self.read(what, more, length)))
                    else:
                        blocks.append((more + 4, self.summed(what, more, length, b"OCHK")[4:-4]))
                elif kind in _KEPT:
                    if flags & 2:
                        raise ValueError(f"{what} at byte {at}: found a message at byte {where} that objects share")
                    if len(found) == _OBJECTS:
                        raise ValueError(f"{what} at byte {at}: found more than {_OBJECTS} messages")
                    found.append((kind, where, data))
        return found

    def _links(self, messages: list[Message]) -> Iterator[tuple[bytes, int | None]]:
        """The names in a group, each with the address of its object, or None for one that is elsewhere."""
        for kind, at, data in messages:
            if kind == _TABLE:
                tree, heap = _unpack("symbol table", at, "<2Q", data)
                size, _, place = self.fields("local heap", heap, "<4sB3x3Q", b"HEAP", 0)
                names = self.read("local heap's names", place, size)
                for place, address in self._symbols(tree):
                    end = names.find(b"\0", place, place + _NAME)
                    if end < 0:
                        raise ValueError(
                            f"local heap at byte {heap}: found no name of at most {_NAME} bytes at {place}"
                        )
                    yield names[place:end], address
            elif kind == _LINK:
                yield _link(at, data)
            elif kind == _LINKS:
                _, flags = _unpack("link info", at, "<2B", data, 0)
                heap, tree = _unpack("link info", at, f"<{10 if flags & 1 else 2}x2Q", data)
                if heap != _NOWHERE:
                    objects = _Heap(self, heap)
                    for record in self._records(tree, 4 + objects.id_length):
                        yield _link(heap, objects.get(record[4:]))

    def _symbols(self, at: int, level: int | None = None) -> Iterator[tuple[int, int | None]]:
        """The symbols of a group of HDF5 1.6, in a B-tree: the place of a name in the local heap, and as `_links`."""
        height, entries = self.fields("B-tree", at, "<4s2BH", b"TREE", 0)
        if height != level if level is not None else height > _DEPTH:
            wanted = f"at most {_DEPTH}" if level is None else level
            raise ValueError(f"B-tree at byte {at}: found level {height}, wanted {wanted}")
        for child in struct.unpack(f"<{2 * entries}Q", self.read("B-tree", at + 24, 16 * entries))[1::2]:
            if height:
                yield from self._symbols(child, height - 1)
                continue
            (count,) = self.fields("symbol table", child, "<4sBxH", b"SNOD", 1)
            for place, address, cached in struct.iter_unpack("<2QL20x", self.read("symbols", child + 8, 40 * count)):
                yield place, None if cached == 2 else address

    def _records(self, at: int, size: int) -> Iterator[bytes]:
        """The records, of `size` bytes, of a B-tree of HDF5 1.8, which finds links by their names."""
        data = self.summed("B-tree", at, 38, b"BTHD", 0)
        kind, node, found, depth, root, count = struct.unpack("<BLHH2xQH", data[5:26])
        _check("type and record of B-tree", at, (kind, found), (5, size))
        if depth > _DEPTH:
            raise ValueError(f"B-tree at byte {at}: found {depth} levels, wanted at most {_DEPTH}")
        leaf = below = max(0, node - 10) // size  # records of a leaf; of all nodes below one, and itself
        pointers = [0]  # bytes of a pointer in a node of each level: address, records, records with all below
        for level in range(1, depth + 1):
            pointers.append(8 + _width(leaf) + (_width(below) if level > 1 else 0))
            records = max(0, node - 10 - pointers[level]) // (size + pointers[level])
            below += records * (below + 1)

        def records_of(at: int, count: int, level: int) -> Iterator[bytes]:
            begin, pointer = 6 + count * size, pointers[level]
            end = begin + (count + 1) * pointer
            data = self.summed("B-tree's node", at, end + 4, b"BTIN" if level else b"BTLF", 0)
            for place in range(6, begin, size):
                yield data[place : place + size]
            for place in range(begin, end, pointer or 1):
                address, counted = data[place : place + 8], data[place + 8 : place + 8 + _width(leaf)]
                yield from records_of(_number(address), _number(counted), level - 1)

        if count:
            yield from records_of(root, count, depth)


class _Heap:
    """A fractal heap, where a group of HDF5 1.8 keeps its links when they are many.

    Its blocks stand in rows of `width`; those of the first two rows have `start` bytes, those of each other row twice
    as many as in the row before. The larger ones are indirect: they hold the addresses of such rows in turn."""

    def __init__(self, headers: Headers, at: int) -> None:
        self.headers, self.at = headers, at
        data = headers.summed("fractal heap", at, 146, b"FRHP", 0)
        self.id_length, filters, self.flags, largest = struct.unpack("<2HBL", data[5:14])
        self.width, self.start, self.direct, bits, _, self.root, self.rows = struct.unpack("<H2Q2HQH", data[110:142])
        _check("filters of fractal heap", at, filters, 0)
        if not (self.id_length and self.width and 0 < self.start <= self.direct < 2**32 and 0 < bits <= 64):
            raise ValueError(f"fractal heap at byte {at}: found blocks of {self.start} to {self.direct} bytes")
        self.offset_width = (bits + 7) // 8
        self.length_width = min(_width(self.direct), _width(largest))
        self.blocks: dict[int, bytes] = {}

    def get(self, place: bytes) -> bytes:
        """The object that an identifier says the place of."""
        if place[0] & 0xF0:
            raise ValueError(
                f"fractal heap at byte {self.at}: found an object of kind {place[0]:#x}, wanted one within"
            )
        end = 1 + self.offset_width
        offset, length = _number(place[1:end]), _number(place[end : end + self.length_width])
        block, begin = self._block(offset)
        if offset - begin + length > len(block):
            raise ValueError(f"fractal heap at byte {self.at}: found {length} bytes at {offset}, past their block")
        return block[offset - begin : offset - begin + length]

    def _block(self, offset: int) -> tuple[bytes, int]:
        """The direct block at an offset of the heap, and the offset it begins at."""
        at, rows, begin, size = self.root, self.rows, 0, self.start
        while rows:
            row = ((offset - begin) // (self.start * self.width)).bit_length()
            size = self.start << max(0, row - 1)
            column = (offset - begin - (size * self.width if row else 0)) // size
            if row >= rows:
                raise ValueError(f"fractal heap at byte {self.at}: found an object at {offset}, past its blocks")
            data = self._read(at, b"FHIB", begin, 13 + self.offset_width + 8 * rows * self.width + 4, True)
            place = 13 + self.offset_width + 8 * (row * self.width + column)
            at, begin = _number(data[place : place + 8]), begin + size * (column + (self.width if row else 0))
            rows = (size // (self.start * self.width)).bit_length() if size > self.direct else 0
        return self._read(at, b"FHDB", begin, size, bool(self.flags & 2)), begin

    def _read(self, at: int, signature: bytes, begin: int, size: int, summed: bool) -> bytes:
        """A block at a byte of the file, which begins at an offset of the heap."""
        if at not in self.blocks:
            data = self.headers.read("fractal heap's block", at, size)
            end = 13 + self.offset_width
            found = data[:4], *data[4:5], _number(data[5:13]), _number(data[13:end])
            _check("fractal heap's block", at, found, (signature, 0, self.at, begin))
            if summed and signature == b"FHDB":  # its checksum comes before the objects, and counts as zeros
                stored, counted = data[end : end + 4], data[:end] + bytes(4) + data[end + 4 :]
            else:
                stored, counted = data[-4:], data[:-4]
            if summed:
                _check("checksum of fractal heap's block", at, checksum(counted), _number(stored))
            self.blocks[at] = data
        return self.blocks[at]


def _link(at: int, data: bytes) -> tuple[bytes, int | None]:
    """A link's name, and the address of its object, or None if it is elsewhere."""
    _, flags = _unpack("link", at, "<2B", data, 1)
    kind, place = (data[2:3] if flags & 8 else b"\0"), 2 + bool(flags & 8) + (8 if flags & 4 else 0) + bool(flags & 16)
    width = 1 << (flags & 3)
    length, place = _number(data[place : place + width]), place + width
    name, place = data[place : place + length], place + length
    if kind != b"\0":
        return name, None
    return name, *_unpack("link", at, "<Q", data[place:])


def _dataset(name: str, messages: list[Message]) -> Dataset:
    found = {kind: (at, data) for kind, at, data in messages}
    if len(found) < len(messages) or not {_SPACE, _TYPE} <= found.keys():
        raise ValueError(f"{name}: found no shape, no type, or two of a kind; wanted one of each")
    for kind, how in ((_FILTERS, "compressed"), (_FILES, "external")):
        if kind in found:
            raise ValueError(f"{name}: found {how} numbers, wanted plain ones")
    at, data = found[_LAYOUT]
    version, kind = _unpack("layout", at, "<2B", data)
    if version not in (3, 4, 5):
        raise ValueError(f"{name}: found version {version} of a layout, wanted 3 to 5")
    if kind != 1:
        how = {0: "compact", 2: "chunked", 3: "virtual"}.get(kind, f"layout {kind} of")
        raise ValueError(f"{name}: found {how} numbers, wanted plain ones")
    offset, nbytes = _unpack("layout", at, "<2x2Q", data)
    if offset == _NOWHERE:
        raise ValueError(f"{name}: found no numbers, wanted plain ones")
    return Dataset(_shape(name, *found[_SPACE]), _dtype(name, *found[_TYPE]), offset, nbytes)


def _shape(name: str, at: int, data: bytes) -> tuple[int, ...]:
    version, rank, _, kind = _unpack("shape", at, "<4B", data)
    if version not in (1, 2) or (version == 2 and kind > 1):
        raise ValueError(f"{name}: found no shape (version {version}, kind {kind}), wanted plain numbers")
    return _unpack("shape", at, f"<{8 if version == 1 else 4}x{rank}Q", data)


def _dtype(name: str, at: int, data: bytes) -> str:
    kind, order, sign, _, size = _unpack("type", at, "<4BL", data)
    kind &= 15
    if kind == 5 and size == 2:
        return "bfloat16"
    if kind < 2:
        first, bits = _unpack("type", at, "<8x2H", data)
        if kind == 0 and not order & 1 and first == 0 and bits == 8 * size and size in (1, 2, 4, 8):
            return f"{'' if order & 8 else 'u'}int{bits}"
        if kind == 1 and not order & 0x41 and first == 0 and bits == 8 * size and order >> 4 & 3 == 2:
            known = _FLOATS.get((size, sign, *_unpack("type", at, "<12x4BL", data)))
            if known:
                return known
    raise ValueError(f"{name}: found values of {size} bytes, HDF5's class {kind}, wanted little-endian numbers")


def _check(what: str, at: int, found: object, wanted: object) -> None:
    if found != wanted:
        raise ValueError(f"{what} at byte {at}: found {found!r:.80}, wanted {wanted!r}")


def _unpack(what: str, at: int, form: str, data: bytes, *first: object) -> tuple[Any, ...]:
    if len(data) < struct.calcsize(form):
        raise ValueError(f"{what} at byte {at}: found {len(data)} bytes, wanted {struct.calcsize(form)}")
    found = struct.unpack_from(form, data)
    _check(what, at, found[: len(first)], first)
    return found


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _width(largest: int) -> int:
    """Bytes of a number up to `largest`."""
    return max(1, (largest.bit_length() + 7) // 8)


def checksum(data: bytes) -> int:
    """Bob Jenkins's lookup3, of which HDF5 takes this half."""
    a = b = c = 0xDEADBEEF + len(data) & 0xFFFFFFFF
    words = struct.unpack(f"<{-(-len(data) // 12) * 3}L", data + bytes(-len(data) % 12))
    for i in range(0, len(words), 3):
        a, b, c = a + words[i] & 0xFFFFFFFF, b + words[i + 1] & 0xFFFFFFFF, c + words[i + 2] & 0xFFFFFFFF
        if i + 3 < len(words):
            for turn in (4, 6, 8, 16, 19, 4):
                a = (a - c ^ (c << turn | c >> 32 - turn)) & 0xFFFFFFFF
                a, b, c = b, c + b & 0xFFFFFFFF, a
        else:
            for turn in (14, 11, 25, 16, 4, 14, 24):
                c = (c ^ b) - (b << turn | b >> 32 - turn) & 0xFFFFFFFF
                a, b, c = b, c, a
    return b if words else c
