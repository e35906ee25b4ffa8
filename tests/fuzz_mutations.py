"""What makes a damaged file of a valid one: changes to its bytes, and to what they say in each of the formats.

Every function takes bytes and a random.Random, and returns other bytes. Checksums and lengths are put right again where
a reader would stop at them.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import PurePath
from random import Random
from typing import Any

import h5py
import numpy as np

# What takes the place of bytes: the values that lengths, offsets and types go wrong at.
PIECES = [
    b"", b"\0", b"\xff", b"\x80", b"\x7f", b"0", b"9" * 30, b"-1", b"1e99", b"null", b"NaN", b'"', b"\\", b"{",
    b"[" * 2000, b"}", b"../", b"/etc/passwd", b"\0" * 64, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\0\0\0\0\x80",
    b"\xdf\xff\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x81" * 3000, b"cos\nsystem\n",
    b"\x80\x04",
]  # fmt: skip

# What takes the place of a value in JSON, and of a name.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 16, 2**31, 2**53, 2**63, 2**64, 2**80, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", "\ud800", "\x1b[2J", "a" * 5000, "../x", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x", "</s>",
    "F32", "BF16", "<f4", "|O", "zstd", [], {}, [1] * 101, [0, 2**62], [[]] * 9,
    {"content": "x" * 2000}, {"id": "gzip"},
]  # fmt: skip
NAMES = [
    "",
    "\ud800",
    "__metadata__",
    "..",
    "a/b",
    "/x",
    "model",
    "self",
    "unknown",
    "id2label",
    "weight_map",
    "x" * 300,
]
# JSON that takes a parser far, as text.
TEXTS = [
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "1" * 6000,
    "1e999",
    '"\\ud800"',
    '{"a":1,"a":2}',
    "-",
]


def mutate(name: str, data: bytes, random: Random) -> bytes:
    """Damage a file called `name`: its structure, its bytes, or first one and then the other."""
    suffix = next((suffix for suffix in STRUCTURES if name.endswith(suffix)), None)
    kind = STRUCTURES[suffix] if suffix and random.random() < 0.7 else None
    try:
        if kind:
            first = FIRST.get(suffix, kind) if random.random() < 0.3 else kind
            for change in random.choice([[first], [first], [first], [first, kind], [first, kind, kind, kind]]):
                data = change(data, random)
    except Unfit:
        kind = None
    if kind is None or random.random() < 0.3:
        for _ in range(random.choice([1, 1, 2, 5])):
            data = change_bytes(data, random)
    return data


class Unfit(Exception):
    """The data is not of the format: an earlier change has damaged it."""


def change_bytes(data: bytes, random: Random) -> bytes:
    # headers are where the mistakes are: half of the changes hit the first or last 600 bytes
    low, high = random.choice([(0, len(data)), (0, 600), (max(0, len(data) - 600), len(data)), (0, len(data))])
    at = random.randint(low, max(low, min(high, len(data))))
    piece = random.choice([random.choice(PIECES), random.randbytes(random.randint(1, 12))])
    length = random.randint(1, 200)
    start = random.randint(0, len(data))
    return random.choice([
        data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :] if at < len(data) else data,
        data[:at] + piece + data[at + len(piece) :],
        data[:at],
        data[:at] + data[at + length :],
        data[:at] + piece + data[at:],
        data[:at] + data[start : start + length] + data[at + length :],
    ])  # fmt: skip


def change_json(data: bytes, random: Random) -> bytes:
    """One value or one key of a JSON text."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unfit from error
    if random.random() < 0.03:
        return random.choice(TEXTS).encode()
    return json.dumps(changed_tree(tree, random)).encode()


def changed_tree(tree: Any, random: Random) -> Any:
    """The tree with one node changed. Values come from the list above or from elsewhere in the tree."""
    node, places = tree, []
    while isinstance(node, dict | list) and node and (not places or random.random() < 0.8):
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
        places.append((node, key))
        node = node[key]
    if not places:
        return random.choice(VALUES)
    parent, key = places[-1]
    what = random.choice(["value", "value", "value", "number", "number", "drop", "name", "swap", "repeat", "deep"])
    if what == "value":
        parent[key] = random.choice(VALUES)
    elif what == "number":
        near = node if isinstance(node, int | float) and abs(node) < 2**63 else 0
        parent[key] = random.choice([near + 1, near - 1, -near, near * 2, near * 2**20, str(node), [node]])
    elif what == "drop":
        del parent[key]
    elif what == "name" and isinstance(parent, dict):
        parent[random.choice(NAMES)] = parent.pop(key)
    elif what == "swap":
        other = random.choice(list(parent)) if isinstance(parent, dict) else random.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif what == "repeat" and isinstance(parent, list):
        parent += [node] * random.choice([1, 40, 2000])
    else:
        for _ in range(random.choice([1, 20, 300])):
            parent[key] = random.choice([[parent[key]], {"x": parent[key]}])
    return tree


def change_safetensors(data: bytes, random: Random) -> bytes:
    """The header, whose length fits, or is a little off."""
    if len(data) < 8 or struct.unpack("<Q", data[:8])[0] > len(data) - 8:
        raise Unfit
    (length,) = struct.unpack("<Q", data[:8])
    header = change_json(data[8 : 8 + length], random)
    header += b" " * (-len(header) % 8)
    said = len(header) + random.choice([0] * 20 + [1, -1, 8, 2**31, 2**63 - len(header) - 1])
    return struct.pack("<Q", said) + header + data[8 + length :]


@lru_cache(64)
def records_of(data: bytes) -> list[tuple[str, bytes]]:
    """The records of a zip file, with their names."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        return [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception as error:  # damaged in whatever way
        raise Unfit from error


def change_keras(data: bytes, random: Random) -> bytes:
    """The HDF5 file in a file of Keras's, through HDF5 itself."""
    return change_zip(data, random, change_objects)


def change_zip(data: bytes, random: Random, hdf5: Change | None = None) -> bytes:
    """A record: its content, which is a pickle, an HDF5 file or JSON; its name, how it is stored, or how often."""
    records = [*records_of(data)]
    if not records:
        raise Unfit
    main = [i for i, (name, _) in enumerate(records) if name.endswith((".pkl", ".h5"))]
    at = random.choice(main if main and random.random() < 0.6 else range(len(records)))
    name, content = records[at]
    what = random.choice(["content"] * 7 + ["name", "drop", "twice", "packed", "comment"])
    if what == "content":
        inner = next((change for suffix, change in WITHIN.items() if name.endswith(suffix)), change_bytes)
        inner = hdf5 if hdf5 and inner is change_hdf5 else inner
        records[at] = name, inner(content, random)
    elif what == "name":
        records[at] = random.choice(["../../x", "/x", "data.pkl", "x" * 3000, name + "/", name.upper()]), content
    elif what == "drop":
        del records[at]
    elif what == "twice":
        records.insert(random.randrange(len(records)), (name, content[::-1]))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for other, text in records:
            packed = what == "packed" and other == name
            archive.writestr(other, text, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
        archive.comment = b"PK\5\6" * 9 if what == "comment" else b""
    return made.getvalue()


# Instructions, and short runs of them that make, call, store or repeat something.
RUNS = [
    b"(", b")", b"}", b"]", b"N", b"2", b"0", b"1", b"t", b"\x85", b"\x87", b"s", b"u", b"a", b"e", b"d", b"l", b"b",
    b"R", b"\x81", b"\x92", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94", b"Q", b"K\x01",
    b"J\xff\xff\xff\xff", b"M\xff\xff",
    b"h\0", b"q\0", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"G" + b"\x7f" * 8,
    b"X\x03\0\0\0a/b", b"X\xff\xff\xff\x7f", b"\x8c\x03abc", b"C\x03abc", b"\x96\x03\0\0\0\0\0\0\0abc",
    b"\x95" + b"\xff" * 8,
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\nset\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n",
    b"cargparse\nNamespace\n", b"comegaconf.x\nX\n", b"c_codecs\nencode\n", b"ios\nsystem\n", b"(cos\nsystem\no",
    b"Vabc\n", b"I12\n", b"F1.5\n", b"S'a'\n", b"P12\n", b"\x82\x01", b"\x97", b"\x98", b".", b"\x80\x04", b"\x80\x63",
]  # fmt: skip


def change_pickle(data: bytes, random: Random) -> bytes:
    """One instruction, or several times one."""
    ops = [*instructions(data)]
    at = random.randrange(len(ops))
    what = random.choice(["insert", "insert", "drop", "swap", "repeat", "replace", "argument", "argument"])
    if what == "insert":
        ops[at:at] = [random.choice(RUNS)] * random.choice([1, 1, 1, 2, 30, 20_000])
    elif what == "drop":
        del ops[at]
    elif what == "swap":
        other = random.randrange(len(ops))
        ops[at], ops[other] = ops[other], ops[at]
    elif what == "repeat":
        ops[at:at] = ops[at : at + random.randint(1, 12)] * random.choice([1, 3, 2000])
    elif what == "replace":
        ops[at] = random.choice(RUNS)
    else:
        with_argument = [i for i, op in enumerate(ops) if len(op) > 1] or [at]
        at = random.choice(with_argument)
        place = random.randrange(1, max(2, len(ops[at])))
        ops[at] = ops[at][:place] + random.randbytes(random.choice([1, 4])) + ops[at][place + 1 :]
    return b"".join(ops)


@lru_cache(64)
def instructions(data: bytes) -> list[bytes]:
    """The instructions of a pickle, or of several in a row, and what is behind them as one more."""
    stream, starts = io.BytesIO(data), [0]
    try:
        while stream.tell() < len(data):
            for op, _, at in pickletools.genops(stream):
                starts.append(at or 0)
                if op.code == "." and data[stream.tell() : stream.tell() + 1] != pickle.PROTO:
                    raise EOFError
    except Exception:  # no instruction: the numbers behind the pickles, or damage
        starts.append(stream.tell())
    ends = [*sorted(set(starts)), len(data)]
    return [data[a:b] for a, b in zip(ends, ends[1:], strict=False)] or [data]


def change_torch(data: bytes, random: Random) -> bytes:
    """PyTorch's zip file, or pickles in a row."""
    return change_zip(data, random) if data[:2] == b"PK" else change_pickle(data, random)


BLOCKS = re.compile(  # signatures of HDF5's structures, and the beginnings of object headers, which have none
    rb"\x89HDF|TREE|HEAP|SNOD|OHDR|OCHK|FRHP|FHIB|FHDB|BTHD|BTIN|BTLF|\x01\0.\0\x01\0\0\0", re.DOTALL
)


@lru_cache(64)
def blocks_of(data: bytes) -> list[int]:
    return [found.start() for found in BLOCKS.finditer(data)] or [0]


def change_hdf5(data: bytes, random: Random) -> bytes:
    """One number of a structure: to a near one, to none or all bits, or to the address of another structure."""
    at, width = random.choice(blocks_of(data)) + random.randrange(4, 90), random.choice([1, 1, 2, 4, 8])
    value = int.from_bytes(data[at : at + width], "little")
    near = random.choice([value + 1, value - 1, value * 2, value + 8, value ^ 1 << random.randrange(8 * width)])
    other = random.choice([0, -1, 2**31, 2**63, len(data), at, random.choice(blocks_of(data))])
    value = random.choice([near, near, other]) % 256**width
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def change_objects(data: bytes, random: Random) -> bytes:
    """One object of an HDF5 file, through HDF5 itself, which does not survive all damage: of a valid file only."""
    image = io.BytesIO(data)
    try:
        with h5py.File(image, "r+") as file:
            _change_object(file, random)
    except Exception as error:  # damaged, or HDF5 does not write such a thing
        raise Unfit from error
    return image.getvalue()


def _change_object(file: h5py.File, random: Random) -> None:
    names: list[str] = []
    file.visit(names.append)
    name = random.choice(names)
    other = random.choice(names)
    virtual = h5py.VirtualLayout((2, 2), "f4")
    virtual[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(2, 2))
    kinds: list[dict[str, Any]] = [
        dict(data=np.zeros(random.choice([(), (0,), (1,) * 32, (2, 3), (2**20, 0)]), random.choice(["f2", "f8"]))),
        dict(data=np.zeros(3, random.choice([">f4", "i1", "u8", "c8", "S5", "b1", [("a", "f4")]]))),
        dict(shape=(2**random.randint(1, 40), 2**20), dtype="f4"),
        dict(shape=(10**6, 10**4), dtype="f4", chunks=(100, 100), compression="gzip"),
        dict(shape=(4, 4), dtype="f4", external=[("/etc/passwd", 0, 64)]),
        dict(shape=(3,), dtype=h5py.vlen_dtype(np.float32)),
        dict(shape=(3,), dtype=h5py.string_dtype()),
        dict(data=h5py.Empty("f4")),
    ]  # fmt: skip
    what = random.choice(["dataset"] * 4 + ["link", "hard", "drop", "move", "deep", "many", "attribute", "virtual"])
    if what in ("dataset", "drop", "link", "hard", "virtual"):
        del file[name]
    if what == "dataset":
        file.create_dataset(name, **random.choice(kinds))
    elif what == "virtual":
        file.create_virtual_dataset(name, virtual)
    elif what == "link":
        file[name] = random.choice([h5py.SoftLink(other), h5py.SoftLink(name), h5py.ExternalLink("/etc/passwd", "x")])
    elif what == "hard":
        file[name] = file[other] if other in file else file
    elif what == "move":
        file.move(name, random.choice(["x", "a/b/c/d", "model/\u00e9", "x" * 3000, other + "/y"]))
    elif what == "deep":
        file["/".join("d" * random.choice([5, 15, 16, 17, 300]))] = np.ones(2, np.float32)
    elif what == "many":
        for i in range(random.choice([3, 300])):
            file.create_group(f"many/{i}")
    elif what == "attribute":
        file[name].attrs["dtype"] = random.choice(["bfloat16", "x" * 10**4, np.zeros(9)])


def change_msgpack(data: bytes, random: Random) -> bytes:
    """A length, or the code before it."""
    at, width = random.choice(_codes(data))
    code = random.choice([data[at], data[at], random.randrange(0x80, 0x100), random.randrange(0xC0, 0xE0)])
    length = int.from_bytes(data[at + 1 : at + 1 + width], "big")
    length = random.choice([length, length + 1, length - 1, length * 2, 2**31, 2**32 - 1, 0, random.getrandbits(32)])
    return data[:at] + bytes([code]) + (length % 256**width).to_bytes(width, "big") + data[at + 1 + width :]


def _codes(data: bytes) -> list[tuple[int, int]]:
    """Where the codes of msgpack are, and how many bytes of length follow each, until something is damaged."""
    lengths = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4}
    lengths |= {0xDE: 2, 0xDF: 4, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
    found, at = [], 0
    while at < len(data):
        code, width = data[at], lengths.get(data[at], 0)
        found.append((at, width))
        length = int.from_bytes(data[at + 1 : at + 1 + width], "big")
        at += 1 + width
        if code in (0xC7, 0xC8, 0xC9):
            at += 1  # an array's type; what it packs is scanned too
        elif code in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):
            at += length
        elif 0xA0 <= code <= 0xBF:
            at += code & 0x1F
    return found or [(0, 0)]


def change_ocdbt(data: bytes, random: Random) -> bytes:
    """Bytes, and the names of other files, with a checksum that fits."""
    body = data[:-4]
    places = [i for i in range(len(body) - 2) if body[i : i + 2] == b"d/"]
    if places and random.random() < 0.5:
        at = random.choice(places)
        body = body[:at] + random.choice([b"..", b"//", b"\0\0", b"~/", b"x:", b"./"]) + body[at + 2 :]
    elif body:
        at = random.randrange(len(body))
        body = body[:at] + random.choice([bytes([random.randrange(256)]), b"\xff" * 9]) + body[at + 1 :]
    return body + struct.pack("<L", crc32c(body))


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def change_merges(data: bytes, random: Random) -> bytes:
    """One line of merges.txt."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    new = [
        b"</s> </s>",
        b"<pad> a",
        b"a",
        b"a b c",
        b" a",
        b"a ",
        b"\xff \xfe",
        b"#version: x",
        b"a" * 5000 + b" b",
        b"\r",
    ]
    lines[at : at + random.randint(0, 1)] = random.choice([[], [random.choice(new)], lines[:: random.choice([1, -1])]])
    return b"\n".join(lines)


Change = Callable[[bytes, Random], bytes]
STRUCTURES: dict[str, Change] = {
    ".json": change_json,
    ".zarray": change_json,
    "_METADATA": change_json,
    ".safetensors": change_safetensors,
    ".bin": change_torch,
    ".pt": change_torch,
    ".h5": change_hdf5,
    ".keras": change_zip,
    ".msgpack": change_msgpack,
    "manifest.ocdbt": change_ocdbt,
    "merges.txt": change_merges,
}
FIRST: dict[str, Change] = {".h5": change_objects, ".keras": change_keras}  # of a valid file
WITHIN: dict[str, Change] = {".pkl": change_pickle, ".h5": change_hdf5, ".json": change_json}


def change_of(path: PurePath) -> str:
    """The name to choose a change by: OCDBT's own files have none."""
    return "manifest.ocdbt" if path.parent.name == "d" else path.name
