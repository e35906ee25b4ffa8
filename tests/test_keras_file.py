"""Keras's own files of opt_tf: read and written as Keras does it, without Keras, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from framework_files import CONFIGS, random_tensors, refused, same_bits, write
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.convert import convert
from opt_common.checkpoints.examine import diff
from opt_common.checkpoints.layouts.keras_file import KERAS_FILE
from opt_common.checkpoints.layouts.keras_hub import KERAS_HUB
from opt_common.checkpoints.layouts.tf_h5 import TF_H5
from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.tensors import Source
from opt_common.config import OPTConfig
from opt_common.weights import KERAS, table
from opt_tf import TFOPTForCausalLM, TFOPTForQuestionAnswering, TFOPTForSequenceClassification, TFOPTModel

KINDS = CONFIGS | {"no-affine": dataclasses.replace(CONFIGS["pre-norm"], layer_norm_elementwise_affine=False)}
# A kind of model changes names, a dtype bytes: neither sees the other.
KINDS_AND_DTYPES = [(kind, "float16") for kind in KINDS] + [("350m", "float32"), ("350m", "bfloat16")]


def hub_folder(folder: Path, config: OPTConfig, dtype: str) -> tuple[Path, dict[str, np.ndarray]]:
    config = dataclasses.replace(config, dtype=dtype, unknown={"prefix": "</s>", "architectures": ["OPTForCausalLM"]})
    arrays = random_tensors(config, dtype)
    sources = [Source(name, a.shape, dtype, lambda a=a: a) for name, a in arrays.items()]
    save_checkpoint(folder, sources, {"config.json": config.to_json()})
    return folder, arrays


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_reads_what_keras_wrote(tmp_path, kind, dtype):
    folder, arrays = hub_folder(tmp_path / "hub", KINDS[kind], dtype)
    model = TFOPTForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save(tmp_path / "anything.keras")
    files, entries = KERAS_FILE.read(tmp_path / "anything.keras")
    assert files == [tmp_path / "anything.keras"]
    transposed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    assert entries.keys() == arrays.keys()
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype) == (arrays[name].shape, dtype)
        for array in (entry.read(), entry.map()):
            assert np.ascontiguousarray(array).tobytes() == transposed[name].tobytes(), name
    assert KERAS_FILE.config(tmp_path / "anything.keras", {}) == OPTConfig.from_pretrained(folder)
    assert list(diff(tmp_path / "anything.keras", folder)) == []


def test_reads_a_bare_model_and_a_trained_one(tmp_path, rng):
    """The state of what trained it is no part of the model."""
    config = CONFIGS["350m"]
    bare = TFOPTModel(config)
    bare.save(tmp_path / "bare.keras")
    _, entries = KERAS_FILE.read(tmp_path / "bare.keras")
    for spec in table(config, "OPTModel"):
        array = KERAS.parameter(bare, spec).numpy()
        np.testing.assert_array_equal(
            entries[f"model.{spec.name}"].read(), array.T if spec.kind == "linear" else array, err_msg=spec.name
        )
    model = TFOPTForCausalLM(dataclasses.replace(config, num_hidden_layers=2, layerdrop=0.1))  # that compile sooner
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    ids = rng.integers(3, 24, (4, 8))
    model.fit(ids, ids, verbose=0)
    model.save(tmp_path / "trained.keras")
    with zipfile.ZipFile(tmp_path / "trained.keras") as archive, h5py.File(archive.open("model.weights.h5")) as file:
        assert "optimizer" in file
    convert(tmp_path / "trained.keras", tmp_path / "hub")
    again = TFOPTForCausalLM.from_pretrained(tmp_path / "hub")
    np.testing.assert_array_equal(again(ids).logits, model(ids).logits)


def stored(path: Path) -> tuple[dict, dict]:
    """What a file says of its weights, and its config."""
    found = {}

    def see(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = (item.shape, item.dtype, item[()].tobytes(), dict(item.attrs))

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == ["config.json", "metadata.json", "model.weights.h5"]
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            file.visititems(see)
        return found, json.loads(archive.read("config.json"))


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_writes_what_keras_writes(tmp_path, kind, dtype):
    """The same names, numbers and config; and Keras loads it, to the same logits."""
    folder, _ = hub_folder(tmp_path / "hub", KINDS[kind], dtype)
    convert(folder, tmp_path / "ours", to="keras")
    model = TFOPTForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save(tmp_path / "theirs.keras")
    ours, theirs = stored(tmp_path / "ours" / "model.keras"), stored(tmp_path / "theirs.keras")
    # where dropout draws next is no weight
    assert ours[0] == {name: data for name, data in theirs[0].items() if not name.endswith("/dropout/vars/seed")}
    theirs[1]["config"]["name"] = ours[1]["config"]["name"]  # Keras counts the models of a program
    assert ours[1] == theirs[1]
    again = keras.saving.load_model(tmp_path / "ours" / "model.keras")
    ids = np.random.default_rng(0).integers(3, 24, (2, 6))
    assert again.config == model.config
    np.testing.assert_array_equal(again(ids).logits, model(ids).logits)


def test_writes_a_bare_model(tmp_path):
    config = CONFIGS["350m"]
    arrays = random_tensors(config, "float32", "OPTModel")
    main = write(KERAS_FILE, tmp_path, arrays, config)
    again = keras.saving.load_model(main)
    assert type(again) is TFOPTModel
    for spec in table(config, "OPTModel"):
        array = KERAS.parameter(again, spec).numpy()
        np.testing.assert_array_equal(array.T if spec.kind == "linear" else array, arrays[spec.name])
    same_bits(KERAS_FILE.read(main)[1], {f"model.{name}": array for name, array in arrays.items()})


@pytest.mark.parametrize("kind", [TFOPTForSequenceClassification, TFOPTForQuestionAnswering])
def test_writes_a_head(tmp_path, kind):
    config = CONFIGS["pre-norm"]
    arrays = random_tensors(config, "float32", kind.architecture)
    main = write(KERAS_FILE, tmp_path, arrays, config)
    again = keras.saving.load_model(main)
    again.save(tmp_path / "theirs.keras")
    ours, theirs = stored(main)[1], stored(tmp_path / "theirs.keras")[1]
    assert {key: ours[key] for key in ("module", "class_name")} == {
        "module": kind.__module__,
        "class_name": kind.__name__,
    }
    assert ours == theirs


def test_more_than_32_bits_can_count(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    arrays = random_tensors(CONFIGS["pre-norm"], "float16")
    main = write(KERAS_FILE, tmp_path, arrays, CONFIGS["pre-norm"])
    assert main.read_bytes()[22:26] == b"\xff" * 4
    same_bits(KERAS_FILE.read(main)[1], arrays)
    assert len(stored(main)[0]) == len(arrays)
    keras.saving.load_model(main)


def test_takes_neither_keras_nor_tensorflow(tmp_path):
    folder, _ = hub_folder(tmp_path / "hub", CONFIGS["pre-norm"], "float16")
    program = """
        import sys
        from opt_common.checkpoints.convert import convert
        convert(sys.argv[1], sys.argv[2] + "/a", to="keras")
        convert(sys.argv[2] + "/a", sys.argv[2] + "/b")
        assert not {"keras", "tensorflow", "jax", "torch"} & set(sys.modules)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_its_config_is_its_own(tmp_path):
    """One that lies beside the file is another's; without one it is read too."""
    main = write(KERAS_FILE, tmp_path, random_tensors(CONFIGS["350m"], "float16"), CONFIGS["350m"])
    assert Checkpoint(tmp_path).layout == Checkpoint(main).layout == "keras"
    convert(main, tmp_path / "a")
    CONFIGS["pre-norm"].save_pretrained(tmp_path)
    convert(main, tmp_path / "b")
    assert list(diff(tmp_path / "a", tmp_path / "b")) == []


@pytest.fixture
def main(tmp_path) -> Path:
    return write(KERAS_FILE, tmp_path, random_tensors(CONFIGS["pre-norm"], "float16"), CONFIGS["pre-norm"])


def remade(main: Path, records: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """The file with some of its records changed, added, or, where they are None, taken out."""
    with zipfile.ZipFile(main) as archive:
        records = {name: archive.read(name) for name in archive.namelist()} | records
    with zipfile.ZipFile(main, "w", compression) as archive:
        for name, data in records.items():
            if data is not None:
                archive.writestr(name, data)


def changed(main: Path, change) -> bytes:
    with zipfile.ZipFile(main) as archive:
        values = json.loads(archive.read("config.json"))
    change(values)
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c.update(registered_name="Custom>Evil"), "config.json: found a model of class 'Custom>Evil'"),
        (lambda c: c.update(registered_name=["opt_zoo>TFOPTModel"]), "found a model of class ['opt_zoo"),
        (lambda c: c.update(registered_name=None, class_name="Functional", module="keras"), "class None"),
        (lambda c: c.update(config=[]), "wanted the fields of an OPTConfig"),
        (lambda c: c["config"].update(config="x"), "wanted the fields of an OPTConfig"),
        (lambda c: c["config"]["config"].update(unknown=3), "wanted the fields of an OPTConfig"),
        (lambda c: c["config"]["config"].update(hidden_size=-1), "hidden_size: found -1"),
        (lambda c: c["config"]["config"].update(num_hidden_layers="12"), "num_hidden_layers: found '12'"),
        (lambda c: c["config"]["config"].update(model_type="gpt2"), "model_type: found 'gpt2'"),
        (lambda c: c.update(padding="x" * (1 << 20)), "wanted at most 1048576"),
    ],
)
def test_hostile_config(main, change, part):
    remade(main, {"config.json": changed(main, change)})
    refused(lambda: KERAS_FILE.config(main, {}), main, part)


def test_nothing_is_imported_or_called(main):
    """Names that Keras itself would look up are not looked at."""

    def evil(values):
        values |= {"module": "os", "class_name": "system", "compile_config": {"loss": {"class_name": "__lambda__"}}}
        values["config"]["dtype"] = {"module": "os", "class_name": "system", "config": {"command": "false"}}

    remade(main, {"config.json": changed(main, evil)})
    assert KERAS_FILE.config(main, {}).hidden_size == 8


def test_other_records_are_not_read(main, tmp_path):
    remade(main, {"../evil.txt": b"x", "/etc/evil": b"x", "assets/layer/../../evil": b"x"})
    convert(main, tmp_path / "new")
    assert not list(tmp_path.parent.rglob("evil*"))


@pytest.mark.parametrize("name", ["model.weights.h5", "config.json"])
def test_missing_record(main, name):
    remade(main, {name: None})
    read = KERAS_FILE.read if name == "model.weights.h5" else lambda path: KERAS_FILE.config(path, {})
    refused(lambda: read(main), main, f"no record {name}")


def test_bombs(main):
    remade(main, {"assets/zeros": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    refused(lambda: KERAS_FILE.read(main), main, "is compressed or encrypted")


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99, -1])
def test_cut_short(main, kept):
    data = main.read_bytes()
    main.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    refused(lambda: Checkpoint(main), main, "not readable as a Keras file: ")


def test_damaged_records(main):
    with zipfile.ZipFile(main) as archive:
        config = archive.read("config.json")
    remade(main, {"config.json": b'{"config": 1, "config": 2}'})
    refused(lambda: KERAS_FILE.config(main, {}), main, "config.json: not readable as JSON: key 'config' appears twice")
    remade(main, {"config.json": config, "model.weights.h5": b"no HDF5"})
    refused(lambda: KERAS_FILE.read(main), main, "not readable as HDF5 weights")


def test_links_out_of_the_file(main, tmp_path):
    secret, path = tmp_path / "secret.h5", tmp_path / "weights.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones(3, np.float32)
    made = {
        "external": lambda file: file.__setitem__("layers/external", h5py.ExternalLink(str(secret), "x")),
        "soft": lambda file: file.__setitem__("layers/soft", h5py.SoftLink("/layers")),
        "raw": lambda file: file.create_dataset("raw", (3,), "f4", external=[(str(secret), 0, 12)]),
    }
    with zipfile.ZipFile(main) as archive:
        good = archive.read("model.weights.h5")
    for name, make in made.items():
        path.write_bytes(good)
        with h5py.File(path, "a") as file:
            make(file)
        remade(main, {"model.weights.h5": path.read_bytes()})
        refused(lambda: KERAS_FILE.read(main), main, name)


def test_two_records_of_one_name(main):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(main, "a") as archive:
        archive.writestr("config.json", "{}")
    refused(lambda: KERAS_FILE.read(main), main, "'config.json': appears twice")


def test_strange_tensors(main, tmp_path):
    """Unknown ones come as they are, for the check against the config to tell; a name that is said twice does not."""
    path = tmp_path / "weights.h5"

    def add(name: str) -> None:
        with zipfile.ZipFile(main) as archive:
            path.write_bytes(archive.read("model.weights.h5"))
        with h5py.File(path, "a") as file:
            file[name] = np.ones(3, np.float32)
        remade(main, {"model.weights.h5": path.read_bytes()})

    unknown = "layers/tfopt_model/decoder/layers/opt_decoder_layer/fc1/vars/2"
    add(unknown)
    assert unknown in KERAS_FILE.read(main)[1]
    with pytest.raises(ValueError, match=f"{unknown}: unexpected"):
        convert(main, tmp_path / "new")
    add("decoder/embed_tokens/vars/0")
    refused(lambda: KERAS_FILE.read(main), main, "model.decoder.embed_tokens.weight twice")


def test_a_file_of_weights_alone_is_no_preset(tmp_path):
    """`model.save_weights` names things alike; neither of the layouts that HDF5 files have here is it."""
    TFOPTForCausalLM(CONFIGS["pre-norm"]).save_weights(tmp_path / "model.weights.h5")
    assert not KERAS_HUB.holds(tmp_path / "model.weights.h5")
    assert not TF_H5.holds(tmp_path / "model.weights.h5")
