"""Reads what `torch.save` wrote, without PyTorch: plain data, and tensors that are read on demand.

A pickle is a program. This interpreter runs it and calls nothing: a class or function is only a name (`Global`), the
few that make tensors are implemented here, an object of another class becomes its name, arguments and state (`Named`),
and a name outside a fixed list is an error. So a pickle can do no more than what this module does.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...files import naming
from ..tensors import Entry, fill, map_bytes, numpy_dtype, read_part
from .zips import Records, shown

# A pickle holds names and shapes: that of OPT-175b in one file is 300 kB and 50 thousand steps.
_PICKLE_BYTES, _STEPS = 1 << 26, 500_000
# What an instruction of one byte makes takes up to 170 bytes, so a file may ask for some times its size, most of which
# is numbers if it holds weights; and for half a megabyte, as tensors of one number take more than they fill.
_GROWTH, _FREE = 8, 1 << 19
_COST: dict[bytes, int] = {
    **dict.fromkeys((
        pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_DICT, pickle.DICT, pickle.MARK, pickle.MEMOIZE, pickle.BINPUT,
        pickle.LONG_BINPUT, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    ), 80),
    **dict.fromkeys((
        pickle.EMPTY_SET, pickle.FROZENSET, pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.GLOBAL,
        pickle.STACK_GLOBAL, pickle.BINPERSID,
    ), 170),
}  # fmt: skip
_NAME = 200  # bytes of a class's name
_PLACE, _OBJECT, _PAIR = 16, 48, 100  # on the stack; a number or an empty string; of a dict

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "UntypedStorage": "uint8", "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip
_DTYPES = {f"torch.{name}": name for name in STORAGES.values()} | {
    f"torch.{name}": name
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}

_REBUILD = "torch._utils._rebuild_"
_NAMES = {
    *_DTYPES,
    *(f"{module}.{name}" for module in ("torch", "torch.cuda", "torch.storage") for name in STORAGES),
    *(_REBUILD + kind for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")),
    "torch._tensor._rebuild_from_type_v2", "torch.Size", "torch.Tensor", "torch.device",
    "torch.nn.parameter.Parameter",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "str",
        "tuple", "unicode", "long",
    )),
    *(f"collections.{name}" for name in ("Counter", "OrderedDict", "defaultdict", "deque")),
    "_codecs.encode", "argparse.Namespace", "copy_reg._reconstructor", "copyreg._reconstructor", "typing.Any",
    "datetime.date", "datetime.datetime", "datetime.timedelta",
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in (  # the second in Python 3.13
        "Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath",
    )),
    "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
}  # fmt: skip
# Packages whose objects appear in the configs of metaseq's checkpoints, any name of theirs.
_PACKAGES = ("omegaconf.", "metaseq.", "fairseq.", "fairscale.")


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function, module first."""

    name: str


@dataclass(eq=False, slots=True)
class Named:
    """An object that was not created: the name of its class, the arguments of its constructor, and its state."""

    name: str
    args: tuple[Any, ...]
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Storage:
    """The memory behind tensors: `numel` numbers from byte `start` of the file."""

    dtype: str
    numel: int
    start: int


@dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A tensor in a file, not read yet. `offset` and `stride` count elements in its storage."""

    path: Path
    dtype: str
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return self.numel == 0
            step *= size
        return True

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows `start` to `stop`."""
        offset = self.offset + start * self.stride[0]
        return Tensor(self.path, self.dtype, self.storage, offset, (stop - start, *self.shape[1:]), self.stride)

    def fill(self, out: np.ndarray) -> None:
        """Read it into `out`, which has its shape and dtype."""
        if not (self.contiguous and out.flags.c_contiguous):
            out[...] = self.map()
            return
        fill(self.path, self._start, out)

    def read(self) -> np.ndarray:
        """A new array."""
        out = np.empty(self.shape, numpy_dtype(self.dtype))
        self.fill(out)
        return out

    def map(self) -> np.ndarray:
        """An array that may be a view of a map of the file."""
        dtype = numpy_dtype(self.dtype)
        if self.contiguous:
            return map_bytes(self.path, self._start, self.numel * dtype.itemsize).view(dtype).reshape(self.shape)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        flat = map_bytes(self.path, self._start, span * dtype.itemsize).view(dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [s * dtype.itemsize for s in self.stride])

    def entry(self) -> Entry:
        cut = partial(read_part, self.path, self._start, self.shape, self.dtype) if self.contiguous else None
        return Entry(self.shape, self.dtype, self.path, self.read, self.map, cut)

    @property
    def _start(self) -> int:
        return self.storage.start + self.offset * numpy_dtype(self.dtype).itemsize


def load(path: Path) -> Any:
    """What `torch.save` wrote to `path`, by any release since 0.4: dicts, lists, tuples, strings, numbers, `Tensor`,
    `Global` and `Named`. No tensor is read.

    Raises ValueError that names the file, and what in it is damaged, forbidden, or not plain data.
    """
    try:
        with naming(path), open(path, "rb") as file:
            zipped = file.read(4) == b"PK\3\4"
            file.seek(0)
            return _load_zip(path, file) if zipped else _load_legacy(path, file)
    except ValueError as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: not readable as PyTorch weights: {error}") from error
    except (LookupError, TypeError, struct.error, OverflowError) as error:  # a damaged program misuses its own stack
        raise ValueError(f"{path}: not readable as PyTorch weights: its pickle is damaged: {error}") from error


def _load_zip(path: Path, file: BinaryIO) -> Any:
    records = Records(file)
    mains = [name for name in records.names if name.endswith(b"/data.pkl")]
    if len(mains) != 1:
        raise ValueError(f"found {len(mains)} records called data.pkl, wanted one")
    root = mains[0].removesuffix(b"data.pkl")
    if root + b"constants.pkl" in records.names:
        raise ValueError("it is a TorchScript program, wanted weights")

    if root + b"byteorder" in records.names:
        start, size = records.locate(root + b"byteorder")
        file.seek(start)
        order = file.read(min(size, 16))
        if order != b"little":
            raise ValueError(f"byte order: found {shown(order)}, wanted little")

    storages: dict[str, Storage] = {}

    def persistent(dtype: str, key: str, numel: int, view: Any) -> Storage:
        if key not in storages:
            name = root + b"data/" + key.encode()
            if name not in records.names:
                raise ValueError(f"record {shown(name)}: missing")
            start, size = records.locate(name)
            storages[key] = Storage(dtype, numel, start)
            if size != numel * numpy_dtype(dtype).itemsize:
                raise ValueError(f"record {shown(name)}: found {size} bytes, wanted {numel} of {dtype}")
        if (storages[key].dtype, storages[key].numel) != (dtype, numel):
            raise ValueError(f"storage {key}: {numel} of {dtype}, elsewhere {storages[key].numel} of another")
        return storages[key]

    length = file.seek(0, 2)
    start, size = records.locate(mains[0])
    file.seek(start)
    return _Unpickler(path, io.BytesIO(file.read(min(size, _PICKLE_BYTES))), size, length, persistent).run()


def _load_legacy(path: Path, file: BinaryIO) -> Any:
    """The format before 1.6: five pickles in a row, then the storages, each after its count."""
    length = file.seek(0, 2)
    file.seek(0)

    def forbidden(*_: Any) -> Storage:
        raise ValueError("a storage where none belongs")

    def run(persistent: Callable[..., Storage] = forbidden) -> Any:
        return _Unpickler(path, file, length - file.tell(), length, persistent).run()

    if file.read(1) != pickle.PROTO:
        file.seek(0)
        raise ValueError(f"wanted a zip file or a pickle, found {file.read(16)!r}")
    file.seek(0)
    if run() != 0x1950A86A20F9469CFC6C:
        raise ValueError("wanted PyTorch's magic number at its beginning")
    version, system = run(), run()
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("wanted protocol version 1001 and little-endian numbers")

    storages: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []

    def persistent(dtype: str, key: str, numel: int, view: Any) -> Storage:
        whole = storages.setdefault(key, Storage(dtype, numel, -1))
        if (whole.dtype, whole.numel) != (dtype, numel):
            raise ValueError(f"storage {key}: {numel} of {dtype}, elsewhere {whole.numel} of {whole.dtype}")
        if view is None:
            return whole
        _, offset, size = view
        if type(offset) is not int or type(size) is not int or not 0 <= offset <= offset + size <= numel:
            raise ValueError(f"storage {key}: a view outside of its {numel} numbers")
        views.append((Storage(dtype, size, -1), whole, offset))
        return views[-1][0]

    result, keys = run(persistent), run()
    if type(keys) is not list or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors")
    at = file.tell()
    for key in keys:
        storage = storages[key]
        file.seek(at)
        count = file.read(8)
        size = storage.numel * numpy_dtype(storage.dtype).itemsize
        if len(count) < 8 or struct.unpack("<q", count) != (storage.numel,):
            raise ValueError(f"storage {key}: no count of {storage.numel} at byte {at}: is it cut short?")
        if at + 8 + size > length:
            raise ValueError(f"storage {key}: wanted {size} bytes from byte {at + 8}, the file ends at {length}")
        storage.start = at + 8
        at += 8 + size
    for view, whole, offset in views:
        view.start = whole.start + offset * numpy_dtype(whole.dtype).itemsize
    return result


class _Unpickler:
    """Runs one pickle of at most `size` bytes, from the position of `file` on, of a file of `whole` bytes. `persistent`
    finds a storage."""

    def __init__(self, path: Path, file: BinaryIO, size: int, whole: int, persistent: Callable[..., Storage]) -> None:
        self.path, self.file, self.left, self.persistent = path, file, min(size, _PICKLE_BYTES), persistent
        self.memory = self.allowed = _FREE + _GROWTH * whole
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_STEPS):
            op = self.take(1)
            if op == pickle.STOP:
                return self.stack[-1]
            self.spend(_COST.get(op, _PLACE))
            self.step(op)
        raise ValueError(f"its pickle takes more than {_STEPS} steps")

    def spend(self, size: int) -> None:
        """Count memory that the pickle asks for, before it gets it."""
        self.memory -= size
        if self.memory < 0:
            raise ValueError(f"its pickle asks for more than {self.allowed} bytes of memory, which no weights need")

    def take(self, size: int) -> bytes:
        self.left -= size
        data = self.file.read(size) if self.left >= 0 else b""
        if len(data) != size:
            raise ValueError(f"its pickle is cut short, or larger than {_PICKLE_BYTES} bytes")
        return data

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> bytes:
        """A string after its length."""
        data = self.take(self.number(form))
        self.spend(_OBJECT + 4 * len(data))  # one character of four bytes makes four of each
        return data

    def numeral(self, form: str) -> float:
        """A number that is an object of its own."""
        self.spend(_OBJECT)
        return self.number(form)

    def line(self) -> str:
        line = self.file.readline(_NAME)
        self.left -= len(line)
        if not line.endswith(b"\n"):
            raise ValueError("a name in its pickle does not end")
        return line[:-1].decode()

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def step(self, op: bytes) -> None:
        stack = self.stack
        match op:
            case pickle.BINPUT:
                self.memo[self.number("<B")] = stack[-1]
            case pickle.LONG_BINPUT:
                self.memo[self.number("<L")] = stack[-1]
            case pickle.MEMOIZE:
                self.memo[len(self.memo)] = stack[-1]
            case pickle.BINGET:
                stack.append(self.memo[self.number("<B")])
            case pickle.LONG_BINGET:
                stack.append(self.memo[self.number("<L")])
            case pickle.MARK:
                self.marks.append(stack)
                self.stack = []
            case pickle.BINUNICODE:
                stack.append(self.text("<L").decode("utf-8", "surrogatepass"))
            case pickle.SHORT_BINUNICODE:
                stack.append(self.text("<B").decode("utf-8", "surrogatepass"))
            case pickle.BINUNICODE8:
                stack.append(self.text("<Q").decode("utf-8", "surrogatepass"))
            case pickle.BINSTRING:  # Python 2's str
                stack.append(self.text("<L").decode("latin-1"))
            case pickle.SHORT_BINSTRING:
                stack.append(self.text("<B").decode("latin-1"))
            case pickle.SHORT_BINBYTES:
                stack.append(self.text("<B"))
            case pickle.BINBYTES:
                stack.append(self.text("<L"))
            case pickle.BINBYTES8 | pickle.BYTEARRAY8:
                stack.append(self.text("<Q"))
            case pickle.BININT:
                stack.append(self.numeral("<l"))
            case pickle.BININT1:
                stack.append(self.number("<B"))
            case pickle.BININT2:
                stack.append(self.numeral("<H"))
            case pickle.LONG1:
                size = self.number("<B")
                if size > 16:
                    raise ValueError(f"a number of {size} bytes in its pickle")
                self.spend(_OBJECT)
                stack.append(int.from_bytes(self.take(size), "little", signed=True))
            case pickle.BINFLOAT:
                stack.append(self.numeral(">d"))
            case pickle.NONE:
                stack.append(None)
            case pickle.NEWTRUE:
                stack.append(True)
            case pickle.NEWFALSE:
                stack.append(False)
            case pickle.EMPTY_TUPLE:
                stack.append(())
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.EMPTY_SET:
                stack.append(Named("builtins.set", ()))
            case pickle.TUPLE:
                items = tuple(self.pop_mark())
                self.stack.append(items)
            case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                size = op[0] - pickle.TUPLE1[0] + 1
                if len(stack) < size:
                    raise IndexError("a tuple of more than there is")
                stack[-size:] = [tuple(stack[-size:])]
            case pickle.LIST:
                items = self.pop_mark()
                self.stack.append(items)
            case pickle.FROZENSET:
                items = self.pop_mark()
                self.stack.append(Named("builtins.frozenset", (items,)))
            case pickle.DICT:
                items = self.pop_mark()
                self.stack.append({})
                self.set_items(items)
            case pickle.APPEND:
                item = stack.pop()
                self.add([item])
            case pickle.APPENDS | pickle.ADDITEMS:
                self.add(self.pop_mark())
            case pickle.SETITEM:
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case pickle.SETITEMS:
                self.set_items(self.pop_mark())
            case pickle.POP:
                if stack:
                    stack.pop()
                else:
                    self.pop_mark()
            case pickle.POP_MARK:
                self.pop_mark()
            case pickle.DUP:
                stack.append(stack[-1])
            case pickle.GLOBAL:
                module, name = self.line(), self.line()
                stack.append(_global(module, name))
            case pickle.STACK_GLOBAL:
                name, module = stack.pop(), stack.pop()
                stack.append(_global(module, name))
            case pickle.REDUCE | pickle.NEWOBJ:
                args, function = stack.pop(), stack.pop()
                stack.append(self.call(function, args))
            case pickle.NEWOBJ_EX:
                keywords, args, function = stack.pop(), stack.pop(), stack.pop()
                stack.append(Named(_name(function), _tuple(args), items=[keywords]))
            case pickle.BUILD:
                state = stack.pop()
                if isinstance(stack[-1], Named):
                    stack[-1].state = state
                elif not isinstance(stack[-1], (dict, Tensor)):  # torch's own pickles set attributes of an OrderedDict
                    raise TypeError(f"BUILD on {type(stack[-1]).__name__}")
            case pickle.BINPERSID:
                stack.append(self.storage(stack.pop()))
            case pickle.PROTO:
                version = self.number("<B")
                if not 2 <= version <= 5:
                    raise ValueError(f"its pickle's protocol: found {version}, wanted 2 to 5")
            case pickle.FRAME:
                self.take(8)
            case _:
                known = {code.code: code for code in pickletools.opcodes}.get(op.decode("latin-1"))
                raise ValueError(f"its pickle has the instruction {known.name if known else op!r}; no tensor needs it")

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list and not isinstance(target, Named):
            raise TypeError(f"APPENDS to {type(target).__name__}")
        (target.items if isinstance(target, Named) else target).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Named):
            target.items.extend(items)
        elif type(target) is not dict or len(items) % 2:
            raise TypeError(f"SETITEMS on {type(target).__name__}")
        else:
            self.spend(_PAIR * (len(items) // 2))
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value

    def call(self, function: Any, args: Any) -> Any:
        name, args = _name(function), _tuple(args)
        match name:
            case "collections.OrderedDict" if not args:
                return {}
            case "torch.Size":
                return _tuple(args[0])
            case "torch._tensor._rebuild_from_type_v2":
                inner, _, args, _ = args  # the class and its attributes do not matter
                if _name(inner) == name:
                    raise ValueError(f"{name} of itself")
                return self.call(inner, args)
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                if not isinstance(args[0], Tensor):
                    raise TypeError(f"a parameter of {type(args[0]).__name__}")
                return args[0]
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                if len(args) > 6 and args[6]:
                    raise ValueError("a tensor that is a conjugate or negative view")
                return self.tensor(*args[:4])
            case "torch._utils._rebuild_tensor_v3":
                if len(args) > 7 and args[7]:
                    raise ValueError("a tensor that is a conjugate or negative view")
                return self.tensor(*args[:4], dtype=_DTYPES[_name(args[6])])
        return Named(name, args)

    def tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None = None) -> Tensor:
        if not isinstance(storage, Storage):
            raise TypeError(f"a tensor of {type(storage).__name__}")
        shape, stride = _tuple(shape), _tuple(stride)
        if len(shape) != len(stride) or len(shape) > 32:
            raise ValueError(f"a tensor of {len(shape)} axes with {len(stride)} strides")
        numbers = (offset, *shape, *stride)
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("a tensor whose offset, shape or strides are not whole numbers from 0")
        dtype = dtype or storage.dtype
        there = storage.numel * numpy_dtype(storage.dtype).itemsize // numpy_dtype(dtype).itemsize
        numel = math.prod(shape)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if numel else offset - 1
        # no more numbers than are stored: a stride of 0 could make any number of them
        if last >= there or numel > there or max(numbers) >= 2**63:
            what = f"of shape {_brief(shape)}, strides {_brief(stride)} from {offset}"
            raise ValueError(f"a tensor {what}, which does not fit its storage of {there} numbers")
        return Tensor(self.path, dtype, storage, offset, shape, stride)

    def storage(self, given: Any) -> Storage:
        given = _tuple(given)
        if len(given) not in (5, 6) or given[0] != "storage":
            raise ValueError("a persistent id that is not a storage")
        name, key, numel, view = _name(given[1]), given[2], given[4], given[5] if len(given) == 6 else None
        dtype = STORAGES.get(name.rpartition(".")[2])
        if dtype is None or not name.startswith("torch."):
            raise ValueError(f"a storage of {name}")
        if type(key) is not str or type(numel) is not int or numel < 0:
            raise ValueError("a storage without a name or size")
        return self.persistent(dtype, key, numel, view)


def _global(module: Any, name: Any) -> Global:
    if type(module) is not str or type(name) is not str or len(module) + len(name) > _NAME:
        raise TypeError("a class that is not called by a name")
    full = f"{module}.{name}"
    if full not in _NAMES and not full.startswith(_PACKAGES):
        raise ValueError(f"its pickle names {full[:200]!r}, which is neither a tensor nor plain data; nothing was run")
    return Global(full)


def _name(function: Any) -> str:
    if not isinstance(function, Global):
        raise TypeError(f"a call of {type(function).__name__}")
    return function.name


def _tuple(value: Any) -> tuple[Any, ...]:
    if type(value) is not tuple:  # each use of a list would copy it
        raise TypeError(f"found {type(value).__name__}, wanted a tuple")
    return value


def _key(key: Any) -> Any:
    """A key of a dict. Not any tuple, nor any number: hashing a deeply nested tuple overflows Python's stack, and large
    numbers can be chosen to collide."""
    flat = key if type(key) is tuple and len(key) <= 16 else (key,)
    for k in flat:
        if type(k) not in (str, int, float, bool, bytes, type(None), Global) or (type(k) is int and abs(k) >= 2**60):
            raise TypeError(f"a key that is {type(k).__name__}")
    return key


def _brief(numbers: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, numbers[:6]))}{', ...' if len(numbers) > 6 else ''}]"
