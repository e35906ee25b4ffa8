"""From any layout to any other and back: the same bits; and nothing half-done when it is stopped."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from huggingface_hub.utils import filter_repo_objects

from checkpoints import contents, random_checkpoint, tiny_config
from opt_common.checkpoints import examine
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.containers import safetensors as safetensors_file
from opt_common.checkpoints.convert import convert, plan
from opt_common.checkpoints.examine import diff
from opt_common.checkpoints.layouts import LAYOUTS, WRITABLE
from opt_common.checkpoints.layouts.names import FLAX_NAMES, TF_NAMES
from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.shards import name_shards, parse_size
from opt_common.checkpoints.tensors import Entry, Source, contiguous
from opt_common.config import SIZES, OPTConfig
from opt_common.hub import TOKENIZER_FILES
from opt_common.weights import FLAX, KERAS, table

GOLDENS = Path(__file__).parent / "goldens" / "safetensors"
BACKWARDS = [*WRITABLE][::-1]

# (layout, size or dtype): what a layout has no place for, and what it says then.
REFUSED = {
    ("tf-h5", "bfloat16"): "is bfloat16, which HDF5 has no type for",
    ("keras-hub", "350m"): "has its layer norms after the layers .* and projects its embedding",
}
# Layouts of one file, whatever its size.
ONE_FILE = ("metaseq", "state-dict", "keras")
# Layouts that do not keep the two rows of positions that no token has.
WITHOUT_OFFSET_ROWS: tuple[str, ...] = ("keras-hub",)


@pytest.fixture(autouse=True)
def nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel outlives all that is stopped here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def source(folder: Path, config: OPTConfig, through: tuple[str, ...] = (), seed: int = 0) -> Path:
    random_checkpoint(folder, config, seed)
    if set(through) & set(WITHOUT_OFFSET_ROWS):
        path = folder / "model.safetensors"
        state = safetensors.numpy.load_file(path)
        state["model.decoder.embed_positions.weight"][:2] = 0
        whole = [Source(s.name, s.shape, str(state[s.name].dtype), lambda s=s: state[s.name]) for s in table(config)]
        save_checkpoint(folder, whole, {})
    return folder


def refused(layout: str, config: OPTConfig, size: str, given: Path, target: Path) -> bool:
    """Whether this layout says that it has no place for this model, and leaves nothing behind."""
    said = REFUSED.get((layout, size)) or REFUSED.get((layout, str(config.dtype)))
    if said is None:
        return False
    for do in (plan, convert):
        with pytest.raises(ValueError, match=said):
            do(given, target, layout)
    assert not target.exists()
    return True


@pytest.mark.filterwarnings("ignore::UserWarning")  # what a layout loses is its own test
@pytest.mark.parametrize(("size", "dtype"), [("125m", "float16"), ("350m", "float32"), ("13b", "float16")])
@pytest.mark.parametrize(("first", "second"), [*pairwise([*BACKWARDS, BACKWARDS[0]])])
def test_there_and_back(first, second, size, dtype, tmp_path):
    """safetensors -> first -> second -> safetensors: the same file, and the same config and tokenizer.

    Every tensor passes through the Hub's form, so each layout once as the first and once as the second stands for all
    pairs. The neighbours in the other order are in test_every_size_through_every_layout.
    """
    config = tiny_config(size, layers=11, dtype=dtype)  # layers.10 comes before layers.2 in a dictionary
    given = source(tmp_path / "given", config, (first, second))
    if refused(first, config, size, given, tmp_path / "a"):
        return
    convert(given, tmp_path / "a", first)
    if refused(second, config, size, tmp_path / "a", tmp_path / "b"):
        return
    convert(tmp_path / "a", tmp_path / "b", second)
    convert(tmp_path / "b", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(given)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "size",
    # these differ by more than their numbers, as does 13b, which test_there_and_back takes; many layers are slow
    [size if size in ("125m", "350m", "1.3b") else pytest.param(size, marks=pytest.mark.slow) for size in SIZES],
)
def test_every_size_through_every_layout(size, tmp_path):
    """With all its layers and heads, tiny widths; sharded."""
    config = tiny_config(size)
    given = last = source(tmp_path / "given", config, WRITABLE)
    for layout in WRITABLE:
        if not refused(layout, config, size, last, tmp_path / layout):
            convert(last, tmp_path / layout, layout, max_shard_size=2_000_000)
            last = tmp_path / layout
    convert(last, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(given)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(layout, dtype, tmp_path):
    config = tiny_config("125m", layers=2, dtype=dtype)
    given = source(tmp_path / "given", config, (layout,))
    if not refused(layout, config, "", given, tmp_path / "a"):
        convert(given, tmp_path / "a", layout)
        convert(tmp_path / "a", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(given)


@pytest.mark.parametrize("layout", ["safetensors-tf", "safetensors-flax"])
@pytest.mark.parametrize("kind", ["no bias", "no affine", "untied", "removed final norm"])
def test_kinds_of_models(layout, kind, tmp_path):
    changes = {
        "no bias": {"enable_bias": False},
        "no affine": {"layer_norm_elementwise_affine": False},
        "untied": {"tie_word_embeddings": False},
        "removed final norm": {"_remove_final_layer_norm": True},
    }[kind]
    given = random_checkpoint(tmp_path / "given", tiny_config(layers=2, **changes))
    if (layout, kind) == ("safetensors-tf", "untied"):
        with pytest.raises(ValueError, match="lm_head.weight: transformers' TensorFlow OPT has no such tensor"):
            convert(given, tmp_path / "a", layout)
        assert not (tmp_path / "a").exists()
        return
    convert(given, tmp_path / "a", layout)
    convert(tmp_path / "a", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(given)


@pytest.mark.parametrize("name", ["tf", "tf-sharded", "flax"])
def test_what_transformers_wrote(name, tmp_path):
    """transformers 4.57's own safetensors of one model (tests/make_goldens.py) hold what its PyTorch's hold; and ours
    have their names, shapes and metadata, file by file."""
    layout = f"safetensors-{name.removesuffix('-sharded')}"
    assert Checkpoint(GOLDENS / name).layout == layout
    assert list(diff(GOLDENS / name, GOLDENS / "torch")) == []
    convert(GOLDENS / "torch", tmp_path / "ours", layout, max_shard_size="3KB" if "sharded" in name else "5GB")
    theirs, ours = GOLDENS / name, tmp_path / "ours"

    def stored(folder: Path) -> dict[str, np.ndarray]:
        return {k: v for path in folder.glob("*.safetensors") for k, v in safetensors.numpy.load_file(path).items()}

    assert {k: (v.shape, v.tobytes()) for k, v in stored(ours).items()} == {
        k: (v.shape, v.tobytes()) for k, v in stored(theirs).items()
    }
    for path in ours.glob("*.safetensors"):
        with safetensors.safe_open(path, "np") as file:
            assert file.metadata() == {"format": name.removesuffix("-sharded")}
    if "sharded" in name:
        indexes = [json.loads((f / "model.safetensors.index.json").read_text()) for f in (ours, theirs)]
        assert indexes[0]["weight_map"].keys() == indexes[1]["weight_map"].keys()
        assert indexes[0]["metadata"] == indexes[1]["metadata"]


def test_transformers_4_loads_what_we_write(tmp_path):
    """Its TensorFlow and Flax classes, which transformers 5 no longer has: in an environment of their own."""
    python = os.environ.get("OPT_ZOO_TRANSFORMERS_4")
    if not python:
        pytest.skip("not run: OPT_ZOO_TRANSFORMERS_4 is not a Python with transformers 4.57, TensorFlow and Flax")
    convert(GOLDENS / "torch", tmp_path / "tf", "safetensors-tf")
    convert(GOLDENS / "torch", tmp_path / "tf-sharded", "safetensors-tf", max_shard_size="3KB")
    convert(GOLDENS / "torch", tmp_path / "flax", "safetensors-flax")
    program = """
        import os, sys
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        import numpy as np, torch, transformers as t
        ids = np.array([[2, 5, 7, 9]])
        wanted = t.OPTForCausalLM.from_pretrained(sys.argv[1])(torch.tensor(ids)).logits.detach().numpy()
        for name in ("tf", "tf-sharded"):
            model, info = t.TFOPTForCausalLM.from_pretrained(f"{sys.argv[2]}/{name}", output_loading_info=True)
            assert not any(info.values()), info
            np.testing.assert_allclose(model(ids).logits.numpy(), wanted, rtol=1e-4, atol=1e-5)
        logits = t.FlaxOPTForCausalLM.from_pretrained(f"{sys.argv[2]}/flax")(ids).logits
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)
    """
    command = [python, "-c", textwrap.dedent(program), str(GOLDENS / "torch"), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_ctranslate2_from_what_we_write(tmp_path):
    """Its own converter takes our safetensors, and it writes the greedy tokens that we write. In an environment of its
    own, with transformers."""
    python = os.environ.get("OPT_ZOO_CTRANSLATE2")
    if not python:
        pytest.skip("not run: OPT_ZOO_CTRANSLATE2 is not a Python with ctranslate2 and transformers")
    from opt_pt import GPT2Tokenizer, OPTForCausalLM

    convert("opt-demo", tmp_path / "torch", "torch")
    convert(tmp_path / "torch", tmp_path / "ours", "safetensors", dtype="float32")
    command = [str(Path(python).with_name("ct2-transformers-converter")), "--model", str(tmp_path / "ours")]
    ran = subprocess.run([*command, "--output_dir", str(tmp_path / "theirs")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    program = """
        import json, sys
        import ctranslate2
        import transformers
        tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
        words = tokenizer.convert_ids_to_tokens(tokenizer(sys.argv[3])["input_ids"])
        model = ctranslate2.Generator(sys.argv[2], compute_type="float32")
        (result,) = model.generate_batch([words], beam_size=1, max_length=40, include_prompt_in_result=False)
        print(json.dumps(result.sequences_ids[0]))
    """
    prompt = "Once upon a time"
    command = [python, "-c", textwrap.dedent(program), str(tmp_path / "ours"), str(tmp_path / "theirs"), prompt]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    given = GPT2Tokenizer.from_pretrained("opt-demo")(prompt, return_tensors="pt")
    ours = OPTForCausalLM.from_pretrained(tmp_path / "ours").generate(**given, max_new_tokens=40)
    wanted = ours[0, given["input_ids"].shape[1] :].tolist()
    assert len(wanted) == 40
    assert json.loads(ran.stdout.splitlines()[-1]) == wanted


def test_names():
    def same(found, name, spec):
        return found is not None and (found[0], found[1].kind, found[1].axes) == (name, spec.kind, spec.axes)

    for architecture in ("OPTForCausalLM", "OPTModel"):
        for spec in table(tiny_config("350m", layers=12, tie_word_embeddings=False), architecture):
            stored, row = FLAX_NAMES.stored(spec.name)
            assert FLAX.transposes(row) == KERAS.transposes(row) == (spec.kind == "linear")
            assert same(FLAX_NAMES.hub(stored), spec.name, spec)
            if spec.path != "lm_head":
                stored, _ = TF_NAMES.stored(spec.name)
                for scope in ("", "tfopt_for_causal_lm/", "tfopt_for_causal_lm_1/", "tfopt_model/"):
                    full = spec.name if spec.name.startswith("model.") else f"model.{spec.name}"
                    assert same(TF_NAMES.hub(scope + stored), full, spec)
    assert TF_NAMES.stored("model.decoder.layers.10.fc1.weight")[0] == "model/decoder/layers.10/fc1/kernel:0"
    old = TF_NAMES.hub("x/model/decoder/embed_positions/weight:0")
    assert old and old[0] == "model.decoder.embed_positions.weight"
    for unknown in ("", "model.decoder.layers.0", "model.decoder.layers.01.fc1.kernel", "model.decoder.fc1.kernel",
                    "model.decoder.layers.-1.fc1.kernel", "model.decoder.layers.٣.fc1.kernel"):  # fmt: skip
        assert FLAX_NAMES.hub(unknown) is None
        assert TF_NAMES.hub(unknown.replace(".", "/")) is None
        with pytest.raises(ValueError, match="transformers' Flax OPT has no such tensor"):
            FLAX_NAMES.stored(unknown)


def test_transposed_copies(rng):
    for shape in ((1, 1), (3, 700), (513, 256), (1, 300), (0, 4)):
        for dtype in (np.float16, np.float32, np.float64, np.int8):
            array = (rng.standard_normal(shape) * 100).astype(dtype)
            copy = contiguous(array.T)
            assert copy.flags.c_contiguous and copy.dtype == array.dtype
            np.testing.assert_array_equal(copy, array.T)
            part = np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(dtype).reshape(shape)  # not aligned
            for copy in (contiguous(part), contiguous(part.T[2:]).T):
                assert copy.flags.aligned
            np.testing.assert_array_equal(contiguous(part), array)
            np.testing.assert_array_equal(contiguous(part.T[2:]), array.T[2:])
    for array in (np.zeros((4, 6))[::2], np.zeros((4, 6))[:, ::2].T, np.zeros((2, 3, 4)).T, np.zeros(())):
        np.testing.assert_array_equal(contiguous(array), array)


# Recognizing.


def test_several_layouts_in_one_folder(tmp_path):
    """As on the Hub: an error that lists them, a choice that is obeyed, and a stated order for from_pretrained."""
    config = tiny_config(layers=2)
    random_checkpoint(tmp_path, config, seed=1)
    import torch

    state = {n: torch.from_numpy(a) for n, a in safetensors.numpy.load_file(tmp_path / "model.safetensors").items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    there = r"safetensors \(model.safetensors\), torch \(pytorch_model.bin\); choose one \(--from, layout=\)"
    with pytest.raises(ValueError, match=there):
        Checkpoint(tmp_path)
    with pytest.raises(ValueError, match=there):
        convert(tmp_path, tmp_path / "new")
    for layout in ("safetensors", "torch"):
        assert Checkpoint(tmp_path, layout).layout == layout
        convert(tmp_path, tmp_path / layout, layout=layout)
        assert list(diff(tmp_path / layout, tmp_path, (None, layout))) == []
    with pytest.raises(FileNotFoundError, match="no weights of layout safetensors-tf; .* found: config.json"):
        Checkpoint(tmp_path, "safetensors-tf")
    with pytest.raises(ValueError, match="layout: found 'onnx', wanted one of safetensors"):
        Checkpoint(tmp_path, "onnx")
    facts = examine.examine(tmp_path)
    assert (facts["layout"], facts["beside"]) == ("safetensors", ["torch"])

    from opt_pt import OPTForCausalLM

    (tmp_path / "pytorch_model.bin").write_bytes(b"broken")  # not read
    OPTForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        OPTForCausalLM.from_pretrained(tmp_path, layout="torch")


def test_from_pretrained_reads_every_layout(tmp_path):
    from opt_pt import OPTForCausalLM

    given = random_checkpoint(tmp_path / "given", tiny_config("125m", layers=2, dtype="float32"))
    wanted = OPTForCausalLM.from_pretrained(given).state_dict()
    for layout in ("safetensors-tf", "safetensors-flax"):
        convert(given, tmp_path / layout, layout)
        found = OPTForCausalLM.from_pretrained(tmp_path / layout).state_dict()
        assert all(found[name].equal(wanted[name]) and found[name].is_contiguous() for name in wanted)


def test_complete_shards_win_over_a_stale_file(tmp_path):
    """opt-13b's flax_model.msgpack is older than the shards beside it."""
    config = tiny_config(layers=2)
    random_checkpoint(tmp_path / "stale", config, seed=1)
    random_checkpoint(tmp_path / "good", config, seed=2, shards="2KB")
    (tmp_path / "stale" / "model.safetensors").rename(tmp_path / "good" / "model.safetensors")
    said = r"reading model.safetensors.index.json, whose shards are all there, and not model.safetensors"
    with pytest.warns(UserWarning, match=said):
        checkpoint = Checkpoint(tmp_path / "good")
    assert len(checkpoint.files) > 2
    next(iter((tmp_path / "good").glob("model-00001*"))).unlink()
    with pytest.warns(UserWarning, match="reading model.safetensors, because shards of the index are missing, and not"):
        assert [file.name for file in Checkpoint(tmp_path / "good").files] == ["model.safetensors"]


def test_the_names_in_a_file_say_whose_it_is(tmp_path):
    """With or without metadata; where the two disagree, nobody knows which way a matrix lies."""
    given = random_checkpoint(tmp_path / "given", tiny_config(layers=1))
    for layout in ("safetensors", "safetensors-tf", "safetensors-flax"):
        folder = tmp_path / layout
        convert(given, folder, layout)
        path = folder / "model.safetensors"
        state = safetensors.numpy.load_file(path)
        for metadata in (None, {"format": "np"}):
            safetensors.numpy.save_file(state, path, metadata)
            assert Checkpoint(folder).layout == layout
        wrong = "tf" if layout == "safetensors" else "pt"
        safetensors.numpy.save_file(state, path, {"format": wrong})
        with pytest.raises(ValueError, match=f"model.safetensors: metadata gives format '{wrong}', but the names"):
            Checkpoint(folder)
    biases = {"model.decoder.layers.0.fc1.bias": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(biases, tmp_path / "given" / "model.safetensors", {"format": "flax"})
    assert Checkpoint(tmp_path / "given").layout == "safetensors-flax"


def test_the_same_tensor_under_two_names(tmp_path):
    random_checkpoint(tmp_path, tiny_config(layers=1), layout="safetensors-tf")
    state = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    state["model/decoder/embed_positions/weight:0"] = state["model/decoder/embed_positions/embeddings:0"]
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors", {"format": "tf"})
    with pytest.raises(ValueError, match="model.safetensors: holds model.decoder.embed_positions.weight twice"):
        Checkpoint(tmp_path)


class FakeHub:
    """A repository, and what was asked of it."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache

    def snapshot_download(self, repository: str, allow_patterns: list[str], **_: object) -> str:
        self.cache.mkdir(exist_ok=True)
        names = [str(p.relative_to(self.repository)) for p in self.repository.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):  # as the Hub itself does it
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / name).write_bytes((self.repository / name).read_bytes())
        return str(self.cache)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shards", ["5GB", "900B"])
@pytest.mark.parametrize("layout", WRITABLE)
def test_a_hub_name_brings_its_tokenizer(layout, shards, tmp_path, monkeypatch):
    """convert fetches config, generation config, tokenizer, and the weights of one layout; from_pretrained no more than
    config and weights."""
    import huggingface_hub

    repository = random_checkpoint(tmp_path / "repository", tiny_config(layers=2), layout=layout, shards=shards)
    weights = set(Checkpoint(repository).files)
    (repository / "flax_model.msgpack").touch()
    (repository / "README.md").touch()
    hub = FakeHub(repository, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    convert("facebook/opt-tiny", tmp_path / "new", layout=layout)
    assert {"vocab.json", "merges.txt", "generation_config.json"} <= set(os.listdir(tmp_path / "new"))
    assert {path.relative_to(repository).parts[0] for path in weights} <= set(os.listdir(hub.cache))
    assert "README.md" not in os.listdir(hub.cache)
    assert list(diff(tmp_path / "new", repository, (None, layout))) == []


def test_every_file_of_the_tokenizer_comes_along(tmp_path, monkeypatch):
    """From a folder and from the Hub: whatever the tokenizer reads, `added_tokens.json` of old fine-tunings too."""
    import huggingface_hub

    given = random_checkpoint(tmp_path / "given", tiny_config(layers=1))
    files = {"generation_config.json", "added_tokens.json", *TOKENIZER_FILES}
    for name in files:
        (given / name).write_text("{}")
    convert(given, tmp_path / "from a folder")
    hub = FakeHub(given, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    convert("facebook/opt-tiny", tmp_path / "from the hub")
    for folder in (tmp_path / "from a folder", tmp_path / "from the hub"):
        assert files <= set(os.listdir(folder))


def test_of_a_hub_repository_only_the_preferred_layout_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    repository = random_checkpoint(tmp_path / "repository", tiny_config(layers=2))
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        (repository / name).touch()
    hub = FakeHub(repository, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    from opt_pt import OPTForCausalLM

    OPTForCausalLM.from_pretrained("facebook/opt-tiny")
    assert sorted(os.listdir(hub.cache)) == ["config.json", "model.safetensors"]
    (hub.cache / "pytorch_model.bin").touch()  # fetched on another day, in another way
    convert("facebook/opt-tiny", tmp_path / "new")


# Planning.


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("size", "width", "shards"), [("125m", 24, "5GB"), ("125m", 24, "60KB"), ("1.3b", 128, "1MB")])
@pytest.mark.parametrize("layout", WRITABLE)
def test_the_plan_is_what_comes(layout, size, width, shards, tmp_path):
    config = tiny_config(size, layers=3, hidden_size=2 * width, ffn_dim=4 * width)
    given = random_checkpoint(tmp_path / "given", config)
    if refused(layout, config, size, given, tmp_path / "new"):
        return
    foreseen = plan(given, tmp_path / "new", layout, max_shard_size=shards)
    assert not (tmp_path / "new").exists()
    convert(given, tmp_path / "new", layout, max_shard_size=shards)
    assert foreseen.exact == (LAYOUTS[layout].plan is not None)
    if foreseen.exact:
        assert dict(foreseen.files) == {name: len(data) for name, data in contents(tmp_path / "new").items()}
    assert foreseen.seconds is not None and foreseen.seconds > 0
    largest = max(entry.nbytes for entry in Checkpoint(given).values())
    assert foreseen.memory == 2 * largest
    assert plan(given, tmp_path / "new", layout, "float32" if layout else None, shards).memory == 4 * largest


def sparse(folder: Path, size: str, shards: str) -> int:
    """A checkpoint of a published size: headers, and holes where the numbers would be. Returns its bytes."""
    config = OPTConfig.from_size(size, dtype="float16")
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json())
    sources = [Source(s.name, s.shape, "float16", lambda: np.empty(0)) for s in table(config)]
    total, weight_map = 0, {}
    for name, shard in name_shards("model.safetensors", sources, parse_size(shards)).items():
        head = safetensors_file._head(shard, "pt")
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(t.nbytes for t in shard))
        total += sum(t.nbytes for t in shard)
        weight_map |= dict.fromkeys((t.name for t in shard), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


@pytest.mark.parametrize(
    ("size", "nbytes"), [pytest.param("66b", 131_439_403_008, marks=pytest.mark.slow), ("175b", 349_208_936_448)]
)
@pytest.mark.parametrize("layout", [name for name in WRITABLE if LAYOUTS[name].plan])
def test_planning_the_largest(size, nbytes, layout, tmp_path):
    """From headers alone: files as large as the real ones, of holes."""
    assert sparse(tmp_path / "given", size, "10GB") == nbytes
    foreseen = plan(tmp_path / "given", tmp_path / "new", layout, max_shard_size="40GB")
    weights = sum(bytes for name, bytes in foreseen.files if not name.endswith(".json"))
    assert nbytes <= weights < nbytes + 3_000_000  # numbers, and headers
    assert all(bytes < 40e9 + 1e6 for _, bytes in foreseen.files) == (layout not in ONE_FILE)
    vocabulary, hidden, ffn = 50272, SIZES[size]["hidden_size"], SIZES[size]["ffn_dim"]
    assert foreseen.memory == 2 * 2 * max(vocabulary * hidden, ffn * hidden)


# Casting.


@pytest.mark.parametrize(("held", "wanted"), [("float32", "float16"), ("float64", "float32"), ("float32", "bfloat16")])
def test_overflow_is_named(held, wanted, tmp_path):
    given = random_checkpoint(tmp_path / "given", tiny_config(layers=1, dtype=held))
    state = safetensors.numpy.load_file(given / "model.safetensors")
    state["model.decoder.layers.0.fc2.bias"][:2] = np.finfo(held).max
    state["model.decoder.layers.0.fc1.bias"][0] = np.inf  # is infinite already
    safetensors.numpy.save_file(state, given / "model.safetensors")
    said = rf"model.decoder.layers.0.fc2.bias: 2 of 8 numbers overflow {wanted}"
    with pytest.raises(ValueError, match=said):
        convert(given, tmp_path / "new", dtype=wanted)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["safetensors-tf", "safetensors-flax"])
def test_a_cast_is_one_cast(layout, tmp_path):
    given = random_checkpoint(tmp_path / "given", tiny_config(layers=1, dtype="float64"))
    convert(given, tmp_path / "new", layout, dtype="float16")
    for name, entry in Checkpoint(given).items():
        np.testing.assert_array_equal(Checkpoint(tmp_path / "new")[name].read(), entry.read().astype(np.float16))
    assert OPTConfig.from_pretrained(tmp_path / "new").dtype == "float16"


# Stopping.


def files_of(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", WRITABLE)
def test_a_read_error_leaves_nothing(layout, tmp_path, monkeypatch):
    given = random_checkpoint(tmp_path / "given", tiny_config(layers=2), layout=layout)
    before = contents(given)
    names = list(Checkpoint(given))
    get = Checkpoint.__getitem__

    def fail() -> np.ndarray:
        raise OSError(errno.EIO, "Input/output error")

    for bad in (names[0], names[len(names) // 2], names[-1]):

        def broken(self: Checkpoint, name: str, bad: str = bad) -> Entry:
            entry = get(self, name)
            return dataclasses.replace(entry, read=fail, map=fail) if name == bad else entry

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "__getitem__", broken)
            with pytest.raises(OSError, match="Input/output error"):
                convert(given, tmp_path / "new", layout)
        assert files_of(tmp_path) == ["given"]
    assert contents(given) == before
    convert(given, tmp_path / "new", layout)
    assert list(diff(given, tmp_path / "new")) == []


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("old", [False, True], ids=["new folder", "over an old one"])
@pytest.mark.parametrize("layout", WRITABLE)
def test_a_full_disk_at_every_write(layout, old, tmp_path, monkeypatch):
    """Every write of Python's own files in turn says that the disk is full."""
    given, new = source(tmp_path / "given", tiny_config(layers=1), (layout,)), tmp_path / "new"
    if old:
        random_checkpoint(new, tiny_config(layers=1), seed=9)
    before = {name: contents(tmp_path / name) for name in files_of(tmp_path)}
    real, writes, stop_at = builtins.open, 0, 0

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __iter__(self):
            return iter(self.file)

        def write(self, data):
            nonlocal writes
            writes += 1
            if writes > stop_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    def opened(file, mode="r", *args, **kwargs):
        file = real(file, mode, *args, **kwargs)
        return Full(file) if set(mode) & set("wax+") else file

    for stop_at in [*range(0, 40), *range(40, 4000, 97)]:  # noqa: B007
        writes = 0
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", opened)
            try:
                convert(given, new, layout)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC and str(new) in str(error)
        assert {name: contents(tmp_path / name) for name in files_of(tmp_path)} == before
    else:
        raise AssertionError("never finished")
    assert contents(given) == before["given"]
    assert list(diff(given, new)) == []
    assert files_of(tmp_path) == ["given", "new"]


@pytest.mark.parametrize("layout", WRITABLE)
def test_a_file_that_may_not_grow(layout, tmp_path):
    """A limit of the kernel's, which stops libraries in C too: at sizes up to the largest file's."""
    given = source(tmp_path / "given", tiny_config(layers=2, vocab_size=400), (layout,))
    program = """
        import resource, sys, warnings
        from pathlib import Path
        from opt_common.checkpoints.convert import convert
        warnings.simplefilter("ignore")
        given, new, layout = sys.argv[1:]
        convert(given, f"{new}-whole", layout)
        largest = max(path.stat().st_size for path in Path(f"{new}-whole").rglob("*") if path.is_file())
        for part in range(12):
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest * part // 12, resource.RLIM_INFINITY))
            try:
                convert(given, new, layout)
            except (OSError, ValueError) as error:
                said = str(error)
            else:
                raise AssertionError(f"{largest * part // 12} of {largest} were enough")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert new in said, said
            assert not Path(new).exists() and not list(Path(new).parent.glob(".*")), said
        convert(given, new, layout)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(given), str(tmp_path / "new"), layout]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert contents(tmp_path / "new") == contents(tmp_path / "new-whole")


class Stop(Exception):
    pass


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("old", [False, True], ids=["new folder", "over an old one"])
@pytest.mark.parametrize("layout", WRITABLE)
def test_stopped_between_any_two_steps(layout, old, tmp_path, monkeypatch):
    """Before each call that moves, makes or removes a file, in turn, everything ends: what is read then is one whole
    checkpoint, and the next conversion finishes and leaves nothing beside."""
    few = {"enable_bias": False, "layer_norm_elementwise_affine": False} if layout == "orbax" else {}  # files, that is
    given, before = (
        source(tmp_path / x, tiny_config(layers=1, **few), (layout,), i) for i, x in enumerate(("given", "before"))
    )
    convert(before, tmp_path / "converted", layout)
    for stop_at in range(200):
        new, calls = tmp_path / f"{stop_at}" / "new", 0
        if old:
            shutil.copytree(tmp_path / "converted", new)

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
                                 (Path, "mkdir"), (Path, "write_bytes"), (shutil, "rmtree")):  # fmt: skip
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                convert(given, new, layout)
                finished = True
            except Stop:
                finished = False
        if new.exists():
            assert list(diff(new, given)) == [] or (not finished and list(diff(new, before)) == [])
        convert(given, new, layout)
        assert list(diff(new, given)) == []
        assert files_of(new.parent) == ["new"]
        assert not [name for name in files_of(new) if name.startswith(".")]
        if finished:
            return
    raise AssertionError("the conversion never finished")


@pytest.mark.parametrize(
    "layout",
    # a file that we write, one that a library writes, and a folder; the others are slow
    [x if x in ("safetensors", "tf-h5", "orbax") else pytest.param(x, marks=pytest.mark.slow) for x in WRITABLE],
)
def test_killed_at_random(layout, tmp_path):
    """kill -9: what is there is complete, the source is untouched, and a rerun finishes and says what it cleaned."""
    given, new = source(tmp_path / "given", tiny_config(layers=6, vocab_size=3000), (layout,)), tmp_path / "new"
    before, rng = contents(given), np.random.default_rng(0)
    program = """
        import sys, warnings
        from opt_common.checkpoints.convert import convert
        print("ready", flush=True)
        while True:
            convert(sys.argv[1], sys.argv[2], sys.argv[3])
            print("done", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(given), str(new), layout]
    left = 0
    for turn in range(5):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert run.stdout is not None
        run.stdout.readline()
        if turn > 1:
            run.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
        left += (new / ".saving").exists() or (tmp_path / ".new.saving").exists()
        if new.exists():
            assert list(diff(given, new)) == []
        assert contents(given) == before
    command = [sys.executable, "-m", "opt_common.cli", "convert", str(given), str(new), "--to", layout]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert list(diff(given, new)) == []
    assert files_of(tmp_path) == ["given", "new"]
    assert not [name for name in files_of(new) if name.startswith(".")]


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_what_a_killed_run_left_is_named_and_cleaned(place, tmp_path):
    given = random_checkpoint(tmp_path / "given", tiny_config(layers=1))
    left = tmp_path / ".new.saving" if place == "beside" else tmp_path / "new" / ".saving"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    left.with_name(f"{left.name}.lock").touch()
    command = [sys.executable, "-m", "opt_common.cli", "convert", str(given), str(tmp_path / "new")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"note: {left}: removed, an interrupted save left it" in ran.stderr
    assert not left.exists() and files_of(tmp_path) == ["given", "new"]


def test_two_savers_do_not_mix(tmp_path):
    config, array = tiny_config(layers=1), np.zeros(4, np.float32)
    started, go_on = threading.Event(), threading.Event()

    def slow() -> np.ndarray:
        started.set()
        go_on.wait(30)
        return array

    for folder in (tmp_path / "new", tmp_path / "old"):
        started.clear(), go_on.clear()
        if folder.name == "old":
            random_checkpoint(folder, config)
        first = threading.Thread(target=save_checkpoint, args=(folder, [Source("t", (4,), "float32", slow)], {}))
        first.start()
        assert started.wait(30)
        with pytest.raises(BlockingIOError, match=f"{folder.name}: another process is saving into it"):
            save_checkpoint(folder, [Source("u", (4,), "float32", lambda: array)], {})
        go_on.set()
        first.join()
        assert list(Checkpoint(folder)) == ["t"]
        save_checkpoint(folder, [Source("u", (4,), "float32", lambda: array)], {})
        assert list(Checkpoint(folder)) == ["u"]
        assert not [name for name in files_of(folder) if name.startswith(".")]


# Looking.


def test_sizes_have_names():
    for size in SIZES:
        assert examine.size_name(OPTConfig.from_size(size)) == size
    assert examine.size_name(OPTConfig.from_size("125m", num_hidden_layers=11)) is None


def test_examine(tmp_path):
    folder = random_checkpoint(tmp_path / "given", tiny_config("350m", layers=2), shards="2KB")
    facts = examine.examine(folder, sha256=True, check=True)
    assert (facts["layout"], facts["dtypes"], facts["misfits"], facts["not_finite"]) == (
        "safetensors", {"float16": facts["tensors"]}, [], {})  # fmt: skip
    assert facts["files"] == len(facts["shards"]) > 2
    assert facts["shards"] == {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    assert facts["bytes"] == sum(facts["shards"].values())
    convert(folder, tmp_path / "tf", "safetensors-tf")
    again = examine.examine(tmp_path / "tf", sha256=True)
    assert again["sha256"] == facts["sha256"] and again["layout"] == "safetensors-tf"
    assert again["parameters"] == facts["parameters"] == sum(s.size for s in table(tiny_config("350m", layers=2)))


def test_examine_lists_what_is_wrong(tmp_path):
    folder = random_checkpoint(tmp_path / "given", tiny_config(layers=2))
    state = safetensors.numpy.load_file(folder / "model.safetensors")
    del state["model.decoder.layers.1.fc1.bias"]
    state["model.decoder.layers.0.fc1.bias"][:3] = [np.nan, np.inf, -np.inf]
    state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    facts = examine.examine(folder, check=True)
    assert facts["misfits"] == ["model.decoder.layers.1.fc1.bias: missing, wanted [32]"]
    assert facts["not_finite"] == {"model.decoder.layers.0.fc1.bias": 3}
    assert facts["parameters"] == sum(a.size for n, a in state.items() if n != "lm_head.weight")


def test_diff(tmp_path):
    config = tiny_config(layers=2, dtype="float32")
    a = random_checkpoint(tmp_path / "a", config)
    state = safetensors.numpy.load_file(a / "model.safetensors")

    def changed(name: str, change) -> list[examine.Difference]:
        other = {k: v.copy() for k, v in state.items()}
        other = change(other) or other
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config.to_json())
        safetensors.numpy.save_file(other, tmp_path / name / "model.safetensors")
        return list(diff(a, tmp_path / name))

    def add(other):
        other["model.decoder.layers.1.fc2.weight"][3, 4] += 0.5

    def one_bit(other):
        other["model.decoder.layers.1.fc2.bias"].view(np.uint32)[0] ^= 1

    def nans(other):
        other["model.decoder.layers.1.fc2.bias"][0] = np.nan

    fc2, bias = "model.decoder.layers.1.fc2.weight", "model.decoder.layers.1.fc2.bias"
    assert changed("same", lambda other: None) == []
    [found] = changed("value", add)
    assert (found.name, found.what, found.largest) == (fc2, "values", pytest.approx(0.5, rel=1e-6))
    [found] = changed("bit", one_bit)
    assert (found.name, found.what) == (bias, "values") and 0 < found.largest < 1e-6
    [found] = changed("nan", nans)
    assert (found.what, found.largest) == ("values", np.inf)
    wide = changed("wide", lambda other: {k: v.astype(np.float64) for k, v in other.items()})
    assert {(d.what, d.largest) for d in wide} == {("dtype", 0.0)} and len(wide) == len(state)
    [found] = changed("head", lambda other: other | {"lm_head.weight": -other["model.decoder.embed_tokens.weight"]})
    assert (found.name, found.what, found.text) == ("lm_head.weight", "missing", f"not in {a}")
    assert changed("tied", lambda other: other | {"lm_head.weight": other["model.decoder.embed_tokens.weight"]}) == []

    (tmp_path / "same" / "config.json").write_text(dataclasses.replace(config, activation_function="gelu").to_json())
    [found] = diff(a, tmp_path / "same")
    assert (found.name, found.what, found.text) == ("activation_function", "config", "'relu' and 'gelu'")
    b = random_checkpoint(tmp_path / "b", tiny_config(layers=3, dtype="float32"))
    assert {d.what for d in diff(a, b)} == {"config", "values", "missing"}
