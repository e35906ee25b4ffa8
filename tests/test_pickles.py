"""PyTorch's files, read and written without PyTorch. The judge is PyTorch; and what a file must not do."""

from __future__ import annotations

import argparse
import functools
import io
import os
import pickle
import pickletools
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opt_common.checkpoints.containers import unpickle, zips
from opt_common.checkpoints.layouts.torch import TORCH
from opt_common.checkpoints.tensors import Source, numpy_dtype

BIN = "pytorch_model.bin"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def everything() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
    whole = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
    made = {f"a {dtype}": (x * 9).to(dtype) for dtype in (*floats, *whole)}
    marked = x * 2
    marked.note = "attributes hang on a tensor"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(x * 3)
    parameter.note = "and on a parameter"  # type: ignore[attr-defined]
    return made | {
        "whole": x,
        "same storage": x,
        "transposed": x.t(),
        "rows": x[2:4],
        "columns": x[:, 1:7:2],
        "three axes": x.reshape(2, 3, 8).permute(2, 0, 1),
        "one number": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(x * 4),
        "marked": marked,
        "marked parameter": parameter,
        "buffer": torch.nn.Buffer(x),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_reads_what_torch_writes(zipped, protocol, kind, tmp_path):
    state = kind(everything())
    if zipped:  # newer than the layout before 1.6
        state["uint16"] = torch.arange(5).to(torch.uint16)
        state["float8"] = torch.randn(3, 4).to(torch.float8_e4m3fn)
    if kind is OrderedDict:
        state._metadata = OrderedDict({"": {"version": 1}})  # as state_dict() leaves it
    torch.save(state, tmp_path / BIN, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    judge = torch.load(tmp_path / BIN, weights_only=protocol == 2)  # the judge's own restricted reader knows only 2
    files, entries = TORCH.read(tmp_path / BIN)
    assert files == [tmp_path / BIN]
    assert list(entries) == list(judge)
    for name, entry in entries.items():
        assert entry.shape == tuple(judge[name].shape)
        assert entry.dtype == str(judge[name].dtype).removeprefix("torch.")
        for array in (entry.read(), entry.map()):
            assert (array.shape, array.dtype) == (entry.shape, numpy_dtype(entry.dtype))
            assert array.tobytes() == bits(judge[name]), name
        entry.read()[...] = 0  # a fresh array, not the file
        assert entry.read().tobytes() == bits(judge[name])


def test_reads_without_torch(tmp_path):
    torch.save(everything(), tmp_path / BIN)
    program = f"""
        import sys
        sys.modules["torch"] = None
        from pathlib import Path
        from opt_common.checkpoints.layouts.torch import TORCH
        print(len([entry.read() for entry in TORCH.read(Path({str(tmp_path / BIN)!r}))[1].values()]))
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert ran.stdout.strip() == str(len(everything())), ran.stderr


def test_reads_one_tensor_at_a_time(tmp_path):
    torch.save({f"t{i}": torch.zeros(500_000) for i in range(10)}, tmp_path / BIN)
    tracemalloc.start()
    for entry in TORCH.read(tmp_path / BIN)[1].values():
        entry.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 500_000 * 4


# --- writing ---


def sources(arrays: dict[str, np.ndarray]) -> list[Source]:
    return [Source(name, a.shape, str(a.dtype), lambda a=a: a) for name, a in arrays.items()]


@pytest.mark.parametrize("large", [zipfile.ZIP64_LIMIT, 300, 100])
@pytest.mark.parametrize("limit", [10**9, 400])
def test_torch_reads_what_is_written(limit, large, tmp_path, rng, monkeypatch):
    """`large` is where a zip file's numbers become 64 bits wide."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", large)
    dtypes = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int64, np.uint8]
    arrays = {f"layer.{i}": rng.normal(size=(i + 1, 7)).astype(dtype) for i, dtype in enumerate(dtypes)}
    arrays |= {"none": np.zeros((0, 3), np.float32), "one": np.array(2.5, np.float32)}
    arrays["transposed"] = rng.normal(size=(5, 9)).T
    told: list[int] = []
    names = TORCH.write(tmp_path, sources(arrays), None, limit, told.append)
    assert told == [a.nbytes for a in arrays.values()]
    planned = TORCH.plan(sources(arrays), None, limit)
    assert dict(planned) == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(names) == (1 if limit == 10**9 else len(planned) - 1)
    for mmap in (True, False):
        read: dict[str, torch.Tensor] = {}
        for name in names:
            read |= torch.load(tmp_path / name, weights_only=True, mmap=mmap)
            assert zipfile.ZipFile(tmp_path / name).testzip() is None
        assert list(read) == list(arrays)
        for name, array in arrays.items():
            assert read[name].shape == array.shape
            assert bits(read[name]) == array.tobytes(), name
            assert not mmap or array.size == 0 or read[name].data_ptr() % 64 == 0
    main = tmp_path / (names[0] if len(names) == 1 else TORCH.main[1])
    for name, entry in TORCH.read(main)[1].items():
        assert entry.read().tobytes() == arrays[name].tobytes()


def test_a_source_that_breaks_its_promise_is_named(tmp_path):
    wrong = [Source("a.weight", (2, 3), "float32", lambda: np.zeros((3, 2), np.float32))]
    with pytest.raises(ValueError, match=r"a.weight: found float32\[3, 2\], wanted float32\[2, 3\]"):
        TORCH.write(tmp_path, wrong, None, 100, lambda _: None)


@pytest.mark.parametrize("limit", [10**9, 60_000])
@pytest.mark.parametrize("config", ["pre-norm", "350m", "untied"])
def test_transformers_loads_what_is_written(config, limit, tiny, tmp_path):
    folder, reference = tiny(config)
    shutil.copy(folder / "config.json", tmp_path)
    state = {name: t.detach().half().numpy() for name, t in reference.state_dict().items()}
    if config != "untied":
        del state["lm_head.weight"]
    names = TORCH.write(tmp_path, sources(state), None, limit, lambda _: None)
    assert (len(names) > 1) == (limit == 60_000)
    loaded, info = transformers.OPTForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float16, use_safetensors=False, output_loading_info=True
    )
    assert not any(info.values()), info
    for name, array in state.items():
        assert bits(loaded.state_dict()[name]) == array.tobytes(), name


# --- what a file must not do ---


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


class SetState:
    def __setstate__(self, state: Any) -> None: ...


def zip_file(path: Path, content: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in records.items():
            archive.writestr(f"archive/{name.replace('_', '/')}", data)
    return path


def legacy_file(path: Path, content: bytes) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001, "type_sizes": {}}]
    path.write_bytes(b"".join(pickle.dumps(value, 2) for value in head) + content + pickle.dumps([], 2))
    return path


def calls(marker: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file `marker`, and what of them the error has to name."""
    touch = f"open({marker!r}, 'w').close()"
    dump = functools.partial(pickle.dumps, protocol=2)
    space = argparse.Namespace(model=argparse.Namespace(hook=Call(os.system, f"touch {marker}")))
    byte = marker.encode()
    line = byte + b"'\n"
    return {
        "os.system": (dump({"w": Call(os.system, f"touch {marker}")}), "posix.system"),
        "os.mkdir": (dump({"w": Call(os.mkdir, marker)}), "posix.mkdir"),
        "eval": (dump(Call(eval, touch)), "builtin__.eval"),
        "exec": (dump(Call(exec, touch)), "builtin__.exec"),
        "getattr": (dump(Call(getattr, Path(marker), "touch")), "builtin__.getattr"),
        "import": (dump(Call(__import__, "os")), "builtin__.__import__"),
        "protocol 4": (pickle.dumps(Call(eval, touch), 4), "builtins.eval"),
        "in a Namespace": (dump({"args": space, "model": {}}), "posix.system"),
        "in OmegaConf": (
            b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81}X\4\0\0\0hookcposix\nsystem\nX"
            + struct.pack("<L", len(byte) + 6) + b"touch " + byte + b"\x85Rsb.",
            "posix.system",
        ),
        "as a state": (dump(Call(SetState, state={"x": Call(os.system, f"touch {marker}")})), "test_pickles.SetState"),
        "setstate": (dump(Call(SetState, state={"x": 1})), "test_pickles.SetState"),
        "partial": (dump(functools.partial(os.system, f"touch {marker}")), "functools.partial"),
        "load from bytes": (dump(Call(torch.storage._load_from_bytes, b"x")), "torch.storage._load_from_bytes"),
        "torch.load": (dump(Call(torch.load, marker)), "torch.serialization.load"),
        "jit": (b"\x80\x02ctorch.jit\nload\n.", "torch.jit.load"),
        "numpy": (b"\x80\x02cnumpy.testing._private.utils\nrunstring\n.", "runstring"),
        "dotted": (b"\x80\x04\x8c\x05torch\x8c\x10serialization.os\x93.", "torch.serialization.os"),
        "through a package": (b"\x80\x04\x8c\x08argparse\x8c\x0d_sys.exit.foo\x93.", "argparse._sys"),
        "INST": (b"\x80\x02(S'touch " + line + b"iposix\nsystem\n.", "STRING"),
        "INST alone": (b"\x80\x02(iposix\nsystem\n.", "INST"),
        "OBJ": (b"\x80\x02(cargparse\nNamespace\no.", "OBJ"),
        "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
        "EXT2": (b"\x80\x02\x83\x01\0.", "EXT2"),
        "EXT4": (b"\x80\x02\x84\x01\0\0\0.", "EXT4"),
        "text id": (b"\x80\x02Pstorage\n.", "PERSID"),
        "number id": (b"\x80\x02K\x05Q.", "wanted a tuple"),
        "other id": (b"\x80\x02(X\6\0\0\0modulecargparse\nNamespace\nX\1\0\0\0aX\1\0\0\0btQ.", "persistent id"),
        "id of a class": (b"\x80\x02(X\7\0\0\0storagecargparse\nNamespace\nX\1\0\0\0aX\1\0\0\0bK\1tQ.", "a storage of"),
        "call of a call": (b"\x80\x02cargparse\nNamespace\n)R)R.", "a call of Named"),
        "call of a string": (b"\x80\x02X\1\0\0\0a)R.", "a call of str"),
        "new with keywords": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93)}\x92.", "posix.system"),
    }  # fmt: skip


@pytest.mark.parametrize("case", calls(""))
@pytest.mark.parametrize("container", [zip_file, legacy_file])
def test_nothing_is_ever_called(container, case, tmp_path):
    marker = tmp_path / "called"
    content, named = calls(str(marker))[case]
    path = container(tmp_path / "model.bin", content)
    with pytest.raises(ValueError) as error:
        unpickle.load(path)
    assert not marker.exists()
    assert str(error.value).startswith(f"{path}: ") and named in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_the_calls_are_real(tmp_path):
    """So that the test above would see a reader that calls."""
    for case in ("os.system", "os.mkdir", "eval", "exec", "protocol 4", "in a Namespace"):
        marker = tmp_path / case.replace(" ", "-")
        pickle.loads(calls(str(marker))[case][0])
        assert marker.exists(), case


def test_a_config_is_read_as_data(tmp_path):
    """A Namespace or an OmegaConf object becomes its name and what it holds."""
    space = argparse.Namespace(heads=4, inner=argparse.Namespace(rate=0.5), where=Path("a"), some={1, 2}, c=complex(1))
    torch.save({"args": space, "numpy": np.float32(3), "dtype": torch.float16}, tmp_path / "a.pt")
    read = unpickle.load(tmp_path / "a.pt")
    assert isinstance(read["args"], unpickle.Named)
    assert (read["args"].name, read["args"].state["heads"]) == ("argparse.Namespace", 4)
    assert read["args"].state["inner"].state == {"rate": 0.5}
    assert read["numpy"].name.endswith("multiarray.scalar")
    assert read["dtype"] == unpickle.Global("torch.float16")
    content = b"\x80\x02comegaconf.dictconfig\nDictConfig\n)\x81}X\1\0\0\0aK\1sb."
    config = unpickle.load(zip_file(tmp_path / "b.pt", content))
    assert (config.name, config.state) == ("omegaconf.dictconfig.DictConfig", {"a": 1})


@pytest.mark.parametrize("name", ["pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"])
def test_a_path_is_read_whoever_wrote_it(name, tmp_path):
    """Python 3.13 calls it by another module, and Windows has its own class."""
    module, _, kind = name.rpartition(".")
    content = f"\x80\x02c{module}\n{kind}\n(X\1\0\0\0atR.".encode("latin1")
    assert unpickle.load(zip_file(tmp_path / "a.pt", content)).name == name


# --- damage ---


def tensor_pickle(
    offset: int, shape: tuple[int, ...], stride: tuple[int, ...], numel: int = 10, key: str = "0"
) -> bytes:
    def tuple_of(numbers: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x0a" + n.to_bytes(10, "little", signed=True) for n in numbers) + b"t"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<L", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += tuple_of((numel,))[1:-1] + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + tuple_of((offset,))[1:-1]
    tensor += tuple_of(shape) + tuple_of(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("w") + tensor + b"s."


HUGE = 2**62
BAD_TENSORS = {
    "past the end": (tensor_pickle(0, (11,), (1,)), r"\[11\], strides \[1\] from 0, .* storage of 10 numbers"),
    "offset": (tensor_pickle(8, (3,), (1,)), "storage of 10 numbers"),
    "negative offset": (tensor_pickle(-1, (3,), (1,)), "whole numbers from 0"),
    "negative shape": (tensor_pickle(0, (-3, -3), (1, 1)), "whole numbers from 0"),
    "negative stride": (tensor_pickle(9, (3,), (-1,)), "whole numbers from 0"),
    "expanded": (tensor_pickle(0, (1000, 1000, 1000), (0, 0, 0)), "storage of 10 numbers"),
    "overlapping": (tensor_pickle(0, (5, 5), (1, 1)), "storage of 10 numbers"),
    "huge": (tensor_pickle(0, (HUGE, HUGE), (HUGE, HUGE)), "storage of 10 numbers"),
    "huge of nothing": (tensor_pickle(0, (2**70, 0), (1, 1)), "storage of 10 numbers"),
    "strides": (tensor_pickle(0, (2, 2), (2,)), "2 axes with 1 strides"),
    "axes": (tensor_pickle(0, (1,) * 40, (1,) * 40), "40 axes"),
    "larger storage": (tensor_pickle(0, (11,), (1,), numel=11), "record 'archive/data/0': found 40 bytes, wanted 11"),
    "huge storage": (tensor_pickle(0, (HUGE,), (1,), numel=HUGE), "found 40 bytes, wanted 46116860"),
    "negative storage": (tensor_pickle(0, (1,), (1,), numel=-1), "storage without a name or size"),
    "no such record": (tensor_pickle(0, (1,), (1,), key="9"), "record 'archive/data/9': missing"),
    "a record outside": (tensor_pickle(0, (1,), (1,), key="../../x"), "record 'archive/data/../../x': missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit(case, tmp_path):
    content, message = BAD_TENSORS[case]
    path = zip_file(tmp_path / "model.bin", content, data_0=bytes(40))
    with pytest.raises(ValueError, match=message) as error:
        TORCH.read(path)
    assert str(error.value).startswith(f"{path}: ")


def test_the_good_tensor_among_them(tmp_path):
    numbers = np.arange(10, dtype=np.float32).tobytes()
    path = zip_file(tmp_path / "model.bin", tensor_pickle(2, (2, 4), (4, 1)), data_0=numbers, version=b"3")
    assert TORCH.read(path)[1]["w"].read().tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert torch.load(path, weights_only=True)["w"].tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]


def rezip(path: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    records = {name: zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            change(archive, name, data)


def compress(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(name, data, zipfile.ZIP_DEFLATED if "data/" in name else zipfile.ZIP_STORED)


def repeat(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(name, data)
    if name.endswith("data/0"):
        with pytest.warns(UserWarning):
            archive.writestr(name, data)


def script(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(name.replace("byteorder", "constants.pkl"), data)


def big_endian(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(name, b"big" if name.endswith("byteorder") else data)


def patch(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))

    return change


def keep(size: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


BAD_ZIPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "compressed": (lambda path: rezip(path, compress), "record '.*data/0': is compressed"),
    "twice": (lambda path: rezip(path, repeat), "record '.*data/0': appears twice"),
    "big-endian": (lambda path: rezip(path, big_endian), "byte order: found 'big', wanted little"),
    "no pickle": (patch(b"data.pkl", b"data.pki"), "found 0 records called data.pkl"),
    "TorchScript": (lambda path: rezip(path, script), "it is a TorchScript program"),
    "cut": (keep(-1000), "no zip directory at its end"),
    "cut in the end": (keep(-1), "no zip directory at its end"),
    "empty": (keep(0), "wanted a zip file or a pickle"),
    "four bytes": (keep(4), "no zip directory"),
    "directory": (patch(b"PK\1\2", b"PK\1\3"), "zip directory: damaged"),
    "header": (patch(b"PK\3\4", b"PK\3\5"), "wanted a zip file or a pickle"),
    "html": (lambda path: path.write_text("<html>" * 99), "wanted a zip file or a pickle, found b'<html>"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "found b'version https"),
    "another pickle": (lambda path: path.write_bytes(pickle.dumps([1], 2)), "wanted PyTorch's magic number"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "found Tensor, wanted a state_dict"),
    "a number": (lambda path: torch.save({"w": 3}, path), "w: found int, wanted a tensor"),
    "not names": (lambda path: torch.save({3: torch.zeros(3)}, path), "found dict, wanted a state_dict"),
    "a strange name": (lambda path: torch.save({"w\x1b[2J": torch.zeros(3)}, path), "found dict, wanted a state_dict"),
    "sparse": (lambda path: torch.save({"w": torch.eye(3).to_sparse()}, path), "torch._utils._rebuild_sparse_tensor"),
    "meta": (lambda path: torch.save({"w": torch.zeros(3, device="meta")}, path), "_rebuild_meta_tensor_no_storage"),
    "conjugate": (lambda path: torch.save({"w": torch.zeros(3, dtype=torch.complex64).conj()}, path), "conjugate"),
    "expanded": (lambda path: torch.save({"w": torch.zeros(1).expand(99)}, path), "storage of 1 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ZIPS)
def test_damaged_files(case, tmp_path):
    damage, message = BAD_ZIPS[case]
    path = tmp_path / BIN
    torch.save({"w": torch.arange(1000.0)}, path)
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        TORCH.read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_file_cut_after_it_was_opened(tmp_path):
    path = tmp_path / BIN
    torch.save({"w": torch.arange(1000.0)}, path)
    entry = TORCH.read(path)[1]["w"]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="pytorch_model.bin: ends at 2000 bytes"):
        entry.read()


BOMBS = {
    "nesting": b"\x80\x02" + b")" + b"\x85" * 200_000 + b".",
    "the same again": b"\x80\x02N" + b"2" * 300_000 + b".",
    "memos": b"\x80\x04N" + b"\x94" * 300_000 + b".",
    "dicts": b"\x80\x02" + b"}" * 300_000 + b".",
    "frozen sets": b"\x80\x04" + b"(\x91" * 150_000 + b".",
    "objects": b"\x80\x02cbuiltins\nobject\nq\0" + b"h\0)R" * 75_000 + b".",
    "numbers": b"\x80\x02" + b"M\xff\xff" * 100_000 + b".",
    "pairs": b"\x80\x02}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(65_000)) + b"u.",
    "characters": b"\x80\x02" + (b"X\x08\0\0\0" + "\N{OLD ITALIC LETTER A}abcd".encode()) * 25_000 + b".",
    "names": b"\x80\x04X\xa0\x86\1\0omegaconf." + b"a" * 99_990 + b"q\0h\0" + b"h\0h\0\x93" * 50_000 + b".",
    "lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "marks": b"\x80\x02" + b"(" * 200_000 + b".",
    "sets": b"\x80\x04" + b"\x8f" * 1_200_000 + b".",
    "deep key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\1s.",
    "a state of itself": b"\x80\x02cargparse\nNamespace\n)\x81q\0h\0b.",
    "a list of itself": b"\x80\x02]q\0h\0a.",
    "doubling": b"\x80\x02]q\0" + b"(h\0h\0tq\0" * 50_000 + b".",
    "copies": b"\x80\x02ctorch\nSize\nq\1(" + b"K\0" * 100_000 + b"tq\0" + b"h\1h\0\x85R" * 30_000 + b".",
    "keyword copies": b"\x80\x02cargparse\nNamespace\nq\1("
    + b"K\0" * 100_000 + b"tq\0" + b"h\1h\0}\x92" * 30_000 + b".",
    "long string": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc.",
    "long number": b"\x80\x02\x8b" + struct.pack("<L", 2**31 - 1) + b"abc.",
    "long name": b"\x80\x02c" + b"a" * 5_000_000 + b"\nb\n.",
    "memo": b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
    "same hash": b"\x80\x02}(" + b"".join(
        b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(2, 100_000)
    ) + b"u.",
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case, tmp_path):
    """Neither the stack nor memory runs out, nor time, which `_STEPS` bounds: it is plain data, or one sentence."""
    path = zip_file(tmp_path / "model.bin", BOMBS[case])

    def read() -> None:
        try:
            unpickle.load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
            assert len(str(error)) < 500

    tracemalloc.start()
    read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * path.stat().st_size + 1e6


def test_bounds_that_need_large_files(tmp_path, monkeypatch):
    path = tmp_path / BIN
    torch.save({"w": torch.zeros(3)}, path)
    for module, name, message in (
        (zips, "_DIRECTORY_BYTES", "zip directory: [0-9]+ bytes from byte"),
        (unpickle, "_STEPS", "its pickle takes more than 9 steps"),
        (unpickle, "_PICKLE_BYTES", "its pickle is cut short, or larger than 9 bytes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 9)
            with pytest.raises(ValueError, match=f"{path}: .*{message}"):
                unpickle.load(path)
    assert list(unpickle.load(path)) == ["w"]


def test_small_tensors_are_not_taken_for_a_bomb(tmp_path):
    """Tensors of one number, whose names take more memory than the file has bytes, in the oldest format."""
    state = {f"model.decoder.layers.{i}.self_attn_layer_norm.bias": torch.zeros(1) for i in range(400)}
    torch.save(state, tmp_path / BIN, pickle_protocol=4, _use_new_zipfile_serialization=False)
    assert list(TORCH.read(tmp_path / BIN)[1]) == list(state)


@functools.cache
def seeds() -> list[bytes]:
    made = []
    for zipped in (True, False):
        for kind in (dict, OrderedDict):
            state = kind({"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(12.0).reshape(3, 4).t().half()})
            state["args"] = argparse.Namespace(heads=4)
            buffer = io.BytesIO()
            torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
            made.append(buffer.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        arrays = {"a": np.arange(12, dtype=np.float32)}
        TORCH.write(Path(folder), sources(arrays), None, 10**9, lambda _: None)
        made.append((Path(folder) / BIN).read_bytes())
    return made


OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]
EDIT = st.tuples(
    st.sampled_from(["set", "insert", "delete", "cut", "opcode"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 4), edits=st.lists(EDIT, min_size=1, max_size=6))
@example(seed=0, edits=[("cut", 0.5, b"x")])
def test_changed_bytes_are_data_or_one_sentence(tmp_path_factory, seed, edits):
    data = bytearray(seeds()[seed])
    for kind, where, value in edits:
        at = int(where * max(0, len(data) - 1))
        if kind == "set":
            data[at : at + len(value)] = value
        elif kind == "insert":
            data[at:at] = value
        elif kind == "delete":
            del data[at : at + len(value)]
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + 1] = OPCODES[value[0] % len(OPCODES)]
    path = tmp_path_factory.getbasetemp() / "fuzzed.bin"
    path.write_bytes(data)
    try:
        read = unpickle.load(path)
        for value in read.values() if isinstance(read, dict) else []:
            if isinstance(value, unpickle.Tensor):
                assert value.read().nbytes <= len(data)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error), error
