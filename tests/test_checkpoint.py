"""Every way a checkpoint may lie on disk, in all three frameworks; and what is wrong with one, by name."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from backends import Backend, relative_error, skip_what_it_lacks
from conftest import CONFIGS, make_reference, save_reference
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.convert import convert
from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.shards import parse_size
from opt_common.checkpoints.tensors import Source, ahead, map_bytes
from opt_common.config import OPTConfig
from opt_common.frameworks import registered

STATE = "model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A 350m-shaped checkpoint in float16, as transformers writes it."""
    return save_reference(make_reference(**CONFIGS["350m"]), tmp_path_factory.mktemp("plain"), torch.float16)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / STATE)


def write_layout(plain: Path, layout: str, folder: Path) -> Path:
    """The same weights in another of the layouts of the Hub."""
    state = {name: torch.from_numpy(array.copy()) for name, array in tensors(plain).items()}
    model = transformers.OPTForCausalLM.from_pretrained(plain, dtype=torch.float16)
    folder.mkdir(exist_ok=True)
    shutil.copy(plain / "config.json", folder)
    if layout == "safetensors":
        model.save_pretrained(folder)
    elif layout == "sharded":
        model.save_pretrained(folder, max_shard_size="60KB")
    elif layout == "bin-decoder":  # opt-350m, 6.7b, 13b, 30b on the Hub: no "model.", no head
        torch.save({name.removeprefix("model."): t for name, t in state.items()}, folder / "pytorch_model.bin")
    elif layout == "bin-model-head":  # opt-125m, 1.3b, 2.7b, 66b: both
        state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
        torch.save(state, folder / "pytorch_model.bin")
    elif layout == "bin-old-pickle":
        state["decoder.version"] = torch.tensor([3.0])
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif layout == "bin-sharded":
        names, weight_map = list(state), {}
        for i in range(3):
            part = {name: state[name] for name in names[i::3]}
            torch.save(part, folder / f"pytorch_model-{i}.bin")
            weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif layout == "head-only":  # a tied pair of which the other name was kept
        state["lm_head.weight"] = state.pop("model.decoder.embed_tokens.weight")
        safetensors.numpy.save_file({name: t.numpy() for name, t in state.items()}, folder / STATE)
    return folder


LAYOUTS = ["safetensors", "sharded", "bin-decoder", "bin-model-head", "bin-old-pickle", "bin-sharded", "head-only"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(framework, layout, plain, tmp_path, rng):
    """Each loads, agrees with transformers, and saves back bit for bit."""
    folder = write_layout(plain, layout, tmp_path / "given")
    model, ids = Backend(framework, folder), rng.integers(3, 96, (2, 8))
    judge = transformers.OPTForCausalLM.from_pretrained(plain, dtype=torch.float64)
    with torch.no_grad():
        wanted = judge(torch.tensor(ids)).logits.numpy()
    assert relative_error(model(input_ids=ids).logits, wanted) <= 2e-5

    again = tmp_path / "saved"
    Backend(framework, folder, dtype="auto").model.save_pretrained(again)
    saved = tensors(again)
    assert saved.keys() == tensors(plain).keys()
    for name, array in tensors(plain).items():
        assert saved[name].dtype == array.dtype == np.float16
        assert saved[name].tobytes() == array.tobytes(), name


def test_all_write_the_same_bytes(plain, tmp_path):
    written = {}
    for key, framework in registered().items():
        if framework.missing is None:
            Backend(key, plain, dtype="bfloat16").model.save_pretrained(tmp_path / key, max_shard_size="100KB")
            written[key] = {path.name: path.read_bytes() for path in (tmp_path / key).iterdir()}
    first = next(iter(written.values()))
    assert len(first) > 4
    assert all(files == first for files in written.values())


@pytest.mark.parametrize("shards", ["5GB", "60KB"])
@pytest.mark.parametrize("config", ["pre-norm", "350m", "untied", "no-bias", "removed-final-norm"])
def test_transformers_loads_what_we_save(framework, config, shards, tiny, tmp_path):
    folder, reference = tiny(config)
    Backend(framework, folder).model.save_pretrained(tmp_path, max_shard_size=shards)
    loaded, info = transformers.OPTForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].double(), tensor), name


def test_bare_model(framework, tiny, tmp_path, rng):
    """OPTModel reads a checkpoint with a head and writes one without; a CausalLM reads that."""
    folder, reference = tiny("350m")
    described = registered()[framework]
    with skip_what_it_lacks(described):
        model = described.model_class("OPTModel").from_pretrained(folder)
    ids = rng.integers(3, 96, (2, 8))
    out = model(described.tensor(ids)).last_hidden_state
    with torch.no_grad():
        wanted = reference.model(torch.tensor(ids)).last_hidden_state.numpy()
        logits = reference(torch.tensor(ids)).logits.numpy()
    assert relative_error(described.numpy(out), wanted) <= 2e-5
    model.save_pretrained(tmp_path)
    assert all(name.startswith("decoder.") for name in tensors(tmp_path))
    assert relative_error(Backend(framework, tmp_path)(input_ids=ids).logits, logits) <= 2e-5


def test_a_head_that_differs_is_not_tied(framework, plain, tmp_path, rng):
    """As transformers 5: both tensors there and different means untied, whatever the config says."""
    shutil.copy(plain / "config.json", tmp_path)
    state = tensors(plain)
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"][::-1].copy()
    safetensors.numpy.save_file(state, tmp_path / STATE, {"format": "pt"})
    ids = rng.integers(3, 96, (1, 6))
    with torch.no_grad():
        judge = transformers.OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        wanted = judge(torch.tensor(ids)).logits.numpy()
    with pytest.warns(UserWarning, match="lm_head.weight differs"):
        model = Backend(framework, tmp_path)
    assert relative_error(model(input_ids=ids).logits, wanted) <= 2e-5
    assert not model.model.config.tie_word_embeddings


def damaged(plain: Path, folder: Path, change) -> Path:
    shutil.copy(plain / "config.json", folder)
    state = tensors(plain)
    change(state)
    safetensors.numpy.save_file(state, folder / STATE)
    return folder


def test_every_misfit_is_listed(framework, plain, tmp_path):
    def change(state):
        del state["model.decoder.layers.1.fc1.bias"]
        state["model.decoder.layers.0.fc2.weight"] = state["model.decoder.layers.0.fc2.weight"].T.copy()
        state["model.decoder.layers.2.fc1.bias"] = state["model.decoder.layers.2.fc1.bias"].astype(np.int8)
        state["model.decoder.layers.3.fc1.bias"] = np.zeros(3, np.float16)
        state["decoder.embed_tokens.weight"] = state["model.decoder.embed_tokens.weight"]

    with pytest.raises(ValueError) as error:
        Backend(framework, damaged(plain, tmp_path, change))
    text = str(error.value)
    assert text.startswith(f"{tmp_path}: 5 tensor(s)")
    for wanted in (
        "model.decoder.layers.1.fc1.bias: missing, wanted [128]",
        "model.decoder.layers.0.fc2.weight: found shape [128, 64], wanted [64, 128]",
        "model.decoder.layers.2.fc1.bias: found dtype int8, wanted one of float16",
        "model.decoder.layers.3.fc1.bias: unexpected",
        "model.decoder.embed_tokens.weight: appears twice",
    ):
        assert wanted in text


def index_of(folder: Path) -> dict:
    return json.loads((folder / f"{STATE}.index.json").read_text())


def rewrite_index(folder: Path, **changes) -> None:
    index = index_of(folder)
    index["weight_map"] |= changes
    (folder / f"{STATE}.index.json").write_text(json.dumps(index))


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-00001-*"))


BROKEN = {
    "no weights": ("safetensors", lambda f: (f / STATE).unlink(), FileNotFoundError, "no weights; .*config.json"),
    "no config": ("safetensors", lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
    "cut": ("safetensors", lambda f: cut(f / STATE, 9000), ValueError, f"{STATE}: not a readable safetensors"),
    "empty": ("safetensors", lambda f: cut(f / STATE, 0), ValueError, f"{STATE}: not a readable safetensors"),
    "html": ("safetensors", lambda f: (f / STATE).write_text("<html>" * 99), ValueError, f"{STATE}: not a readable"),
    "lost shard": ("sharded", lambda f: first_shard(f).unlink(), FileNotFoundError, "missing shards: model-00001-of-"),
    "outside": ("sharded", lambda f: rewrite_index(f, x="../a.safetensors"), ValueError, "outside the folder: '../a"),
    "absolute": ("sharded", lambda f: rewrite_index(f, x="/etc/passwd"), ValueError, "outside the folder: '/etc"),
    "ghost": ("sharded", lambda f: rewrite_index(f, x=first_shard(f).name), ValueError, "shards do not hold: x"),
    "no map": ("sharded", lambda f: (f / f"{STATE}.index.json").write_text("{}"), ValueError, "weight_map: wanted"),
    "bad bin": ("bin-decoder", lambda f: cut(f / "pytorch_model.bin", 5000), ValueError, "bin: not readable"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(framework, case, plain, tmp_path):
    layout, damage, kind, message = BROKEN[case]
    folder = write_layout(plain, layout, tmp_path)
    damage(folder)
    with pytest.raises(kind, match=message) as error:
        Backend(framework, folder)
    assert str(tmp_path) in str(error.value)


def test_a_pickle_that_calls_something_is_refused(plain, tmp_path):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "called"),)

    folder = tmp_path / "bad"
    folder.mkdir()
    shutil.copy(plain / "config.json", folder)
    torch.save({"decoder.embed_tokens.weight": Call()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: not readable as PyTorch weights"):
        Checkpoint(folder)
    assert not (tmp_path / "called").exists()


def sources(value: float, count: int = 4, size: int = 1000) -> list[Source]:
    array = np.full(size, value, np.float32)
    return [Source(f"t{i}", (size,), "float32", lambda: array) for i in range(count)]


def test_shards_and_sizes(tmp_path):
    files = save_checkpoint(tmp_path, sources(1.0), {"config.json": "{}"}, max_shard_size=9000)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert index_of(tmp_path)["metadata"] == {"total_size": 16000}
    assert len(Checkpoint(tmp_path)) == 4
    # a second save leaves nothing of the first
    save_checkpoint(tmp_path, sources(2.0), {"config.json": "{}"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", STATE]
    assert (Checkpoint(tmp_path)["t3"].read() == 2).all()
    assert (parse_size("5GB"), parse_size("1.5 KiB"), parse_size(7)) == (5 * 10**9, 1536, 7)
    for wrong in ("many", "-1GB", 0, "5XB", 1.5):
        with pytest.raises(ValueError, match="max_shard_size: found"):
            parse_size(wrong)


def test_the_companions_of_a_folder_stay(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "runs").mkdir()
    kept = ("model.pt", "optimizer-shard0.pt", "weights.keras", "model.safetensors.bak")
    stale = ("pytorch_model.bin", "tf_model-00001-of-00002.h5", "flax_model.msgpack.index.json")
    for name in (*kept, *stale):
        (tmp_path / name).touch()
    save_checkpoint(tmp_path, sources(1.0), {"config.json": "{}"})
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "runs").is_dir()
    assert sorted(os.listdir(tmp_path)) == sorted(["README.md", "config.json", STATE, "runs", *kept])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells before the pages are touched")
def test_a_map_that_cannot_be_read(tmp_path, monkeypatch):
    """Says so, where touching its pages would end the process."""
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 400)
    assert map_bytes(path, 4099, 90_001).tobytes() == path.read_bytes()[4099:94_100]
    map_bytes(path, 8, 16)[:] = 7
    assert path.read_bytes() == bytes(range(256)) * 400

    class Cut(mmap.mmap):
        def __init__(self, *_, **__):
            os.truncate(path, 0)

    monkeypatch.setattr(mmap, "mmap", Cut)
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        map_bytes(path, 4099, 90_001)


def test_reading_ahead(monkeypatch):
    """The next arrays are read while one is in use, as many as there is room for; errors come in their turn; who stops
    early waits for no more than what is being read."""
    monkeypatch.setattr("opt_common.checkpoints.tensors._AHEAD", 3)
    started, third = [], threading.Event()

    def read(i):
        started.append(i)
        if i == 2:
            third.set()
        if i == 5:
            raise ValueError("the fifth")
        return np.array(i)

    arrays = ahead((1, partial(read, i)) for i in range(9))
    assert int(next(arrays)) == 0
    assert third.wait(10) and started == [0, 1, 2]  # unasked
    assert [int(next(arrays)) for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="the fifth"):
        next(arrays)
    assert max(started) <= 7  # the one in its turn, and room for two more

    started.clear()
    arrays = ahead((1, partial(read, i)) for i in range(9))
    assert int(next(arrays)) == 0
    arrays.close()
    assert len(started) <= 4


def test_transposed_views_are_written_in_order(tmp_path, rng):
    array = rng.standard_normal((4, 6)).astype(np.float32)
    save_checkpoint(tmp_path, [Source("t", (6, 4), "float32", lambda: array.T)], {})
    np.testing.assert_array_equal(tensors(tmp_path)["t"], array.T)


class Stop(Exception):
    pass


@pytest.mark.parametrize("old", [False, True], ids=["new folder", "over an old one"])
def test_a_save_stopped_anywhere_leaves_old_or_new(old, tmp_path, monkeypatch):
    """Stop before each file-system call in turn, as a kill would: the next reader sees all of one save."""
    for stop_at in range(200):
        folder = tmp_path / f"{stop_at}"
        if old:
            save_checkpoint(folder, sources(1.0), {"config.json": '{"is": 1}'}, 9000)
        calls = 0

        def counted(function, stop_at=stop_at):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > stop_at:  # and every later one: the process is dead, it cleans nothing up
                    raise Stop
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "rmdir"),
                                 (Path, "write_text"), (Path, "write_bytes"), (shutil, "rmtree")):  # fmt: skip
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                save_checkpoint(folder, sources(2.0, count=6), {"config.json": '{"is": 2}'}, 9000)
                finished = True
            except Stop:
                finished = False
        if not old and not folder.exists():
            continue
        checkpoint = Checkpoint(folder)
        said = json.loads((folder / "config.json").read_text())["is"]
        values = {float(entry.read()[0]) for entry in checkpoint.values()}
        assert values == {said}
        assert len(checkpoint) == {1: 4, 2: 6}[said]
        assert not (folder / ".saved").exists()
        if finished:
            assert said == 2
            return
    raise AssertionError("the save never finished")


def test_a_killed_save_leaves_old_or_new(tmp_path):
    """The same with a real kill at random moments."""
    program = """
        import sys, numpy as np
        from opt_common.checkpoints.save import save_checkpoint
        from opt_common.checkpoints.tensors import Source
        for value in range(1, 1000):
            array = np.full(200_000, value, np.float32)
            save = [Source(f"t{i}", array.shape, "float32", lambda: array) for i in range(5)]
            save_checkpoint(sys.argv[1], save, {"config.json": '{"is": %d}' % value}, 1_700_000)
            print(value, flush=True)
    """
    rng = np.random.default_rng(0)
    for _ in range(6):
        run = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
        )
        assert run.stdout is not None
        for _ in range(2):
            run.stdout.readline()
        try:
            run.wait(timeout=rng.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
        run.wait()
        checkpoint = Checkpoint(tmp_path / "c")
        said = json.loads((tmp_path / "c" / "config.json").read_text())["is"]
        assert len(checkpoint) == 5
        for entry in checkpoint.values():
            assert (entry.read() == said).all()


def test_a_failed_save_changes_nothing(tmp_path):
    def fail():
        raise OSError("the disk is full")

    bad = [*sources(2.0), Source("bad", (3,), "float32", fail)]
    with pytest.raises(OSError, match="disk is full"):
        save_checkpoint(tmp_path / "new", bad, {"config.json": "{}"})
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "old", sources(1.0), {"config.json": "{}"})
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    with pytest.raises(OSError, match="disk is full"):
        save_checkpoint(tmp_path / "old", bad, {"config.json": "{}"})
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file: is a file"):
        save_checkpoint(tmp_path / "file", sources(1.0), {})


def test_convert(plain, tmp_path):
    """A .bin becomes safetensors bit for bit; a cast is one cast; what stands beside the weights comes along."""
    source = write_layout(plain, "bin-sharded", tmp_path / "bin")
    (source / "merges.txt").write_text("#version: 0.2\n")
    convert(source, tmp_path / "same")
    for name, array in tensors(plain).items():
        assert tensors(tmp_path / "same")[name].tobytes() == array.tobytes()
    assert (tmp_path / "same" / "merges.txt").read_text() == "#version: 0.2\n"
    assert OPTConfig.from_pretrained(tmp_path / "same").dtype == "float16"

    convert(source, tmp_path / "wide", dtype="float32")
    for name, array in tensors(plain).items():
        np.testing.assert_array_equal(tensors(tmp_path / "wide")[name], array.astype(np.float32))
    wide = tensors(tmp_path / "wide")
    wide["model.decoder.layers.0.fc1.bias"][3] = 1e6
    safetensors.numpy.save_file(wide, tmp_path / "wide" / STATE)
    with pytest.raises(ValueError, match=r"model.decoder.layers.0.fc1.bias: 1 of 128 numbers overflow float16"):
        convert(tmp_path / "wide", tmp_path / "narrow", dtype="float16")
    assert not (tmp_path / "narrow").exists()
    with pytest.raises(ValueError, match="is also the source"):
        convert(tmp_path / "wide", tmp_path / "wide")


def test_unknown_config_keys_survive_loading_and_saving(framework, plain, tmp_path):
    shutil.copytree(plain, tmp_path / "a")
    values = json.loads((plain / "config.json").read_text()) | {"prefix": "</s>", "activation_dropout": 0.0}
    (tmp_path / "a" / "config.json").write_text(json.dumps(values))
    Backend(framework, tmp_path / "a").model.save_pretrained(tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (saved["prefix"], saved["activation_dropout"], saved["torch_dtype"]) == ("</s>", 0.0, "float32")


def test_hub_names(tmp_path):
    """No network is reached here: a name that is not a folder and not in the cache is one sentence."""
    from opt_common.hub import fetch

    assert fetch("opt-demo", []).is_dir()
    with pytest.raises(OSError, match="facebook/opt-125m: not a folder here, not in the local cache") as error:
        fetch("facebook/opt-125m", ["config.json"], cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    for name in ("./nowhere", "/no/such/folder", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=re.escape(name) + ": no such folder"):
            fetch(name, [])
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repository"):
        fetch("not a name", [])
    (tmp_path / "f").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        fetch(tmp_path / "f", [])


def test_the_hub_cache_is_read_offline(tmp_path, plain):
    """A cached snapshot, as huggingface_hub lays it out: links to blobs."""
    repo = tmp_path / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "blobs").mkdir()
    for path in plain.iterdir():
        shutil.copy(path, repo / "blobs" / path.name)
        (snapshot / path.name).symlink_to(repo / "blobs" / path.name)
    model = Backend("pt", "someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert dataclasses.replace(model.model.config, dtype=None) == dataclasses.replace(
        OPTConfig.from_pretrained(plain), dtype=None
    )


def header(**tensors: object) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(start: int, end: int, shape: object = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


HOSTILE = {
    "a header of 2**60 bytes": struct.pack("<Q", 2**60) + b"{}",
    "a header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header longer than the file": struct.pack("<Q", 99) + b"{}",
    "a large header": struct.pack("<Q", 10_000_001) + b" " * 10_000_001,
    "overlapping": header(a=tensor(0, 8), b=tensor(4, 12)) + bytes(12),
    "negative": header(a=tensor(-8, 0)) + bytes(8),
    "backwards": header(a={"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}) + bytes(8),
    "huge offsets": header(a=tensor(2**62, 2**62 + 8)) + bytes(8),
    "past the end": header(a=tensor(0, 80)) + bytes(8),
    "a gap": header(a=tensor(0, 4), b=tensor(8, 12)) + bytes(12),
    "bytes too many": header(a=tensor(0, 4)) + bytes(400),
    "a huge shape": header(a=tensor(0, 8, [2**40, 2**40])) + bytes(8),
    "a huge shape of nothing": header(a=tensor(0, 0, [2**63, 2**63, 0])),
    "a negative shape": header(a=tensor(0, 8, [-2])) + bytes(8),
    "a shape of text": header(a=tensor(0, 8, ["2"])) + bytes(8),
    "an unknown dtype": header(a=tensor(0, 8, [2], "F31")) + bytes(8),
    "no offsets": header(a={"dtype": "F32", "shape": [2]}) + bytes(8),
    "a list": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 60_000) + b'{"a":' * 10_000 + b" " * 10_000,
    "not UTF-8": struct.pack("<Q", 10) + b'{"\xff\xff":1}',
    "a key twice": struct.pack("<Q", 110)
    + (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
       .ljust(110)) + bytes(4),
    "metadata of numbers": header(__metadata__={"format": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("layout", [None, "safetensors", "safetensors-tf", "safetensors-flax"])
def test_hostile_safetensors(case, layout, tmp_path):
    (tmp_path / STATE).write_bytes(HOSTILE[case])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / STATE))) as error:
        Checkpoint(tmp_path, layout)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("shape", [[1] * 101, [0, 2**40, 2**40], [2**62, 0]], ids=["101 axes", "nothing", "much of it"])
def test_shapes_that_numpy_cannot_hold(shape, tmp_path):
    """The header is right in itself."""
    size = 4 if 0 not in shape else 0
    (tmp_path / STATE).write_bytes(header(a=tensor(0, size, shape)) + bytes(size))
    with pytest.raises(ValueError, match="model.safetensors: found a tensor of shape .*, wanted at most 32 axes"):
        Checkpoint(tmp_path)


def test_a_dtype_that_is_not_read_here(tmp_path):
    (tmp_path / STATE).write_bytes(header(a=tensor(0, 4, [8], "F4")) + bytes(4))
    with pytest.raises(ValueError, match="model.safetensors: a: found dtype F4, wanted one of F64"):
        Checkpoint(tmp_path)


INDEXES = {
    "outside": ('{"weight_map": {"a": "../a.safetensors"}}', "names files outside the folder: '../a.safetensors'"),
    "absolute": ('{"weight_map": {"a": "/etc/passwd"}}', "names files outside the folder: '/etc/passwd'"),
    "in a folder": ('{"weight_map": {"a": "b/c.safetensors"}}', "names files outside the folder: 'b/c.safetensors'"),
    "nothing": ('{"weight_map": {"a": ""}}', "names files outside the folder: ''"),
    "itself": ('{"weight_map": {"a": "."}}', "names files outside the folder: '.'"),
    "a null": ('{"weight_map": {"a": "\\u0000"}}', "names missing shards"),
    "half a character": ('{"weight_map": {"a": "\\ud800"}}', "names missing shards"),
    "missing": ('{"weight_map": {"a": "b.safetensors"}}', "names missing shards: b.safetensors"),
    "twice": ('{"weight_map": {"a": "b", "a": "c"}}', "key 'a' appears twice"),
    "numbers": ('{"weight_map": {"a": 1}}', "wanted an object of tensor names"),
    "a list": ('{"weight_map": ["a"]}', "wanted an object of tensor names"),
    "no object": ("[]", "wanted an object"),
    "deep": ('{"weight_map": ' + "[" * 100_000, "not readable as JSON"),
    "bytes": ("\x80", "wanted"),
    "very many": (json.dumps({"weight_map": {f"t{i}": f"s{i}" for i in range(10_000)}}), "and 9980 more"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_hostile_indexes(case, tmp_path):
    text, message = INDEXES[case]
    path = tmp_path / f"{STATE}.index.json"
    path.write_bytes(text.encode("latin-1"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((ValueError, FileNotFoundError), match=message if case != "bytes" else "JSON") as error:
        Checkpoint(tmp_path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "vocab_size", "ffn_dim", "max_position_embeddings"]
)
@pytest.mark.parametrize("size", [10**5, 10**9, 10**18, 10**30])
def test_astronomical_sizes_are_refused_before_anything_is_allocated(field, size, plain, tmp_path):
    """In a process that may have half a gigabyte more than it starts with."""
    values = json.loads((plain / "config.json").read_text()) | {field: size, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    shutil.copy(plain / STATE, tmp_path)
    program = """
        import resource, sys
        from pathlib import Path
        from opt_common.checkpoints.open import open_checkpoint
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 500_000_000,) * 2)
        open_checkpoint(sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert f"ValueError: {tmp_path}: " in ran.stderr and "do not fit the config" in ran.stderr, ran.stderr[-500:]
    assert str(size) in ran.stderr or str(size + 2) in ran.stderr
