"""Orbax's checkpoints of opt_flax: read and written as Orbax does it, without JAX, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
import zstandard
from flax import nnx

from framework_files import CONFIGS, random_tensors, refused, same_bits
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.convert import convert, plan
from opt_common.checkpoints.examine import diff
from opt_common.checkpoints.layouts.orbax import ORBAX
from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.tensors import Source
from opt_flax import FlaxOPTForCausalLM, FlaxOPTForSequenceClassification, FlaxOPTModel

# A kind of model changes names, a dtype bytes: neither sees the other, and all pairs are slow.
KINDS_AND_DTYPES = [
    pytest.param(kind, dtype, marks=[] if dtype == "float16" or kind == "350m" else pytest.mark.slow)
    for kind in CONFIGS
    for dtype in ("float32", "float16", "bfloat16")
]


def hub_folder(folder: Path, kind: str, dtype: str) -> tuple[Path, dict[str, np.ndarray]]:
    config, arrays = CONFIGS[kind], random_tensors(CONFIGS[kind], dtype)
    sources = [Source(name, a.shape, dtype, lambda a=a: a) for name, a in arrays.items()]
    save_checkpoint(folder, sources, {"config.json": config.to_json()})
    return folder, arrays


def save(folder: Path, state, **options) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder, state)
    return folder / "_METADATA"


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_reads_what_orbax_wrote(tmp_path, kind, dtype):
    folder, arrays = hub_folder(tmp_path / "hub", kind, dtype)
    model = FlaxOPTForCausalLM.from_pretrained(folder, dtype=dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "own", nnx.state(model))
        checkpointer.save(tmp_path / "pure", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    save(tmp_path / "folders", nnx.state(model), use_ocdbt=False)
    for name in ("own", "pure", "folders"):
        same_bits(ORBAX.read(tmp_path / name / "_METADATA")[1], arrays)
        model.config.save_pretrained(tmp_path / name)
        assert list(diff(tmp_path / name, folder)) == []


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_orbax_reads_what_is_written(tmp_path, kind, dtype):
    folder, _ = hub_folder(tmp_path / "hub", kind, dtype)
    foreseen = dict(plan(folder, tmp_path / "ours", "orbax").files)
    written = convert(folder, tmp_path / "ours", "orbax")
    assert all(file.is_file() for file in written)
    there = {str(p.relative_to(tmp_path / "ours")): p.stat().st_size for p in (tmp_path / "ours").rglob("*")}
    assert {name: size for name, size in there.items() if (tmp_path / "ours" / name).is_file()} == foreseen
    model = FlaxOPTForCausalLM.from_pretrained(folder, dtype=dtype)
    structure, state = nnx.split(model)
    other = nnx.merge(structure, jax.tree.map(jnp.zeros_like, state))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.update(other, checkpointer.restore(tmp_path / "ours", nnx.state(other)))
    same = jax.tree.map(np.array_equal, nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(other)))
    assert jax.tree.all(same)


def test_kernels_are_stored_in_out(tmp_path):
    """Judged by the bytes on disk: flax.nnx.Linear's kernel is [in, out], the Hub's weight [out, in]."""
    folder, arrays = hub_folder(tmp_path / "hub", "350m", "float32")
    convert(folder, tmp_path / "ours", "orbax")
    for name, leaf, stored in [
        ("model.decoder.layers.3.fc1", "kernel", arrays["model.decoder.layers.3.fc1.weight"].T),
        (
            "model.decoder.layers.3.self_attn.q_proj",
            "kernel",
            arrays["model.decoder.layers.3.self_attn.q_proj.weight"].T,
        ),
        ("model.decoder.project_in", "kernel", arrays["model.decoder.project_in.weight"].T),
        ("model.decoder.layers.3.fc1", "bias", arrays["model.decoder.layers.3.fc1.bias"]),
        ("model.decoder.embed_tokens", "embedding", arrays["model.decoder.embed_tokens.weight"]),
    ]:
        array = tmp_path / "ours" / f"{name}.{leaf}.value"
        assert json.loads((array / ".zarray").read_text())["shape"] == list(stored.shape)
        assert (array / ".".join("0" * stored.ndim)).read_bytes() == stored.tobytes()
    same_bits(ORBAX.read(tmp_path / "ours" / "_METADATA")[1], arrays)


def test_a_training_state(tmp_path):
    """Of a whole training's state the model is read: the optimizer's moments lie deeper, by the same names."""
    model = FlaxOPTForCausalLM(CONFIGS["350m"], rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    model.save_pretrained(tmp_path / "hub")
    model.config.save_pretrained(tmp_path)
    states = {
        "pair": nnx.state((model, optimizer)),
        "named": {"model": nnx.state(model), "optimizer": nnx.state(optimizer), "step": np.int64(3)},
    }
    for name, state in states.items():
        main = save(tmp_path / name, state)
        model.config.save_pretrained(main.parent)
        assert list(diff(tmp_path / name, tmp_path / "hub")) == []
    main = save(tmp_path / "two", [nnx.state(model), nnx.state(model)])
    refused(lambda: ORBAX.read(main), main, "holds several models: 0.model., 1.model.")
    main = save(tmp_path / "none", {"step": np.zeros(3)})
    refused(lambda: ORBAX.read(main), main, "holds no array decoder.embed_tokens.embedding")


def test_other_models(tmp_path):
    for kind in (FlaxOPTModel, FlaxOPTForSequenceClassification):
        model = kind(CONFIGS["350m"], rngs=nnx.Rngs(0))
        model.save_pretrained(tmp_path / kind.__name__)
        main = save(tmp_path / f"{kind.__name__}-orbax", nnx.state(model))
        model.config.save_pretrained(main.parent)
        assert list(diff(main.parent, tmp_path / kind.__name__)) == []
        convert(main.parent, tmp_path / f"{kind.__name__}-back", "orbax")
        assert list(diff(tmp_path / f"{kind.__name__}-back", tmp_path / kind.__name__)) == []


def test_chunks(tmp_path):
    """Arrays in pieces, as they are saved from several devices; those at the edges are not full."""
    array = np.random.default_rng(0).standard_normal((10, 7)).astype(np.float16)
    spec = {
        "driver": "zarr", "kvstore": f"file://{tmp_path}/decoder.embed_tokens.embedding/",
        "metadata": {"chunks": [4, 3], "compressor": {"id": "zstd", "level": 1}},
    }  # fmt: skip
    store = tensorstore.open(spec, create=True, dtype="float16", shape=array.shape).result()
    store[...].write(array).result()
    (tmp_path / "_METADATA").write_text("{}")
    same_bits(ORBAX.read(tmp_path / "_METADATA")[1], {"model.decoder.embed_tokens.weight": array})
    (tmp_path / "decoder.embed_tokens.embedding" / "1.2").unlink()
    refused(lambda: ORBAX.read(tmp_path / "_METADATA"), tmp_path, "wanted 9 chunks, some are missing")


def test_takes_no_jax(tmp_path):
    """And for what this project writes itself nothing at all."""
    folder, _ = hub_folder(tmp_path / "hub", "pre-norm", "float16")
    save(tmp_path / "ocdbt", nnx.state(FlaxOPTForCausalLM.from_pretrained(folder, dtype="float16")))
    shutil.copy(folder / "config.json", tmp_path / "ocdbt")
    program = """
        import sys
        from opt_common.checkpoints.convert import convert
        convert(sys.argv[1] + "/hub", sys.argv[1] + "/a", to="orbax")
        convert(sys.argv[1] + "/a", sys.argv[1] + "/b")
        assert not {"tensorstore", "zstandard"} & set(sys.modules)
        convert(sys.argv[1] + "/ocdbt", sys.argv[1] + "/c")
        assert not {"jax", "orbax", "tensorflow", "torch"} & set(sys.modules)
        sys.modules["tensorstore"] = None
        try:
            convert(sys.argv[1] + "/ocdbt", sys.argv[1] + "/d")
        except ImportError as error:
            assert "pip install 'opt-zoo[orbax]'" in str(error), error
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    for name in "bc":
        assert (tmp_path / name / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.fixture
def main(tmp_path) -> Path:
    folder, _ = hub_folder(tmp_path / "hub", "pre-norm", "float16")
    convert(folder, tmp_path / "ours", "orbax")
    return tmp_path / "ours" / "_METADATA"


FC1 = "model.decoder.layers.0.fc1.kernel.value"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("zarr_format", 3, "zarr_format: found 3, wanted 2"),
        ("shape", [1 << 60, 8], "shape: found [1152921504606846976, 8], wanted positive numbers"),
        ("shape", [-16, 8], "wanted positive numbers"),
        ("shape", [True, 8], "wanted positive numbers"),
        ("shape", "16", "wanted positive numbers"),
        ("shape", [1 << 40, 1 << 40], "wanted 9444732965739290427392 chunks, some are missing"),
        ("chunks", [16], "wanted 2 positive numbers"),
        ("chunks", [0, 8], "wanted 2 positive numbers"),
        ("chunks", [1 << 40, 8], "wanted no more than [8, 16]"),
        ("chunks", [1, 1], "wanted 128 chunks, some are missing"),
        ("dtype", "|O", "dtype: found '|O', wanted one of <f2, bfloat16"),
        ("dtype", ["<f4"], "dtype: found ['<f4']"),
        ("dtype", "<f4", "0.0: found 256 bytes, wanted 512"),
        ("order", "F", "order: found 'F', wanted C"),
        ("filters", [{"id": "x"}], "wanted null"),
        ("compressor", {"id": "blosc"}, "wanted null or zstd"),
        ("compressor", 3, "wanted null or zstd"),
        ("dimension_separator", "/", 'wanted "."'),
    ],
)
def test_hostile_headers(main, field, value, said):
    header = main.parent / FC1 / ".zarray"
    header.write_text(json.dumps(json.loads(header.read_text()) | {field: value}))
    refused(lambda: ORBAX.read(main), main, FC1)
    refused(lambda: ORBAX.read(main), main, said)


def test_damaged_records(main):
    header = main.parent / FC1 / ".zarray"
    good = header.read_text()
    header.write_text(good[:20])
    refused(lambda: ORBAX.read(main), main, ".zarray: not readable as JSON")
    header.write_text(good + " " * (1 << 16))
    refused(lambda: ORBAX.read(main), main, "wanted at most 65536")
    header.write_text(json.dumps(json.loads(good) | {"compressor": {"id": "zstd"}}))
    chunk = main.parent / FC1 / "0.0"
    for data, said in (
        (zstandard.compress(bytes(10**8)), "0.0: found more than 256 bytes, wanted 256"),
        (zstandard.compress(bytes(255)), "0.0: found 255 bytes, wanted 256"),
        (b"\x28\xb5\x2f\xfd garbage", "0.0: not readable as zstd"),
    ):
        chunk.write_bytes(data)
        refused(ORBAX.read(main)[1]["model.decoder.layers.0.fc1.weight"].read, main, said)
    chunk.unlink()
    refused(lambda: ORBAX.read(main), main, "wanted 1 chunks, some are missing")


def test_what_says_much_and_holds_little(tmp_path):
    place = tmp_path / "decoder.embed_tokens.embedding"
    place.mkdir()
    (tmp_path / "_METADATA").write_text("{}")
    header = {"zarr_format": 2, "shape": [1 << 30, 64], "chunks": [1 << 30, 64], "dtype": "<f4", "order": "C",
              "filters": None, "compressor": {"id": "zstd"}, "fill_value": None}  # fmt: skip
    (place / ".zarray").write_text(json.dumps(header))
    (place / "0.0").write_bytes(zstandard.compress(bytes(10**6)))
    refused(lambda: ORBAX.read(tmp_path / "_METADATA"), tmp_path, "its arrays claim 274877906944 bytes, its files hold")


def test_zarr_3(tmp_path):
    main = save(tmp_path / "new", nnx.state(FlaxOPTModel(CONFIGS["pre-norm"], rngs=nnx.Rngs(0))), use_zarr3=True)
    refused(lambda: ORBAX.read(main), main, "Zarr version 3, wanted version 2")


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("place", ["../secret/", "/tmp/secret/"])
def test_ocdbt_outside_of_its_folder(tmp_path, place):
    """A manifest may name files; those that lie elsewhere are not opened. Checksums right, as one who means harm would
    have them."""
    secret, folder = tmp_path / "secret", tmp_path / "x"
    there = "d" * len(place)
    spec = {
        "driver": "ocdbt", "base": f"file://{folder}/", "value_data_prefix": f"{there[:-1]}/",
        "config": {"compression": None, "max_inline_value_bytes": 0},
    }  # fmt: skip
    header = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "<f4", "order": "C",
              "filters": None, "compressor": None, "fill_value": None}  # fmt: skip
    store = tensorstore.KvStore.open(spec).result()
    store.write("decoder.embed_tokens.embedding/.zarray", json.dumps(header).encode()).result()
    store.write("decoder.embed_tokens.embedding/0", np.ones(4, "<f4").tobytes()).result()
    (folder / "_METADATA").write_text("{}")
    assert (ORBAX.read(folder / "_METADATA")[1]["model.decoder.embed_tokens.weight"].read() == 1).all()
    shutil.move(folder / there[:-1], secret)
    changed = 0
    for path in [folder / "manifest.ocdbt", *(folder / "d").iterdir()]:
        data = path.read_bytes()
        if f"{there[:-1]}/".encode() in data:
            data = data.replace(f"{there[:-1]}/".encode(), place.encode())
            path.write_bytes(data[:-4] + struct.pack("<L", crc32c(data[:-4])))
            changed += 1
    assert changed
    refused(lambda: ORBAX.read(folder / "_METADATA"), folder, "not readable as OCDBT")


@pytest.mark.parametrize("kept", [0, 3, 20, 0.5, -1])
def test_cut_short(tmp_path, kept):
    folder, _ = hub_folder(tmp_path / "hub", "pre-norm", "float16")
    main = save(tmp_path / "x", nnx.state(FlaxOPTForCausalLM.from_pretrained(folder)))
    manifest = main.parent / "manifest.ocdbt"
    data = manifest.read_bytes()
    manifest.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    refused(lambda: Checkpoint(main.parent), main, "not readable as OCDBT")
