"""keras-hub's OPT presets: its own config.json, and `model.weights.h5`, or shards with `model.weights.json`.

The attention's matrices have an axis of their own for the heads ([hidden, heads, width] on the way in, [heads, width,
hidden] on the way out). The position table lacks rows 0 and 1 of the Hub's, the second of which is that of padding
tokens; reading a preset makes them zeros.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...config import OPTConfig
from ...files import read_bytes, read_json
from ...weights import KERAS, Axis, Spec
from ..containers.hdf5 import add_variable, create_hdf5, read_hdf5
from ..shards import shard_files, split
from ..tensors import Entry, Source, rearranged
from .layout import Layout, Progress
from .names import Names

_FILE, _INDEX = "model.weights.h5", "model.weights.json"
_LOST = (
    "model.decoder.embed_positions.weight: rows 0 and 1, which only padding looks at, are not in a keras-hub preset; "
    "they are zeros when it is read"
)
_ASSETS = ("assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt")
_VERSION = b"#version: 0.2\n"

# What keras-hub calls OPT's modules.
_IN_LAYER = {
    "self_attn.k_proj": "self_attention_layer/key_dense",
    "self_attn.v_proj": "self_attention_layer/value_dense",
    "self_attn.q_proj": "self_attention_layer/query_dense",
    "self_attn.out_proj": "self_attention_layer/output_dense",
    "self_attn_layer_norm": "self_attention_layer_norm",
    "fc1": "feedforward_intermediate_dense",
    "fc2": "feedforward_output_dense",
    "final_layer_norm": "feedforward_layer_norm",
}
_IN_DECODER = {
    "embed_tokens": "token_and_position_embedding/token_embedding",
    "embed_positions": "token_and_position_embedding/position_embedding",
    "final_layer_norm": "layer_normalization",
}
_FIRST = "layers/transformer_decoder/"


def _name(spec: Spec) -> str | None:
    path = spec.path.removeprefix("model.").removeprefix("decoder.")
    within = path.removeprefix("layers.0.")
    module = (_IN_DECODER if within == path else _IN_LAYER).get(within)
    root = "layers/" if within == path else _FIRST
    return module and f"{root}{module}/vars/{int(spec.kind in ('bias', 'norm_bias'))}"


def _normalize(stored: str) -> str:
    """Without the underscores of private attributes; Keras 2.13 calls the layers otherwise."""
    return re.sub(r"(^|/)_", r"\1", stored).replace("layer_checkpoint_dependencies/", "layers/", 1)


_NAMES = Names("keras-hub's OPT", KERAS, _name, _FIRST, "layers/transformer_decoder_{}/", _normalize)


def _holds(main: Path) -> bool:
    """Whether an HDF5 file, or an index, is a preset's rather than TensorFlow's of transformers."""
    if main.suffix == ".json":
        weight_map = read_json(main).get("weight_map")
        return isinstance(weight_map, dict) and any(name.endswith("/vars") for name in weight_map)
    return any(_NAMES.hub(name) for name in read_hdf5(main))


def _read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    if main.suffix != ".json":
        return [main], _entries(main)
    weight_map = read_json(main).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}
    placed = {group: [files] if isinstance(files, str) else files for group, files in weight_map.items()}
    if not placed or not all(isinstance(f, list) and all(isinstance(name, str) for name in f) for f in placed.values()):
        raise ValueError(f"{main}: weight_map: wanted an object of names and the files they are in")
    files, entries = shard_files(main, (name for names in placed.values() for name in names)), {}
    for file in files:
        for name, entry in _entries(file).items():
            if name in entries:
                raise ValueError(f"{file}: holds {name}, which {entries[name].file.name} holds too")
            entries[name] = entry
    return files, entries


def _entries(path: Path) -> dict[str, Entry]:
    return _NAMES.to_hub(path, {name: _joined(name, entry) for name, entry in read_hdf5(path).items()})


def _joined(stored: str, entry: Entry) -> Entry:
    """A variable of Keras's with the axes of the Hub's tensor, not yet transposed. One of an unexpected number of axes
    is left to the check."""
    found, shape = _NAMES.hub(stored), entry.shape
    if found is None:
        return entry
    _, spec = found
    if spec.path.endswith("embed_positions") and len(shape) == 2:
        first = (2, shape[1])
        return rearranged(entry, (shape[0] + 2, shape[1]), lambda a: np.concatenate([np.zeros(first, a.dtype), a]))
    axes = _axes(spec)
    if "heads" in axes and len(shape) == len(axes) + 1:
        at = axes.index("heads")
        joined = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
        return rearranged(entry, joined, lambda a: a.reshape(joined))
    return entry


def _axes(spec: Spec) -> tuple[Axis | None, ...]:
    """A tensor's axes in Keras's order."""
    return spec.axes[::-1] if KERAS.transposes(spec) else spec.axes


def _config(main: Path, entries: Mapping[str, Entry]) -> OPTConfig:
    """The config in keras-hub's config.json. Presets written here keep the Hub's keys in it too."""
    path = main.with_name("config.json")
    values = read_json(path)
    theirs, name = values.get("config"), str(values.get("registered_name"))
    if not isinstance(theirs, dict) or not re.fullmatch(r"keras_(hub|nlp)>OPTBackbone", name):
        raise ValueError(f"{path}: found the config of {name}, wanted that of keras_hub>OPTBackbone")
    hub = {key: value for key, value in values.items() if key not in _BACKBONE and "model_type" in values}
    missing = [key for key in _FIELDS if key not in theirs]
    if missing:
        raise ValueError(f"{path}: config: {', '.join(missing)} missing")
    return OPTConfig.from_dict(hub | {field: theirs[key] for key, field in _FIELDS.items()}, source=str(path))


# What keras-hub calls the fields of a config, and what its config.json says besides.
_FIELDS = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "ffn_dim",
    "dropout": "dropout",
    "max_sequence_length": "max_position_embeddings",
}
_BACKBONE = ("module", "class_name", "config", "registered_name")


def _companions(main: Path) -> dict[str, bytes]:
    """The tokenizer's files of the preset, by their names on the Hub; its tokenizer.json is not the Hub's."""
    vocab, merges = (main.parent / name for name in _ASSETS)
    if not (vocab.is_file() and merges.is_file()):
        return {}
    pairs = read_bytes(merges)
    version = b"" if pairs.startswith(b"#version:") else _VERSION  # the Hub's readers skip a first line
    return {"vocab.json": read_bytes(vocab), "merges.txt": version + pairs}


def _check(config: OPTConfig) -> None:
    wrong = _unlike(config)
    if wrong:
        raise ValueError(f"keras-hub's OPT cannot hold this model, which {' and '.join(wrong)}")


def _write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Progress
) -> list[str]:
    if config is None:
        raise ValueError("keras-hub: wanted a config to write a preset")
    _check(config)
    stored = [_as_keras(t, config) for t in tensors]
    shards, names, given = split(stored, limit), [_FILE], iter(tensors)
    if len(shards) > 1:
        names = [f"model_{i:05}.weights.h5" for i in range(len(shards))]
    weight_map: dict[str, list[str]] = {}
    for name, shard in zip(names, shards, strict=True):
        with create_hdf5(folder / name) as file:
            for t in shard:
                add_variable(file, t)
                advance(next(given).nbytes)
                at = weight_map.setdefault("/" + t.name.rpartition("/")[0], [])
                at += [name] if name not in at else []
    if len(shards) > 1:
        _dump(folder / _INDEX, {"metadata": {"total_size": sum(t.nbytes for t in stored)}, "weight_map": weight_map})
    backbone = {theirs: getattr(config, field) for theirs, field in _FIELDS.items()}
    policy = config.dtype or tensors[0].dtype
    own = _object("models.opt.opt_backbone", "OPTBackbone", "opt_backbone", policy, backbone)
    _dump(folder / "config.json", config.to_dict() | own)
    _dump(folder / "metadata.json", {"parameter_count": sum(math.prod(t.shape) for t in stored), "tasks": ["CausalLM"]})
    _write_tokenizer(folder)
    return names


def _unlike(config: OPTConfig) -> list[str]:
    """What this config asks for and keras-hub's OPT cannot do."""
    reasons = {
        "has its layer norms after the layers (do_layer_norm_before is false)": not config.do_layer_norm_before,
        "projects its embedding (word_embed_proj_dim is not hidden_size)": config.projects_embeddings,
        "has no final layer norm": config.do_layer_norm_before and not config.has_final_layer_norm,
        "has no biases": not config.enable_bias,
        "has layer norms without weights": not config.layer_norm_elementwise_affine,
        "has a head of its own": not config.tie_word_embeddings,
        f"is activated by {config.activation_function}": config.activation_function != "relu",
    }
    return [reason for reason, true in reasons.items() if true]


def _as_keras(tensor: Source, config: OPTConfig) -> Source:
    """A tensor as Keras calls and stores it."""
    stored, (_, spec) = _NAMES.to_stored(tensor), _NAMES.stored(tensor.name)
    # Keras names what is in a layer by its attributes, and keras-hub's are private
    name = re.sub(r"^(layers/transformer_decoder(?:_\d+)?/)", r"\1_", stored.name)
    if spec.path.endswith("embed_positions"):
        return Source(name, (stored.shape[0] - 2, stored.shape[1]), stored.dtype, lambda: stored.array()[2:])
    heads = (config.num_attention_heads, config.head_dim)
    sizes = [heads if axis == "heads" else (n,) for axis, n in zip(_axes(spec), stored.shape, strict=True)]
    shape = tuple(n for size in sizes for n in size)
    return Source(name, shape, stored.dtype, lambda: stored.array().reshape(shape))


def _object(module: str, kind: str, name: str, dtype: str, values: dict[str, Any]) -> dict[str, Any]:
    """An object of keras-hub's, as Keras serializes it."""
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    values = {"name": name, "trainable": True, "dtype": policy} | values
    own = {"module": f"keras_hub.src.{module}", "class_name": kind, "config": values}
    return own | {"registered_name": f"keras_hub>{kind}"}


def _write_tokenizer(folder: Path) -> None:
    """Write keras-hub's tokenizer.json and assets from the Hub's tokenizer files in the folder, if there are any."""
    files = _assets(folder)
    if not files:
        return
    for name, data in zip(_ASSETS, files, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    values = {"config_file": "tokenizer.json", "sequence_length": None, "add_prefix_space": False}
    own = _object("models.opt.opt_tokenizer", "OPTTokenizer", "opt_tokenizer", "int32", values)
    _dump(folder / "tokenizer.json", own)


def _assets(folder: Path) -> list[bytes]:
    """Vocabulary and merges from the Hub's tokenizer files in the folder; nothing if there are none."""
    vocab, merges, fast = (folder / name for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if vocab.is_file() and merges.is_file():
        return [read_bytes(vocab), read_bytes(merges)]  # keras-hub skips the line of the version too
    return _of_one_file(fast) if fast.is_file() else []


def _of_one_file(fast: Path) -> list[bytes]:
    """Vocabulary and merges from the Hub's tokenizer.json."""
    model = read_json(fast).get("model")
    words, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    if not isinstance(words, dict) or not isinstance(merges, list):
        raise ValueError(f"{fast}: model: wanted the vocab and merges of a BPE")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    wrong = [pair for pair in pairs if not (isinstance(pair, list) and [type(part) for part in pair] == [str, str])]
    if wrong:
        raise ValueError(f"{fast}: model: merges: found {wrong[0]!r:.80}, wanted two tokens")
    return [json.dumps(words).encode(), _VERSION + "".join(f"{a} {b}\n" for a, b in pairs).encode()]


def _dump(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


KERAS_HUB = Layout(
    main=(_FILE, _INDEX),
    holds=_holds,
    read=_read,
    write=_write,
    config=_config,
    companions=_companions,
    assets=_ASSETS,
    lost=_LOST,
    check=_check,
    check_files=_assets,
)
