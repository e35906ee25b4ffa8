"""Meta's own checkpoints, made here by the table of their names, in every form that metaseq and fairscale write; and
what is written for metaseq, taken apart by the rules by which transformers converts it."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import tracemalloc
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import CONFIGS, SMALL, make_reference
from opt_common.checkpoints.layouts.metaseq import METASEQ
from opt_common.checkpoints.layouts.torch import STATE_DICT
from opt_common.checkpoints.tensors import Source, numpy_dtype
from opt_common.config import OPTConfig

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def hub() -> dict[str, State]:
    """By a config's name, the Hub's tensors without `model.`, in float16."""
    made = {}
    for name in ("pre-norm", "350m", "untied", "removed-final-norm"):
        state = {
            key.removeprefix("model."): t.half() for key, t in make_reference(**CONFIGS[name]).state_dict().items()
        }
        if name != "untied":
            del state["lm_head.weight"]
        made[name] = state
    return made


def meta_names(state: State, fused: bool) -> State:
    """The Hub's tensors as metaseq calls them."""
    made: State = {"decoder.version": torch.tensor([3.0] if fused else 3.0)}
    for name, t in state.items():
        if name.startswith("decoder.final_layer_norm"):
            made[name.replace("final_layer_norm", "layer_norm")] = t
        elif name.startswith("decoder.project_"):
            made[name.replace(".weight", "_dim.weight")] = t
        elif name == "lm_head.weight":
            made["decoder.output_projection.weight"] = t
        elif fused and "k_proj" in name:
            three = [state[name.replace("k_proj", p)] for p in ("k_proj", "v_proj", "q_proj")]
            made[name.replace("k_proj", "qkv_proj")] = torch.cat(three)
        elif not fused or not re.search("[vq]_proj", name):
            made[name] = t
    return made


def sliced(state: State, parts: int) -> list[State]:
    """What each of `parts` model parallel workers has of metaseq's tensors."""
    made: list[State] = [{} for _ in range(parts)]
    for name, t in state.items():
        if "qkv_proj" in name:
            thirds = [third.chunk(parts) for third in t.chunk(3)]
            pieces = [torch.cat([third[p] for third in thirds]) for p in range(parts)]
        elif re.search(r"embed_tokens|output_projection|fc1|[kvq]_proj", name):
            pieces = [piece.clone() for piece in t.chunk(parts)]
        elif re.search(r"(fc2|out_proj)\.weight", name):
            pieces = [piece.clone() for piece in t.chunk(parts, dim=1)]
        else:
            pieces = [t.clone() for _ in range(parts)]
        for part, piece in zip(made, pieces, strict=True):
            part[name] = piece
    return made


def flattened(state: State, world: int) -> list[dict[str, Any]]:
    """What each of `world` FSDP workers saves of a worker's tensors: a row for each layer, one for the rest."""
    models: list[State] = [{"decoder.version": state["decoder.version"]} for _ in range(world)]
    metadata: list[dict[str, Any]] = [{"param_metadata": [], "buffer_names": ["decoder.version"]} for _ in range(world)]
    layers = sorted({name.split(".")[2] for name in state if name.startswith("decoder.layers.")}, key=int)
    for path in ["", *(f"decoder.layers.{layer}" for layer in layers)]:
        prefix = path + "." if path else ""
        names = [name for name in state if name != "decoder.version"]
        names = [n for n in names if (n.startswith(prefix) if path else not n.startswith("decoder.layers."))]
        head = "decoder.output_projection.weight"
        shared = [("decoder.embed_tokens.weight", head)] if not path else []
        names = [name for name in names if name != head]
        row = torch.cat([state[name].reshape(-1) for name in names])
        chunks = list(row.chunk(world))
        chunks += [row[:0]] * (world - len(chunks))
        for model, meta, chunk in zip(models, metadata, chunks, strict=True):
            padding = len(chunks[0]) - len(chunk)
            model[f"{prefix}flat_param_0"] = torch.nn.functional.pad(chunk, [0, padding])
            described = {
                "names": [name.removeprefix(prefix) for name in names],
                "shapes": [state[name].shape for name in names],
                "numels": [state[name].numel() for name in names],
                "padding": padding,
            }
            meta["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": described},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": shared,
                }
            )
    return [{"model": m, "shard_metadata": meta} for m, meta in zip(models, metadata, strict=True)]


def arguments(config: str) -> argparse.Namespace:
    changes = SMALL | CONFIGS[config]
    return argparse.Namespace(
        _name="transformer_lm_megatron",
        decoder_attention_heads=changes["num_attention_heads"],
        decoder_normalize_before=changes.get("do_layer_norm_before", True),
        activation_fn="relu",
        lr=[0.0006],
    )


def saved(state: dict[str, Any], config: str, path: Path, **extra: Any) -> Path:
    tree = {"cfg": {"_name": None, "model": arguments(config), "common": {"seed": 1}}, "args": None}
    torch.save(tree | {"extra_state": {}, "optimizer_history": [{"num_updates": 3}]} | state | extra, path)
    return path


def fabricate(state: State, config: str, folder: Path, fused: bool, parts: int, world: int) -> Path:
    whole = meta_names(state, fused)
    for p, part in enumerate(sliced(whole, parts) if parts else [whole]):
        middle = f"-model_part-{p}" if parts else ""
        if not world:
            saved({"model": part}, config, folder / f"reshard{middle}.pt")
        else:
            for s, shard in enumerate(flattened(part, world)):
                saved(shard, config, folder / f"checkpoint_last{middle}-shard{s}.pt", last_optimizer_state={"a": 1})
    return folder


def agree(main: Path, wanted: State) -> None:
    files, entries = METASEQ.read(main)
    assert entries.keys() == wanted.keys()
    for name, entry in entries.items():
        assert (entry.shape, entry.dtype) == (tuple(wanted[name].shape), "float16"), name
        for array in (entry.read(), entry.map()):
            assert (array.shape, array.dtype) == (entry.shape, numpy_dtype(entry.dtype)), name
            assert array.tobytes() == wanted[name].contiguous().numpy().tobytes(), name
        assert entry.file in files


FORMS = [(0, 0), (1, 0), (2, 0), (4, 0), (0, 1), (0, 3), (1, 2), (2, 3), (4, 16)]


@pytest.mark.parametrize(("parts", "world"), FORMS)
@pytest.mark.parametrize("config", ["pre-norm", "350m"])
@pytest.mark.parametrize("fused", [True, False])
def test_reads_every_form(fused, config, parts, world, hub, tmp_path):
    if config == "350m" and parts > 1:
        parts = 1  # it never was model parallel: project_in_dim is not sliced
    folder = fabricate(hub[config], config, tmp_path, fused, parts, world)
    main = METASEQ.find(folder)
    assert main is not None
    assert all(METASEQ.find(path) == main for path in folder.iterdir())
    agree(main, hub[config])
    files, entries = METASEQ.read(main)
    assert set(files) == set(folder.iterdir())
    wanted = OPTConfig(**{k: v for k, v in (SMALL | CONFIGS[config]).items() if k != "init_std"}, dtype="float16")
    assert METASEQ.config(main, entries) == wanted


def test_the_order_is_keys_values_queries(tmp_path):
    """By hand, with the numbers of the rows: two parts, width 4."""
    for part in range(2):
        rows = [10 + 2 * part, 11 + 2 * part, 20 + 2 * part, 21 + 2 * part, 30 + 2 * part, 31 + 2 * part]
        bias = torch.tensor(rows, dtype=torch.float32)
        model = {"decoder.layers.0.self_attn.qkv_proj.bias": bias}
        torch.save({"model": model}, tmp_path / f"reshard-model_part-{part}.pt")
    entries = METASEQ.read(tmp_path / "reshard-model_part-0.pt")[1]
    read = {name.split(".")[-2]: entry.read().tolist() for name, entry in entries.items()}
    assert read == {"k_proj": [10, 11, 12, 13], "v_proj": [20, 21, 22, 23], "q_proj": [30, 31, 32, 33]}


@pytest.mark.parametrize("kind", ["equal", "shared", "untied"])
@pytest.mark.parametrize("parts", [0, 2])
def test_a_stored_head(parts, kind, hub, tmp_path):
    """One in the same storage is dropped; any other is `lm_head.weight`, which the table compares to the embedding."""
    state = hub["untied" if kind == "untied" else "pre-norm"]
    whole = meta_names(state, True)
    head = "decoder.output_projection.weight"
    if kind == "equal":
        whole[head] = whole["decoder.embed_tokens.weight"].clone()
    for p, part in enumerate(sliced(whole, parts) if parts else [whole]):
        if kind == "shared":
            part[head] = part["decoder.embed_tokens.weight"]
        saved({"model": part}, "pre-norm", tmp_path / (f"reshard-model_part-{p}.pt" if parts else "reshard.pt"))
    main = METASEQ.find(tmp_path)
    assert main is not None
    wanted = state | ({"lm_head.weight": whole["decoder.embed_tokens.weight"]} if kind == "equal" else {})
    agree(main, wanted)


def test_omegaconf_without_omegaconf(hub, tmp_path, monkeypatch):
    """A DictConfig, as omegaconf pickles it, gives its heads, though no omegaconf is here."""
    module = types.ModuleType("omegaconf.dictconfig")

    class Node:
        def __init__(self, **state: Any) -> None:
            self.__dict__.update(state)

    Node.__module__, Node.__qualname__ = module.__name__, "Node"
    module.Node = Node  # type: ignore[attr-defined]
    for name in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.setitem(sys.modules, name, module)
    model = Node(_content={"decoder_attention_heads": Node(_val=4), "decoder_normalize_before": Node(_val=True)})
    cfg = Node(_metadata=Node(ref_type=Any, object_type=dict), _content={"model": model})
    torch.save({"model": meta_names(hub["pre-norm"], True), "cfg": cfg}, tmp_path / "consolidated.pt")
    for name in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.delitem(sys.modules, name)
    main = METASEQ.find(tmp_path)
    assert main == tmp_path / "consolidated.pt"
    assert METASEQ.config(main, METASEQ.read(main)[1]).num_attention_heads == 4


def test_configs_of_shapes(hub, tmp_path):
    """Without arguments: the published sizes are known by their shapes, any other is asked for."""
    torch.save({"model": meta_names(hub["pre-norm"], True)}, tmp_path / "restored.pt")
    main = tmp_path / "restored.pt"
    entries = METASEQ.read(main)[1]
    with pytest.raises(ValueError, match=r"restored.pt: cannot tell the number of heads: 3 layers of width 64"):
        METASEQ.config(main, entries)
    shaped = {name: types.SimpleNamespace(shape=entry.shape, dtype="float16") for name, entry in entries.items()}
    for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"):
        wanted = OPTConfig.from_size(size, dtype="float16")
        shapes = {
            "embed_tokens.weight": (50272, wanted.embed_dim),
            "embed_positions.weight": (2050, wanted.hidden_size),
            **{f"layers.{i}.fc1.weight": (wanted.ffn_dim, wanted.hidden_size) for i in range(wanted.num_hidden_layers)},
        }
        fake = {f"decoder.{n}": types.SimpleNamespace(shape=shape, dtype="float16") for n, shape in shapes.items()}
        fake |= {n: shaped[n] for n in ("decoder.layers.0.fc1.bias", "decoder.layers.0.final_layer_norm.weight")}
        if wanted.has_final_layer_norm:
            fake["decoder.final_layer_norm.weight"] = shaped["decoder.final_layer_norm.weight"]
        assert METASEQ.config(main, fake) == wanted  # type: ignore[arg-type]
    del shaped["decoder.layers.0.fc1.weight"]
    with pytest.raises(ValueError, match=r"restored.pt: decoder.layers.0.fc1.weight: found none"):
        METASEQ.config(main, shaped)  # type: ignore[arg-type]


def test_a_final_norm_that_was_removed(hub, tmp_path):
    state = meta_names(hub["removed-final-norm"], True)
    main = saved({"model": state}, "removed-final-norm", tmp_path / "restored.pt")
    config = METASEQ.config(main, METASEQ.read(main)[1])
    assert (config.do_layer_norm_before, config.has_final_layer_norm) == (True, False)
    heads = argparse.Namespace(decoder_attention_heads=4)
    main = saved({"model": state, "cfg": {"model": heads}}, "removed-final-norm", tmp_path / "restored.pt")
    with pytest.raises(ValueError, match="cannot tell whether norms come before or after"):
        METASEQ.config(main, METASEQ.read(main)[1])


def test_one_tensor_at_a_time(tmp_path):
    """Of 4 parts, 3 shards each."""
    whole = {"decoder.version": torch.tensor([3.0])}
    whole["decoder.embed_tokens.weight"] = torch.zeros(400, 400)
    whole |= {f"decoder.layers.{i}.fc{n}.weight": torch.zeros(400, 400) for i in range(4) for n in (1, 2)}
    for p, part in enumerate(sliced(whole, 4)):
        for s, shard in enumerate(flattened(part, 3)):
            torch.save(shard, tmp_path / f"checkpoint_last-model_part-{p}-shard{s}.pt")
    main = METASEQ.find(tmp_path)
    assert main is not None
    entries = METASEQ.read(main)[1]
    tracemalloc.start()
    for entry in entries.values():
        entry.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 400 * 400 * 4


# --- writing ---


def sources(state: State) -> list[Source]:
    arrays = {f"model.{n}" if n.startswith("decoder.") else n: t.numpy() for n, t in state.items()}
    return [Source(name, a.shape, str(a.dtype), lambda a=a: a) for name, a in arrays.items()]


def by_transformers_rules(path: Path) -> State:
    """Its conversion of `restored.pt`: what it drops, renames and cuts."""
    state = torch.load(path, weights_only=True)["model"]
    state.pop("decoder.version")
    state.pop("decoder.output_projection.weight", None)
    renamed = {
        "decoder.project_in_dim.weight": "decoder.project_in.weight",
        "decoder.project_out_dim.weight": "decoder.project_out.weight",
        "decoder.layer_norm.weight": "decoder.final_layer_norm.weight",
        "decoder.layer_norm.bias": "decoder.final_layer_norm.bias",
    }
    for old, new in renamed.items():
        if old in state:
            state[new] = state.pop(old)
    for name in list(state):
        if ".qkv_proj." in name:
            value = state.pop(name)
            third = value.shape[0] // 3
            state[name.replace("qkv", "k")] = value[:third]
            state[name.replace("qkv", "v")] = value[third : 2 * third]
            state[name.replace("qkv", "q")] = value[2 * third :]
    return state


@pytest.mark.parametrize("config", ["pre-norm", "350m", "untied", "removed-final-norm"])
def test_what_is_written(config, hub, tmp_path):
    state = hub[config]
    opt = OPTConfig(**{k: v for k, v in (SMALL | CONFIGS[config]).items() if k != "init_std"}, dtype="float16")
    told: list[int] = []
    assert METASEQ.write(tmp_path, sources(state), opt, 1000, told.append) == ["restored.pt"]
    assert sum(told) == sum(t.nbytes for t in state.values())
    assert METASEQ.plan(sources(state), opt, 1000) == [("restored.pt", (tmp_path / "restored.pt").stat().st_size)]
    judged = by_transformers_rules(tmp_path / "restored.pt")
    wanted = {name: t for name, t in state.items() if name != "lm_head.weight"}
    assert judged.keys() == wanted.keys()
    for name, t in judged.items():
        assert torch.equal(t, wanted[name]), name
    raw = torch.load(tmp_path / "restored.pt", weights_only=True)
    fused = "decoder.layers.0.self_attn.qkv_proj.weight" in raw["model"]
    assert fused == (config != "350m")
    assert raw["cfg"]["model"]["decoder_attention_heads"] == 4
    main = METASEQ.find(tmp_path)
    assert main is not None
    agree(main, state)
    again = METASEQ.config(main, METASEQ.read(main)[1])
    assert again == OPTConfig(**{**vars(opt), "tie_word_embeddings": True})


def test_a_state_dict(hub, tmp_path):
    """Of this project's PyTorch model, there and back; and what is written is read by PyTorch."""
    from opt_pt import OPTForCausalLM

    opt = OPTConfig(**{k: v for k, v in SMALL.items() if k != "init_std"})
    model = OPTForCausalLM(opt)
    torch.save(model.state_dict(), tmp_path / "any name.pt")
    files, entries = STATE_DICT.read(tmp_path / "any name.pt")
    assert files == [tmp_path / "any name.pt"]
    for name, t in model.state_dict().items():
        assert entries[name].read().tobytes() == t.numpy().tobytes()
    given = [Source(name, e.shape, e.dtype, e.read) for name, e in entries.items()]
    assert STATE_DICT.write(tmp_path, given, None, 1, lambda _: None) == ["model.pt"]
    assert STATE_DICT.plan(given, None, 1) == [("model.pt", (tmp_path / "model.pt").stat().st_size)]
    read = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(read[name], t) for name, t in model.state_dict().items())
    model.load_state_dict(read)
    assert METASEQ.find(tmp_path) is None


# --- what is wrong ---


def broken(change: str, hub: dict[str, State], folder: Path) -> None:
    whole = meta_names(hub["pre-norm"], True)
    parts = sliced(whole, 2)
    fc1 = "decoder.layers.1.fc1.weight"
    if change == "replicated":
        parts[1]["decoder.layers.1.final_layer_norm.bias"][3] += 1
    elif change == "shape":
        parts[1][fc1] = parts[1][fc1][:, :-1].clone()
    elif change == "dtype":
        parts[1][fc1] = parts[1][fc1].float()
    elif change == "names":
        del parts[1][fc1]
    elif change == "rows":
        parts[0]["decoder.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(97).half()
        parts[1]["decoder.layers.0.self_attn.qkv_proj.bias"] = torch.zeros(97).half()
    elif change == "number":
        parts[0]["decoder.layers.0.fc1.bias"] = 3  # type: ignore[assignment]
    elif change == "scalar":
        for part in parts:
            part["decoder.layers.0.fc2.weight"] = torch.zeros(3).half()
    for p, part in enumerate(parts):
        shards = [{"model": part}]
        if change.startswith("flat"):
            shards = flattened(part, 2)
            described = shards[0]["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"]
            if change == "flat names":
                described["numels"][0] += 1
            elif change == "flat sum":
                for key in ("names", "shapes", "numels"):
                    described[key] = described[key][:-1]
            elif change == "flat lengths":
                described["names"] = described["names"][1:]
            elif change == "flat name":
                described["names"][3] = "self\nattn"
            elif change == "flat deep":
                described["names"][3] = described["padding"] = functools.reduce(lambda deep, _: (deep,), range(300), ())
            elif change == "flat huge":
                described["shapes"][0], described["numels"][0] = torch.Size([2**40, 2**20]), 2**60
            elif change == "flat negative":
                described["shapes"][0], described["numels"][0] = (-1, -5), 5
            elif change == "flat padding":
                described["padding"] = 10**9
            elif change == "flat none":
                del shards[1]["shard_metadata"]
            elif change == "flat list":
                shards[0]["shard_metadata"] = [3]
            elif change == "flat shape":
                shards[0]["shard_metadata"] = {"param_metadata": [{"fsdp_path": ""}]}
            elif change == "flat missing":
                del shards[1]["model"]["decoder.layers.0.flat_param_0"]
        for s, shard in enumerate(shards):
            name = f"reshard-model_part-{p}" + f"-shard{s}" * (len(shards) > 1)
            saved(shard, "pre-norm", folder / f"{name}.pt")
    if change == "part":
        (folder / "reshard-model_part-0.pt").unlink()
    elif change == "flat shard":
        (folder / "reshard-model_part-1-shard0.pt").unlink()
    elif change == "cut":
        path = folder / "reshard-model_part-1.pt"
        path.write_bytes(path.read_bytes()[:-1000])


WRONG = {
    "shape": r"fc1.weight: found float16\[64, 63\] in part 1, float16\[64, 64\] in part 0",
    "dtype": r"fc1.weight: found float32\[64, 64\] in part 1",
    "names": r"decoder.layers.1.fc1.weight: in some of the model parallel parts",
    "rows": r"qkv_proj.bias: found 97 rows, wanted as many keys",
    "number": r"'decoder.layers.0.fc1.bias': found int, wanted a tensor",
    "scalar": r"fc2.weight: found float16\[3\]",
    "part": r"its set lacks 1 file\(s\), the first: part 0, shard 0",
    "cut": r"part-1.pt: not readable as PyTorch weights: no zip directory",
    "flat names": r"layers.0.self_attn.\w+.weight: does not fit the \d+ numbers of decoder.layers.0.flat_param_0",
    "flat sum": r"decoder.layers.0.flat_param_0: found \d+ numbers, its tensors have \d+",
    "flat lengths": r"flat_param_0: found 11 names, 12 shapes",
    "flat name": r"shard_metadata: found 'self.nattn' for the name of a tensor",
    "flat deep": r"shard_metadata: found tuple for the name of a tensor",
    "flat huge": r"does not fit the",
    "flat negative": r"does not fit the",
    "flat padding": r"wanted one row and its padding",
    "flat none": r"shard1.pt: found no shard_metadata with names and shapes; flat_param_0 is many parameters",
    "flat list": r"shard0.pt: found no shard_metadata",
    "flat shape": r"shard_metadata: not as fairscale writes it: 'params'",
    "flat missing": r"shard1.pt: decoder.layers.0.flat_param_0: missing",
    "flat shard": r"its set lacks 1 file\(s\), the first: part 1, shard 0",
}


@pytest.mark.parametrize("change", WRONG)
def test_what_is_wrong_is_named(change, hub, tmp_path):
    broken(change, hub, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=WRONG[change]) as error:
        main = METASEQ.find(tmp_path)
        assert main is not None
        METASEQ.read(main)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_parts_that_differ_are_told_when_read(hub, tmp_path):
    broken("replicated", hub, tmp_path)
    entries = METASEQ.read(tmp_path / "reshard-model_part-0.pt")[1]
    entries["decoder.layers.0.final_layer_norm.bias"].read()
    with pytest.raises(
        ValueError, match=r"layers.1.final_layer_norm.bias: differs between model parallel parts 0 and 1"
    ):
        entries["decoder.layers.1.final_layer_norm.bias"].read()


def test_several_in_a_folder(hub, tmp_path):
    state = meta_names(hub["pre-norm"], True)
    saved({"model": state}, "pre-norm", tmp_path / "reshard.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "another.pt")
    (tmp_path / "not torch's.pt").write_text("hello")
    assert METASEQ.find(tmp_path) == tmp_path / "reshard.pt"
    saved({"model": state}, "pre-norm", tmp_path / "restored.pt")
    with pytest.raises(ValueError, match="found several metaseq checkpoints: reshard.pt, restored.pt; name one"):
        METASEQ.find(tmp_path)
    assert METASEQ.find(tmp_path / "restored.pt") == tmp_path / "restored.pt"


class Call:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["cfg", "args", "extra_state", "shard_metadata"])
def test_a_config_that_calls(where, hub, tmp_path):
    hidden = argparse.Namespace(model=argparse.Namespace(decoder_attention_heads=4, hook=Call(tmp_path / "called")))
    main = saved({"model": meta_names(hub["pre-norm"], True), where: hidden}, "pre-norm", tmp_path / "restored.pt")
    with pytest.raises(ValueError, match="restored.pt: .* names 'posix.system'"):
        METASEQ.find(tmp_path)
    with pytest.raises(ValueError, match="restored.pt: .* names 'posix.system'"):
        METASEQ.read(main)
    assert not (tmp_path / "called").exists()


def test_a_config_of_wrong_types(hub, tmp_path):
    deep: Any = ()
    for _ in range(900):
        deep = (deep,)
    for heads, message in (
        (0, "num_attention_heads: found 0"),
        ("x", "restored.pt"),
        (5, "a multiple of"),
        (deep, "cannot tell the number of heads"),
    ):
        space = argparse.Namespace(decoder_attention_heads=heads)
        state = {"model": meta_names(hub["pre-norm"], True), "cfg": {"model": space}}
        main = saved(state, "pre-norm", tmp_path / "restored.pt")
        with pytest.raises(ValueError, match=message):
            METASEQ.config(main, METASEQ.read(main)[1])
