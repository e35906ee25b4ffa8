"""transformers' Flax weights: read and written as flax does it, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import msgpack
import numpy as np
import pytest
import safetensors.numpy

from framework_files import CONFIGS, GOLDENS, damaged, random_tensors, refused, same_bits, write
from opt_common.checkpoints.containers import msgpack as container
from opt_common.checkpoints.layouts.flax_msgpack import FLAX_MSGPACK
from opt_common.checkpoints.tensors import Source


@pytest.fixture
def flax():
    return pytest.importorskip("flax.serialization", reason="flax not installed")


def array(shape=(2,), dtype="float32", data=b"\0" * 8, kind: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(kind, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize("file", ["flax/flax_model.msgpack", "flax-sharded/flax_model.msgpack.index.json"])
def test_reads_what_transformers_wrote(file):
    files, entries = FLAX_MSGPACK.read(GOLDENS / file)
    same_bits(entries, safetensors.numpy.load_file(GOLDENS / "torch" / "model.safetensors"))
    assert len(files) == (1 if file.startswith("flax/") else 2)


def test_the_index_that_transformers_writes(tmp_path):
    arrays = safetensors.numpy.load_file(GOLDENS / "torch" / "model.safetensors")
    ours = json.loads(write(FLAX_MSGPACK, tmp_path, arrays, None, 3000).read_text())
    theirs = json.loads((GOLDENS / "flax-sharded" / "flax_model.msgpack.index.json").read_text())
    assert ours["weight_map"].keys() == theirs["weight_map"].keys() and ours["metadata"] == theirs["metadata"]


@pytest.mark.parametrize("limit", [10**9, 2000])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("config", list(CONFIGS))
def test_back_and_forth(tmp_path, config, dtype, limit):
    arrays = random_tensors(CONFIGS[config], dtype)
    _, entries = FLAX_MSGPACK.read(write(FLAX_MSGPACK, tmp_path, arrays, CONFIGS[config], limit))
    same_bits(entries, arrays)


def test_bare_model(tmp_path):
    """FlaxOPTModel saves without the outer `model`."""
    arrays = random_tensors(CONFIGS["350m"], "float16", "OPTModel")
    main = write(FLAX_MSGPACK, tmp_path, arrays, None)
    assert list(msgpack.unpackb(main.read_bytes())) == ["decoder"]
    same_bits(FLAX_MSGPACK.read(main)[1], arrays)


@pytest.mark.parametrize("chunk", [2**30, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_same_bytes_as_flax(tmp_path, monkeypatch, flax, dtype, chunk):
    """What flax makes of our file is our file; arrays above the limit of one piece too."""
    monkeypatch.setattr(container, "_CHUNK", chunk)
    monkeypatch.setattr(flax, "MAX_CHUNK_SIZE", chunk)
    arrays = random_tensors(CONFIGS["untied"], dtype)
    main = write(FLAX_MSGPACK, tmp_path, arrays, None)
    tensors = [Source(name, a.shape, dtype, lambda a=a: a) for name, a in arrays.items()]
    assert FLAX_MSGPACK.plan(tensors, None, 10**9) == [(main.name, main.stat().st_size)]
    tree = flax.msgpack_restore(main.read_bytes())
    kernel = tree["model"]["decoder"]["layers"]["10"]["fc1"]["kernel"]
    assert kernel.tobytes() == arrays["model.decoder.layers.10.fc1.weight"].T.tobytes()
    assert flax.msgpack_serialize(tree, in_place=True) == main.read_bytes()
    same_bits(FLAX_MSGPACK.read(main)[1], arrays)


def test_unknown_names_are_kept_for_the_check(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(msgpack.packb({"model": {"decoder": {"layers": {"0": {"fc3": {"kernel": array()}}}}}}))
    assert list(FLAX_MSGPACK.read(path)[1]) == ["model/decoder/layers/0/fc3/kernel"]


def test_a_dtype_that_is_no_float_says_so(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(msgpack.packb({"a": array(dtype="int32")}))
    refused(lambda: FLAX_MSGPACK.read(path), path, "int32")


NOT_A_NUMBER_FROM_0 = {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"1": array()}}
HOSTILE = {
    "empty": (b"", "ends here"),
    "no map": (msgpack.packb([1]), "wanted a map"),
    "a number": (msgpack.packb(5), "wanted one map"),
    "something after it": (msgpack.packb({"a": array()}) + b"\0", "nothing after it"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "wanted one map"),
    "more entries than bytes": (b"\xdf\xff\xff\xff\xff\xa1a", "ends here"),
    "a longer name than the file": (b"\x81\xd9\xffabc", "255 bytes wanted"),
    "a name of 4 GB": (b"\x81\xdb\xff\xff\xff\xff", "wanted a name"),
    "a name that is bytes": (msgpack.packb({b"a": 1}), "wanted a name"),
    "a name that is a number": (msgpack.packb({1: 1}), "wanted a name"),
    "a name that is not UTF-8": (b"\x81\xa2\xff\xfe\x01", "not UTF-8"),
    "the same name twice": (b"\x82" + 2 * (b"\xa1a" + msgpack.packb(array())), "'a' twice"),
    "the same path twice": (msgpack.packb({"a": {"b": array()}, "a/b": array()}), "a/b twice"),
    "deep": (b"\x81\xa1a" * 10**5, "nested more than 16 deep"),
    "many": (b"\xde\xff\xff" + b"".join(b"\xa5%05d\x80" % i for i in range(2**16 - 1)) * 2, "nothing after it"),
    "too many": (b"\xdf\0\x02\0\0" + b"".join(b"\xa6%06d\x80" % i for i in range(2**17)), "more than 65536 names"),
    "text": (msgpack.packb({"a": "text"}), "a: found code"),
    "a list": (msgpack.packb({"a": [1, 2]}), "a: found code"),
    "a bare number": (msgpack.packb({"a": 3}), "a: found 3"),
    "a scalar": (msgpack.packb({"a": array((), kind=3)}), "type 3"),
    "a complex number": (msgpack.packb({"a": msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))}), "type 2"),
    "an array of objects": (msgpack.packb({"a": array(dtype="object")}), "object"),
    "an unknown dtype": (msgpack.packb({"a": array(dtype="../x")}), "../x"),
    "fewer bytes than its shape": (msgpack.packb({"a": array((3,))}), "8 bytes for float32[3]"),
    "more bytes than its shape": (msgpack.packb({"a": array((1,))}), "8 bytes for float32[1]"),
    "an astronomic shape": (msgpack.packb({"a": array((2**63, 2**63))}), "8 bytes for float32"),
    "a negative shape": (msgpack.packb({"a": array((-2, -1))}), "None"),
    "an array past the end": (b"\x81\xa1a" + struct.pack(">BIb", 0xC9, 2**31, 1) + b"\x93\x91\x02", "ends here"),
    "an array longer than its frame": (b"\x81\xa1a\xc7\x05\x01" + array().data, "8 bytes"),
    "pieces not from 0": (msgpack.packb({"a": NOT_A_NUMBER_FROM_0}), "a: found an array in pieces"),
    "pieces of another size": (
        msgpack.packb({"a": NOT_A_NUMBER_FROM_0 | {"chunks": {"0": array(), "1": array()}}}),
        "do not add up",
    ),
    "no pieces": (msgpack.packb({"a": {"__msgpack_chunked_array__": True}}), "a: found an array in pieces"),
    "a shape of pieces": (msgpack.packb({"a": NOT_A_NUMBER_FROM_0 | {"shape": {"0": array()}}}), "whose shape"),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_hostile(tmp_path, kind):
    path, (data, part) = tmp_path / "flax_model.msgpack", HOSTILE[kind]
    path.write_bytes(data)
    refused(lambda: FLAX_MSGPACK.read(path), path, part)


def test_a_file_that_shrinks(tmp_path):
    """Its tensors are no longer where the headers said."""
    path = Path(shutil.copy(GOLDENS / "flax" / "flax_model.msgpack", tmp_path))
    entries = FLAX_MSGPACK.read(path)[1]
    path.write_bytes(path.read_bytes()[:100])
    refused(entries["model.decoder.project_in.weight"].read, path, "ends at")


@pytest.mark.parametrize("seeds", range(4))
def test_damaged(tmp_path, seeds):
    """It is read, or refused as a ValueError that names the file; and what is read lies in the file."""
    good = (GOLDENS / "flax" / "flax_model.msgpack").read_bytes()
    path = tmp_path / "flax_model.msgpack"
    for seed in range(seeds * 250, seeds * 250 + 250):
        path.write_bytes(damaged(good, seed))
        try:
            entries = FLAX_MSGPACK.read(path)[1]
        except ValueError as error:
            assert str(path) in str(error)
        else:
            for entry in entries.values():
                assert entry.read().nbytes == np.prod(entry.shape) * entry.read().itemsize <= len(good)
