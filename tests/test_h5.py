"""transformers' TensorFlow weights: read and written as transformers does it, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.numpy

from framework_files import CONFIGS, GOLDENS, damaged, random_tensors, refused, same_bits, write
from opt_common.checkpoints.containers import hdf5_headers
from opt_common.checkpoints.containers.hdf5 import create_hdf5, imagine_hdf5, read_hdf5
from opt_common.checkpoints.layouts import tf_h5
from opt_common.checkpoints.layouts.tf_h5 import TF_H5

SCOPE = "model/tfopt_for_causal_lm/model/decoder"


@pytest.fixture
def golden(tmp_path) -> Path:
    """A copy of a file of transformers'."""
    return Path(shutil.copy(GOLDENS / "tf" / "tf_model.h5", tmp_path))


@pytest.mark.parametrize("file", ["tf/tf_model.h5", "tf-sharded/tf_model.h5.index.json"])
def test_reads_what_transformers_wrote(file):
    files, entries = TF_H5.read(GOLDENS / file)
    same_bits(entries, safetensors.numpy.load_file(GOLDENS / "torch" / "model.safetensors"))
    assert len(files) == (1 if file.startswith("tf/") else 3)


def test_reads_without_hdf5(golden, monkeypatch):
    """Its library, which some files crash, is not even loaded."""
    monkeypatch.setitem(sys.modules, "h5py", None)
    _, entries = TF_H5.read(golden)
    same_bits(entries, safetensors.numpy.load_file(GOLDENS / "torch" / "model.safetensors"))
    with pytest.raises(ImportError, match="h5py"), create_hdf5(golden):  # the test can see it
        pass


def test_the_names_of_2022(golden):
    """Another scope, and the position table as `weight:0`."""
    with h5py.File(golden, "a") as file:
        decoder = file["model/tfopt_for_causal_lm/model/decoder"]
        decoder.move("embed_positions/embeddings:0", "embed_positions/weight:0")
        file["model"].move("tfopt_for_causal_lm", "tfopt_for_causal_lm_12")
    _, entries = TF_H5.read(golden)
    same_bits(entries, safetensors.numpy.load_file(GOLDENS / "torch" / "model.safetensors"))


def texts(names) -> list[str]:
    return [name if isinstance(name, str) else name.decode() for name in names]


def contents(path: Path) -> dict:
    """Every name in an HDF5 file, with type, shape, values and attributes."""
    found = {}

    def see(name, item):
        value = (item.shape, item.dtype, item[()].tobytes()) if isinstance(item, h5py.Dataset) else None
        found[name] = (value, {key: sorted(texts(value)) for key, value in item.attrs.items() if "names" in key})

    with h5py.File(path) as file:
        file.visititems(see)
        see("", file)
    return found


@pytest.mark.parametrize("limit", [10**9, 3000])
def test_writes_what_transformers_writes(tmp_path, limit):
    arrays = safetensors.numpy.load_file(GOLDENS / "torch" / "model.safetensors")
    main = write(TF_H5, tmp_path, arrays, None, limit)
    if limit > 3000:
        assert contents(main) == contents(GOLDENS / "tf" / "tf_model.h5")
        return
    ours, theirs = ({}, {})
    for into, folder in ((ours, tmp_path), (theirs, GOLDENS / "tf-sharded")):
        for path in folder.glob("tf_model-*.h5"):
            with h5py.File(path) as file:
                into |= {name: np.asarray(file[name]) for name in texts(file.attrs["layer_names"])}
        into["index"] = sorted(json.loads((folder / "tf_model.h5.index.json").read_text())["weight_map"])
    assert ours.keys() == theirs.keys() and ours["index"] == theirs["index"]
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("limit", [10**9, 2000])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("config", ["pre-norm", "350m", "no-bias", "removed-final-norm"])
def test_back_and_forth(tmp_path, config, dtype, limit):
    arrays = random_tensors(CONFIGS[config], dtype)
    _, entries = TF_H5.read(write(TF_H5, tmp_path, arrays, CONFIGS[config], limit))
    same_bits(entries, arrays)


def test_many_names(tmp_path, monkeypatch):
    """Lists of names too long for one attribute are spread, as Keras does it."""
    monkeypatch.setattr(tf_h5, "_ATTRIBUTE", 1000)
    with h5py.File(write(TF_H5, tmp_path, random_tensors(CONFIGS["pre-norm"], "float16"), None)) as file:
        attributes = dict(file["model"].attrs)
        names = [name for i in range(len(attributes)) for name in attributes[f"weight_names{i}"]]
        assert len(attributes) > 1 and len(names) == 11 * 16 + 4
        assert all(name in file["model"] for name in texts(names))


def test_a_file_in_memory(tmp_path, rng):
    """Is to HDF5 what a file on disk is, and takes no memory where nothing is written."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("a/b", data=small)
        file.create_dataset("large", (4 * 10**11,), "u1")[10**11] = 7
        for i in range(2000):
            file.create_dataset(f"{i}/kernel:0", (8,), "f4")[0] = i

    small = rng.standard_normal((300, 5))
    with create_hdf5(tmp_path / "x.h5") as on_disk, imagine_hdf5() as (file, memory):
        fill(on_disk)
        fill(file)
    assert memory.size == (tmp_path / "x.h5").stat().st_size > 4 * 10**11
    assert sum(map(len, memory.pages.values())) < 4_000_000
    with h5py.File(memory) as file:
        np.testing.assert_array_equal(file["a/b"], small)
        assert (file["large"][10**11], file["large"][10**11 - 1], file["1999/kernel:0"][0]) == (7, 0, 1999)


def test_bare_model(tmp_path):
    """TFOPTModel's files have the same names."""
    _, entries = TF_H5.read(write(TF_H5, tmp_path, random_tensors(CONFIGS["350m"], "float16", "OPTModel"), None))
    same_bits(entries, random_tensors(CONFIGS["350m"], "float16"))


@pytest.mark.parametrize(
    ("config", "dtype", "part"), [("untied", "float16", "lm_head"), ("350m", "bfloat16", "bfloat16")]
)
def test_what_tensorflow_cannot_hold(tmp_path, config, dtype, part):
    with pytest.raises(ValueError, match=part):
        write(TF_H5, tmp_path, random_tensors(CONFIGS[config], dtype), None)
    assert not list(tmp_path.iterdir())


def test_unknown_names_are_kept_for_the_check(golden):
    with h5py.File(golden, "a") as file:
        file["model/optimizer/iter:0"] = np.int64(3)
    assert "model/optimizer/iter:0" in TF_H5.read(golden)[1]


def remake(path: Path, **how) -> None:
    """Put the token embedding into the file in another way."""
    name = f"{SCOPE}/embed_tokens/weight:0"
    with h5py.File(path, "a") as file:
        values = file[name][()]
        del file[name]
        layout = how.pop("layout", None)
        if layout is not None:
            file.create_virtual_dataset(name, layout)
        elif "link" in how:
            file[name] = how["link"]
        else:
            file.create_dataset(name, **({"data": values} | how))


def hostile(kind: str, path: Path) -> None:
    other = path.with_name("other.h5")
    with h5py.File(other, "w") as file:
        file["secret"] = np.ones((24, 4), np.float32)
    virtual = h5py.VirtualLayout((24, 4), "f4")
    virtual[:] = h5py.VirtualSource(str(other), "secret", shape=(24, 4))
    ways = {
        "external link": dict(link=h5py.ExternalLink(str(other), "secret")),
        "soft link": dict(link=h5py.SoftLink(f"/{SCOPE}/embed_positions/embeddings:0")),
        "link to nothing": dict(link=h5py.SoftLink("/nowhere")),
        "virtual": dict(layout=virtual),
        "external storage": dict(data=None, shape=(24, 4), dtype="f4", external=[("/etc/passwd", 0, 384)]),
        "bomb": dict(data=None, shape=(10**7, 10**5), dtype="f4", chunks=(100, 100), compression="gzip"),
        "huge": dict(data=None, shape=(10**7, 10**5), dtype="f4"),
        "compressed": dict(chunks=True, compression="gzip"),
        "text": dict(data=["a", "b"]),
        "compound": dict(data=np.zeros(3, [("a", "f4"), ("b", "i4")])),
        "ragged": dict(data=None, shape=(3,), dtype=h5py.vlen_dtype(np.float32)),
        "reference": dict(data=None, shape=(3,), dtype=h5py.ref_dtype),
        "big-endian": dict(data=np.zeros((24, 4), ">f4")),
        "no shape": dict(data=h5py.Empty("f4")),
    }
    remake(path, **ways[kind])


@pytest.mark.parametrize(
    "kind",
    ["external link", "soft link", "link to nothing", "virtual", "external storage", "bomb", "huge", "compressed"]
    + ["text", "compound", "ragged", "reference", "big-endian", "no shape"],
)
def test_hostile_datasets(golden, kind):
    hostile(kind, golden)
    refused(lambda: TF_H5.read(golden), golden, "embed_tokens/weight:0")


def test_hostile_groups(golden):
    with h5py.File(golden, "a") as file:
        file[f"{SCOPE}/embed_tokens/again"] = file["model"]  # a loop
    refused(lambda: TF_H5.read(golden), golden, "under another name too")
    shutil.copy(GOLDENS / "tf" / "tf_model.h5", golden)
    with h5py.File(golden, "a") as file:
        file["model/twice"] = file[f"{SCOPE}/embed_tokens/weight:0"]
    refused(lambda: TF_H5.read(golden), golden, "under another name too")
    shutil.copy(GOLDENS / "tf" / "tf_model.h5", golden)
    with h5py.File(golden, "a") as file:
        file["/".join("d" * 40)] = np.ones(2, np.float32)
    refused(lambda: TF_H5.read(golden), golden, "16 groups deep")
    shutil.copy(GOLDENS / "tf" / "tf_model.h5", golden)
    with h5py.File(golden, "a") as file:
        file["model/other_scope/model/decoder/embed_tokens/weight:0"] = np.ones((24, 4), np.float32)
    refused(lambda: TF_H5.read(golden), golden, "model.decoder.embed_tokens.weight twice")


def fill(file: h5py.File, links: int, characters: int) -> None:
    """A group of so many datasets, with names of up to so many characters, and one of everything else that is read."""
    for i in range(links):
        file[f"many/{'x' * (i % characters)}{i}"] = np.full((i % 3, 2), i, "f4") if i % 3 else np.float64(i)
    for dtype in ("f2", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "V2"):
        file[f"model/decoder/{dtype}"] = np.arange(6, dtype="u8").astype(dtype if dtype != "V2" else "u2").view(dtype)
    file.create_group("empty/group")
    for group in (file, file["model"], file["model/decoder/f2"]):
        group.attrs["name"] = "a text of the global heap"
        for i in range(links % 20):  # in the header, and, from nine on, elsewhere
            group.attrs[f"weight_names{i}"] = np.array([b"a" * 500] * 100)


@pytest.mark.parametrize("links", [2, 9, 1500])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("version", ["earliest", "v108", "latest"])
def test_reads_what_hdf5_reads(tmp_path, version, ordered, links):
    """Groups in all of HDF5's ways: in their header, in B-trees of one and of several levels and both kinds of heap."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver=version, track_order=ordered) as file:
        fill(file, links, 70)
    found = {name: (entry.shape, entry.read().tobytes()) for name, entry in read_hdf5(path).items()}
    with h5py.File(path) as file:
        names: list[str] = []
        file.visit(names.append)
        items = {name: file[name] for name in names}
        wanted = {name: (d.shape, d[()].tobytes()) for name, d in items.items() if isinstance(d, h5py.Dataset)}
    assert found == wanted and len(found) == links + 11
    # a part of another file
    path.write_bytes(b"before" + path.read_bytes() + b"behind")
    again = read_hdf5(path, 6, path.stat().st_size - 12)
    assert {name: (entry.shape, entry.map().tobytes()) for name, entry in again.items()} == wanted


def test_checksums(tmp_path):
    """A header that says something else than was written, where HDF5 keeps checksums, is never taken."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for i in range(1500):
            file[f"w{i}"] = np.zeros(2, "f4")
        for i in range(8):  # more than the first block of a header holds
            file["w1"].attrs[str(i)] = "x" * 100
    data = bytearray(path.read_bytes())
    for signature in (b"\x89HDF", b"OHDR", b"OCHK", b"FRHP", b"FHIB", b"FHDB", b"BTHD", b"BTIN", b"BTLF"):
        at = data.rindex(signature)
        data[at + 20] ^= 1
        path.write_bytes(data)
        refused(lambda: read_hdf5(path), path, "checksum of")
        data[at + 20] ^= 1


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (16, lambda at, end: (at, 24), "found more headers than"),  # a header that goes on with itself
        (16, lambda at, end: (end, 1), "wanted 1 bytes"),
        (17, lambda at, end: (at, at), "local heap at byte .*: found .*, wanted .b'HEAP', 0"),
        (17, lambda at, end: (2**64 - 1, 2**64 - 1), "found the end at byte"),
    ],
)
def test_headers_that_lead_astray(golden, kind, data, message):
    file = bytearray(golden.read_bytes())
    (root,) = struct.unpack_from("<Q", file, 64)
    at = file.index(struct.pack("<2H", 17, 16), root)  # the message that says where the root's links are
    struct.pack_into("<2H4x2Q", file, at, kind, 16, *data(at, len(file)))
    golden.write_bytes(file)
    with pytest.raises(ValueError, match=f"{golden}: not readable as HDF5 weights: .*{message}"):
        TF_H5.read(golden)


def test_bounds_of_headers(tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    for version in ("earliest", "latest"):
        with h5py.File(path, "w", libver=version) as file:
            file["n" * 1025] = np.ones(2, "f4")
        refused(lambda: read_hdf5(path), path, "no name of at most 1024")
        with h5py.File(path, "w", libver=version) as file:
            file["w"] = np.ones(2, "f4")
            for i in range(5):
                file["w"].attrs[str(i)] = np.bytes_("x" * 1000)
        assert list(read_hdf5(path)) == ["w"]
        with monkeypatch.context() as patch:
            patch.setattr(hdf5_headers, "_HEADERS", 5000)
            refused(lambda: read_hdf5(path), path, "found more headers than")


def test_very_many_groups(tmp_path):
    """They take time, however little each holds."""
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w", libver="latest") as file:
        for i in range(hdf5_headers._OBJECTS + 1):
            file.create_group(str(i))
    refused(lambda: TF_H5.read(path), path, "holds more than 10000 groups and datasets")


def test_an_offset_past_the_end(golden):
    """The table's own bytes cut off: found from the headers, before anything is read."""
    golden.write_bytes(golden.read_bytes()[:-16])
    refused(lambda: TF_H5.read(golden), golden, "")
    golden.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(lambda: TF_H5.read(golden), golden, "HDF5")


def test_index(tmp_path):
    shutil.copytree(GOLDENS / "tf-sharded", tmp_path, dirs_exist_ok=True)
    main = tmp_path / "tf_model.h5.index.json"
    index = json.loads(main.read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "tf_model-00003-of-00003.h5"
    main.write_text(json.dumps(index))
    refused(lambda: TF_H5.read(main), tmp_path, "embed_positions")
    index["weight_map"][name.replace("causal_lm/", "causal_lm_1/")] = index["weight_map"][name]
    main.write_text(json.dumps(index))
    refused(lambda: TF_H5.read(main), main, "twice")


@pytest.mark.parametrize("seeds", range(4))
def test_damaged(golden, seeds):
    """It is read, or refused as a ValueError that names the file; and what is read lies in the file."""
    good = golden.read_bytes()
    for seed in range(seeds * 100, seeds * 100 + 100):
        golden.write_bytes(damaged(good, seed))
        try:
            entries = read_hdf5(golden)
        except ValueError as error:
            assert str(golden) in str(error)
        else:
            assert all(entry.read().nbytes == entry.nbytes <= len(good) for entry in entries.values())
