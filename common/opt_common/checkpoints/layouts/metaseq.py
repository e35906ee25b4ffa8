"""Meta's own checkpoints, written by metaseq. Their contents tell them, as their names vary.

    restored.pt, reshard.pt, consolidated.pt    the whole model in one file
    *-model_part-N.pt                           model parallel: a slice of each matrix in each file
    *-shardN.pt, *-model_part-N-shardM.pt       fairscale's FSDP: parameters of a module joined to one row of numbers
                                                (`flat_param_0`), cut into shards, described by `shard_metadata`

Keys, values and queries are one matrix, in this order; model parallel files hold a slice of each of the three.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...config import DTYPES, SIZES, OPTConfig
from ..containers import torch_file
from ..containers.torch_file import Stacked, is_name
from ..containers.unpickle import Named, Tensor, load
from ..tensors import Entry, Source, numpy_dtype
from .layout import Layout, Progress
from .names import holds_metaseq, row_of

_FILE = "restored.pt"
_NAME = re.compile(r"(?P<stem>.*?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.pt")
# What a tensor is called on the Hub, where that differs; the layers' norms are final_layer_norm in both.
_HUB = {
    "decoder.layer_norm.weight": "decoder.final_layer_norm.weight",
    "decoder.layer_norm.bias": "decoder.final_layer_norm.bias",
    "decoder.project_in_dim.weight": "decoder.project_in.weight",
    "decoder.project_out_dim.weight": "decoder.project_out.weight",
    "decoder.output_projection.weight": "lm_head.weight",
}
# The axes that model parallel slices; a tensor without one lies whole in every part.
_PARALLEL = ("vocab", "heads", "ffn")
_ATTENTION = ("k_proj", "v_proj", "q_proj")  # in this order in one matrix


def _axis(name: str) -> int | None:
    """The axis along which model parallel slices the tensor that metaseq calls `name`."""
    spec = row_of(_HUB.get(name, name).replace(".qkv_proj.", ".q_proj."))
    return next((i for i, axis in enumerate(spec.axes if spec else ()) if axis in _PARALLEL), None)


@dataclass(frozen=True, eq=False)
class _Block:
    """A tensor of one part: a tensor of a file, or the concatenation of several flat ranges of numbers."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[Tensor]

    def rows(self, start: int, stop: int) -> _Block:
        shape = (stop - start, *self.shape[1:])
        if self.pieces[0].shape == self.shape:
            return _Block(shape, self.dtype, [self.pieces[0].rows(start, stop)])
        width = math.prod(self.shape[1:])
        return _cut(self.pieces, start * width, stop * width, shape)

    def fill(self, out: np.ndarray) -> None:
        if self.pieces[0].shape == self.shape:
            self.pieces[0].fill(out)
            return
        whole = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
        flat, at = whole.reshape(-1), 0
        for piece in self.pieces:
            piece.fill(flat[at : at + piece.numel])
            at += piece.numel
        if whole is not out:
            out[...] = whole

    def read(self) -> np.ndarray:
        out = np.empty(self.shape, numpy_dtype(self.dtype))
        self.fill(out)
        return out


def _cut(rows: list[Tensor], start: int, stop: int, shape: tuple[int, ...]) -> _Block:
    """Numbers `start` to `stop` of rows of numbers taken as one row, as a tensor of `shape`."""
    pieces, at = [], 0
    for row in rows:
        low, high = max(start - at, 0), min(stop - at, row.numel)
        if low < high:
            pieces.append(row.rows(low, high))
        at += row.numel
    if len(pieces) == 1 and pieces[0].contiguous:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        piece = pieces[0]
        pieces = [Tensor(piece.path, piece.dtype, piece.storage, piece.offset, shape, strides)]
    return _Block(shape, rows[0].dtype, pieces)


def _find(path: Path) -> Path | None:
    """The file to give to `read`, for a folder or for one file of a set; None if there is no metaseq checkpoint. Raises
    ValueError if a folder holds several, or if a file is damaged."""
    if path.suffix == ".keras":  # a zip file too, of another kind
        return None
    names = [path.name] if path.is_file() else sorted(p.name for p in path.glob("*.pt") if p.is_file())
    folder = path.parent if path.is_file() else path
    first: dict[str, str] = {}
    for name in names:
        found = _NAME.fullmatch(name)
        stem = found["stem"] + "-" * bool(found["part"] or found["shard"]) if found else name
        if stem not in first or _numbers(name) < _numbers(first[stem]):
            first[stem] = name
    mains = [folder / name for name in first.values() if holds_metaseq(folder / name)]
    if len(mains) > 1:
        raise ValueError(f"{folder}: found several metaseq checkpoints: {', '.join(p.name for p in mains)}; name one")
    return min(_files(mains[0]).items())[1] if mains else None


def _numbers(name: str) -> tuple[int, int]:
    found = _NAME.fullmatch(name)
    return (int(found["part"] or 0), int(found["shard"] or 0)) if found else (0, 0)


def _files(main: Path) -> dict[tuple[int, int], Path]:
    """The files of the set that `main` is one of, by part and shard."""
    given = _NAME.fullmatch(main.name)
    if not given or (given["part"] is None and given["shard"] is None):
        return {(0, 0): main}
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(main.parent.glob("*.pt")):
        found = _NAME.fullmatch(path.name)
        kinds = [(f["stem"], f["part"] is None, f["shard"] is None) for f in (given, found) if f]
        if len(kinds) == 2 and kinds[0] == kinds[1]:
            files[_numbers(path.name)] = path
    parts, shards = (1 + max(numbers) for numbers in zip(*files, strict=True))
    missing = [(p, s) for p in range(parts) for s in range(shards) if (p, s) not in files]
    if missing:
        part, shard = missing[0]
        raise FileNotFoundError(f"{main}: its set lacks {len(missing)} file(s), the first: part {part}, shard {shard}")
    return files


def _read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    files = _files(main)
    parts = [
        _part([path for (p, _), path in sorted(files.items()) if p == part])
        for part in range(1 + max(part for part, _ in files))
    ]
    for part in parts[1:]:
        if part.keys() != parts[0].keys():
            name = min(part.keys() ^ parts[0].keys())
            raise ValueError(f"{main}: {name}: in some of the model parallel parts, not in all")
    entries: dict[str, Entry] = {}
    for name in parts[0]:
        entries |= _entries(main, name, [part[name] for part in parts])
    embedding, head = (parts[0].get(f"decoder.{name}.weight") for name in ("embed_tokens", "output_projection"))
    if head is not None and embedding is not None and _same_place(embedding, head):
        del entries["lm_head.weight"]
    entries.pop("decoder.version", None)
    return sorted(files.values()), entries


def _same_place(a: _Block, b: _Block) -> bool:
    def places(block: _Block) -> list[Any]:
        return [(id(p.storage), p.offset, p.shape, p.stride) for p in block.pieces]

    return places(a) == places(b)


def _entries(main: Path, name: str, blocks: list[_Block]) -> dict[str, Entry]:
    """The Hub's tensors in one of metaseq's, which has a block in each part."""
    axis = _axis(name)
    first = blocks[0]
    for number, block in enumerate(blocks):
        there, wanted = list(block.shape), list(first.shape)
        if axis is not None and axis < len(there) == len(wanted):
            there[axis] = wanted[axis] = 0
        if (there, block.dtype) != (wanted, first.dtype) or (axis is not None and axis >= len(there)):
            found = f"{block.dtype}{list(block.shape)} in part {number}"
            raise ValueError(f"{main}: {name}: found {found}, {first.dtype}{list(first.shape)} in part 0")
    if axis is None:
        return {_HUB.get(name, name): _replicated(name, blocks)}
    if ".qkv_proj." not in name:
        return {_HUB.get(name, name): _joined(blocks, axis)}
    uneven = [block for block in blocks if block.shape[0] % 3]
    if uneven:
        raise ValueError(f"{main}: {name}: found {uneven[0].shape[0]} rows, wanted as many keys, values and queries")
    entries = {}
    for i, projection in enumerate(_ATTENTION):
        thirds = [block.rows(block.shape[0] // 3 * i, block.shape[0] // 3 * (i + 1)) for block in blocks]
        entries[name.replace("qkv_proj", projection)] = _joined(thirds, 0)
    return entries


def _joined(blocks: list[_Block], axis: int) -> Entry:
    shape = list(blocks[0].shape)
    shape[axis] = sum(block.shape[axis] for block in blocks)

    def read() -> np.ndarray:
        out = np.empty(shape, numpy_dtype(blocks[0].dtype))
        at = 0
        for block in blocks:
            there = at + block.shape[axis]
            block.fill(out[at:there] if axis == 0 else out[:, at:there])
            at = there
        return out

    return _entry(tuple(shape), blocks, read)


def _replicated(name: str, blocks: list[_Block]) -> Entry:
    def read() -> np.ndarray:
        out = blocks[0].read()
        for number, block in enumerate(blocks[1:], 1):
            if not np.array_equal(out.reshape(-1).view(np.uint8), block.read().reshape(-1).view(np.uint8)):
                raise ValueError(f"{block.pieces[0].path}: {name}: differs between model parallel parts 0 and {number}")
        return out

    return _entry(blocks[0].shape, blocks, read)


def _entry(shape: tuple[int, ...], blocks: list[_Block], read: Callable[[], np.ndarray]) -> Entry:
    piece = blocks[0].pieces[0]
    alone = len(blocks) == 1 and piece.shape == blocks[0].shape
    return Entry(shape, blocks[0].dtype, piece.path, read, piece.map if alone else read)


def _part(paths: list[Path]) -> dict[str, _Block]:
    """The tensors of one model parallel part, by metaseq's names, out of its shards."""
    trees = [load(path) for path in paths]
    models: list[Any] = [tree.get("model") if isinstance(tree, dict) else None for tree in trees]
    for path, model in zip(paths, models, strict=True):
        if not isinstance(model, dict):
            raise ValueError(f"{path}: found no 'model' of names and tensors")
        for name, tensor in model.items():
            if not is_name(name) or not isinstance(tensor, Tensor):
                raise ValueError(f"{path}: model: {name!r:.80}: found {type(tensor).__name__}, wanted a tensor")
    whole = {name: _Block(t.shape, t.dtype, [t]) for name, t in models[0].items()}
    flat = [name for name in whole if name.rpartition(".")[2].startswith("flat_param_")]
    if len(paths) == 1 and not flat:
        return whole
    metadata = [tree.get("shard_metadata") for tree in trees]
    for path, given in zip(paths, metadata, strict=True):
        if not isinstance(given, dict):
            said = f"{flat[0]} is many parameters in one row" if flat else "it is one of several shards"
            raise ValueError(f"{path}: found no shard_metadata with names and shapes; {said}")
    try:
        return _unflattened(paths, models, metadata, whole)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{paths[0]}: shard_metadata: not as fairscale writes it: {error}") from error


def _unflattened(
    paths: list[Path], models: list[dict[str, Tensor]], metadata: list[dict[str, Any]], whole: dict[str, _Block]
) -> dict[str, _Block]:
    blocks, shared = {}, []
    for i, module in enumerate(metadata[0]["param_metadata"]):
        prefix = module["fsdp_path"] + "." if module["fsdp_path"] else ""
        for key, described in module["params"].items():
            strange = [name for name in (prefix + "flat", key, *described["names"]) if not is_name(name)]
            if strange:
                found = repr(strange[0])[:80] if isinstance(strange[0], str) else type(strange[0]).__name__
                raise ValueError(f"{paths[0]}: shard_metadata: found {found} for the name of a tensor")
            rows = []
            for path, model, given in zip(paths, models, metadata, strict=True):
                padding = given["param_metadata"][i]["params"][key]["padding"]
                if prefix + key not in model:
                    raise ValueError(f"{path}: {prefix + key}: missing, its shard_metadata describes it")
                row = model[prefix + key]
                if len(row.shape) != 1 or type(padding) is not int or not 0 <= padding <= row.numel:
                    found = f"shape {list(row.shape)}, padding {padding if type(padding) is int else type(padding)}"
                    raise ValueError(f"{path}: {prefix + key}: found {found}, wanted one row and its padding")
                rows.append(row.rows(0, row.numel - padding))
                if module["no_broadcast_optim_state"]:  # not sharded
                    break
            if len({row.dtype for row in rows}) > 1:
                raise ValueError(f"{paths[0]}: {prefix + key}: its shards have several dtypes")
            whole.pop(prefix + key, None)
            start, there = 0, sum(row.numel for row in rows)
            names, shapes, numels = (described[kind] for kind in ("names", "shapes", "numels"))
            if not len(names) == len(shapes) == len(numels):
                found = f"{len(names)} names, {len(shapes)} shapes and {len(numels)} sizes"
                raise ValueError(f"{paths[0]}: {prefix + key}: found {found} in its shard_metadata")
            for name, shape, numel in zip(names, shapes, numels, strict=True):
                good = type(shape) is tuple and all(type(n) is int and n > 0 for n in shape)
                if not good or type(numel) is not int or math.prod(shape) != numel or start + numel > there:
                    raise ValueError(f"{paths[0]}: {prefix}{name}: does not fit the {there} numbers of {prefix + key}")
                blocks[prefix + name] = _cut(rows, start, start + numel, shape)
                start += numel
            if start != there:
                raise ValueError(f"{paths[0]}: {prefix + key}: found {there} numbers, its tensors have {start}")
        shared += module["shared_param_info"]
    for source, name in shared:
        blocks[name] = blocks[source]
    return blocks | whole  # what is left are buffers, alike in all shards


def _config(main: Path, entries: Mapping[str, Entry]) -> OPTConfig | None:
    """The config of a checkpoint without a config.json, from its shapes, and from metaseq's arguments where they are
    saved; None if it has one. Raises ValueError if that does not determine it."""
    if (main.parent / "config.json").is_file():
        return None
    wanted = ("embed_tokens.weight", "embed_positions.weight", "layers.0.fc1.weight")
    shapes: list[Any] = [entries[f"decoder.{name}"].shape if f"decoder.{name}" in entries else () for name in wanted]
    for name, shape in zip(wanted, shapes, strict=True):
        if len(shape) != 2:
            raise ValueError(f"{main}: decoder.{name}: found {f'shape {list(shape)}' if shape else 'none'}")
    (vocabulary, narrow), (positions, hidden), (ffn, _) = shapes
    layers = len({name.split(".")[2] for name in entries if name.startswith("decoder.layers.")})
    said = _arguments(load(main))
    published = [
        size for size in SIZES.values()
        if (size["num_hidden_layers"], size["hidden_size"], size["ffn_dim"]) == (layers, hidden, ffn)
    ]  # fmt: skip

    def unknown(what: str) -> ValueError:
        found = f"{layers} layers of width {hidden} are no published size, and metaseq's arguments are not saved"
        return ValueError(f"{main}: cannot tell {what}: {found}; put a config.json beside it")

    heads = said.get("decoder_attention_heads", published[0]["num_attention_heads"] if published else None)
    if heads is None:
        raise unknown("the number of heads")
    final_norm = "decoder.final_layer_norm.weight" in entries
    before = said.get("decoder_normalize_before", published[0].get("do_layer_norm_before", True) if published else None)
    if final_norm:
        before = True
    elif before is None:
        raise unknown("whether norms come before or after")
    dtype = entries["decoder.embed_tokens.weight"].dtype
    try:
        return OPTConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=ffn,
            max_position_embeddings=positions - 2,
            word_embed_proj_dim=narrow,
            do_layer_norm_before=before,
            _remove_final_layer_norm=before and not final_norm,
            activation_function=said.get("activation_fn", "relu"),
            enable_bias="decoder.layers.0.fc1.bias" in entries,
            layer_norm_elementwise_affine="decoder.layers.0.final_layer_norm.weight" in entries,
            dtype=dtype if dtype in DTYPES else None,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{main}: {error}") from error


def _arguments(tree: Any) -> dict[str, Any]:
    """The arguments of metaseq's model: `cfg.model`, or `args` in older files."""
    for name in ("cfg", "args"):
        fields = _fields(tree.get(name))
        for given in (_fields(fields.get("model")), fields):
            if "decoder_attention_heads" in given:
                plain = {key: _plain(value) for key, value in given.items()}
                return {key: value for key, value in plain.items() if type(value) in (bool, int, float, str)}
    return {}


def _fields(value: Any) -> dict[Any, Any]:
    """The contents of a dict, an argparse.Namespace or an OmegaConf DictConfig; else nothing."""
    if isinstance(value, Named):
        value = value.state
    if isinstance(value, dict) and "_content" in value:
        value = value["_content"]
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> Any:
    state = value.state if isinstance(value, Named) else None
    return state["_val"] if isinstance(state, dict) and "_val" in state else value


def _write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Progress
) -> list[str]:
    """One file, whatever `limit`. Keys, values and queries are read one right after another."""
    torch_file.write(folder / _FILE, _tree(tensors, config), advance)
    return [_FILE]


def _plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    """The file that `write` would make, and its bytes."""
    return [(_FILE, torch_file.size(_tree(tensors, config)))]


def _tree(tensors: Sequence[Source], config: OPTConfig | None) -> dict[str, Any]:
    given = {t.name.removeprefix("model."): t for t in tensors}
    names = {hub: name for name, hub in _HUB.items()}
    # 350m predates the joined matrix: its file has them apart
    joined = "decoder.project_in.weight" not in given
    model: dict[str, Any] = {"decoder.version": np.array([3.0], np.float32)}
    for name, t in given.items():
        if joined and ".k_proj." in name:
            parts = [given[name.replace("k_proj", projection)] for projection in _ATTENTION]
            model[name.replace("k_proj", "qkv_proj")] = Stacked(parts)
        elif not (joined and (".v_proj." in name or ".q_proj." in name)):
            model[names.get(name, name)] = t
    arguments: dict[str, Any] = {}
    if config is not None:
        arguments = {
            "_name": "transformer_lm_gpt",
            "arch": "transformer_lm_gpt",
            "decoder_layers": config.num_hidden_layers,
            "decoder_embed_dim": config.hidden_size,
            "decoder_input_dim": config.embed_dim,
            "decoder_output_dim": config.embed_dim,
            "decoder_ffn_embed_dim": config.ffn_dim,
            "decoder_attention_heads": config.num_attention_heads,
            "decoder_normalize_before": config.do_layer_norm_before,
            "decoder_learned_pos": True,
            "no_scale_embedding": True,
            "share_decoder_input_output_embed": config.tie_word_embeddings,
            "activation_fn": config.activation_function,
            "dropout": float(config.dropout),
            "attention_dropout": float(config.attention_dropout),
            "max_target_positions": config.max_position_embeddings,
            "tokens_per_sample": config.max_position_embeddings,
        }
    return {
        "model": model,
        "cfg": {"model": arguments},
        "args": None,
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "optimizer_history": [{"num_updates": 0, "lr_scheduler_state": {"best": None}}],
    }


METASEQ = Layout(main=(_FILE,), find=_find, read=_read, write=_write, plan=_plan, config=_config)
