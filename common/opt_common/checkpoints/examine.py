"""What a checkpoint holds, and how two of them differ."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DTYPES, SIZES, OPTConfig
from ..progress import byte_bar
from ..weights import Spec, table
from .checkpoint import Checkpoint, recognize
from .fit import compare, layer_number, stored_architecture
from .open import Opened, find_checkpoint, open_checkpoint
from .quantized import as_table
from .tensors import Entry, contiguous

# What `examine` sorts tensors into. "embeddings": those of tokens and positions, their projections, and heads.
PARTS = ("embeddings", "attention", "feed-forward", "biases", "norms")
# Fields that do not change what a model computes.
_OF_TRAINING = ("dtype", "unknown", "dropout", "attention_dropout", "layerdrop", "init_std", "use_cache")


def examine(
    path_or_name: str | Path,
    layout: str | None = None,
    sha256: bool = False,
    check: bool = False,
    ranges: bool = False,
    source: str | Path | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds, from its headers, as a dictionary of plain values.

    `misfits` lists what does not fit the config; an empty list is a checkpoint that loads. Of several layouts the
    preferred is read, and `beside` names the others. `sha256` adds a digest for each tensor of its numbers in the
    order [out, in], equal in every layout; `check` adds `not_finite`: how many numbers of a tensor are NaN or infinite,
    for those that have any; `ranges` adds a row for each tensor that fits: its `name` in the table of weights, `layer`,
    None outside of the layers, and `part`, one of PARTS, its `bytes` as stored, how many `numbers` of it are finite,
    their `smallest`, `largest`, `mean` and standard deviation `std`, and how many are `not_finite`. A quantized
    Linear's are those of the weight that it stands for. `source`, the floats that a checkpoint of few bits was rounded
    from, adds `errors`: of each weight, ‖rounded - w‖ / ‖w‖. All four read all weights, one tensor at a time. Raises as
    `open_checkpoint`, save for what does not fit, and for a source that is not that.
    """
    errors = None if source is None else rounding_errors(path_or_name, source, layout)
    checkpoint, config = find_checkpoint(path_or_name, layout, prefer=True)
    names, tied, misfits = compare(checkpoint, config)
    dtypes: dict[str, int] = {}
    for entry in checkpoint.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + 1
    head = next((e for name, e in checkpoint.items() if name.endswith("lm_head.weight")), None)
    repeated = math.prod(head.shape) if tied and head and len(checkpoint) > 1 else 0
    facts: dict[str, Any] = {
        "folder": str(checkpoint.path),
        "layout": checkpoint.layout,
        "beside": [name for name in recognize(checkpoint.path) if name != checkpoint.layout],
        "size": size_name(config),
        "files": len(checkpoint.files),
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "tensors": len(checkpoint),
        "dtype": checkpoint.dtype if dtypes else None,
        "dtypes": dtypes,
        "quantization": str(config.quantization_config) if config.quantization_config else None,
        "parameters": _numbers(checkpoint, config) - repeated,
        "architecture": stored_architecture(checkpoint),
        "head": "tied to the embedding" if tied else "its own",
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "embedding": config.embed_dim,
        "norm": "before" if config.do_layer_norm_before else "after",
        "positions": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
        "shards": {os.path.relpath(file, checkpoint.main.parent): file.stat().st_size for file in checkpoint.files},
        "misfits": misfits,
    }
    if sha256 or check:
        facts |= _read_all(checkpoint, sha256, check)
    if ranges:
        held = {name: checkpoint[stored] for name, stored in names.items()}
        facts["ranges"] = _ranges(checkpoint, config.changed(tie_word_embeddings=tied), held)
    return facts if errors is None else facts | {"errors": errors}


def rounding_errors(path_or_name: str | Path, source: str | Path, layout: str | None = None) -> dict[str, float]:
    """‖rounded - w‖ / ‖w‖ of each weight that a checkpoint holds in few bits and its source in floats."""
    few, floats = open_checkpoint(path_or_name, layout, prefer=True), open_checkpoint(source, prefer=True)
    for opened, wanted in ((few, True), (floats, False)):
        if bool(opened.config.quantization_config) != wanted:
            found = opened.config.quantization_config or "floats"
            kind = "weights of few bits, rounded from the source" if wanted else "the floats they were rounded from"
            raise ValueError(f"{opened.checkpoint.path}: found {found}, wanted {kind}")
    held = {name: few.checkpoint[stored] for name, stored in few.names.items()}
    whole = table(dataclasses.replace(few.config, quantization_config=None), few.architecture)
    rounded = [(spec, entry) for spec, entry in as_table(held, whole) if spec.name not in held]
    errors: dict[str, float] = {}
    with byte_bar("Comparing", sum(entry.nbytes for _, entry in rounded)) as advance:
        for spec, entry in rounded:
            w = floats.checkpoint[floats.names[spec.name]] if spec.name in floats.names else None
            if w is None or tuple(w.shape) != spec.shape:
                found = "none" if w is None else list(w.shape)
                raise ValueError(f"{floats.checkpoint.path}: {spec.name}: found {found}, wanted {list(spec.shape)}")
            squares = np.zeros(2)
            for x, y in _pieces(entry.read(), w.map()):
                y = y.astype(np.float64)
                squares += np.square(x - y).sum(), np.square(y).sum()
            errors[spec.name] = float(np.sqrt(squares[0] / squares[1])) if squares[1] else float(squares[0] > 0)
            advance(entry.nbytes)
    return errors


def _read_all(checkpoint: Checkpoint, sha256: bool, check: bool) -> dict[str, Any]:
    digests: dict[str, str] = {}
    not_finite: dict[str, int] = {}
    with byte_bar(f"Reading {checkpoint.path.name}", sum(entry.nbytes for entry in checkpoint.values())) as advance:
        for name, entry in checkpoint.items():
            array = contiguous(entry.read())
            if sha256:
                digests[name] = hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()
            if check and entry.dtype in DTYPES:
                lost = sum(int(piece.size - np.isfinite(piece).sum()) for piece, _ in _pieces(array, array))
                if lost:
                    not_finite[name] = lost
            advance(entry.nbytes)
            del array
    return ({"sha256": digests} if sha256 else {}) | ({"not_finite": not_finite} if check else {})


def _ranges(checkpoint: Checkpoint, config: OPTConfig, held: dict[str, Entry]) -> list[dict[str, Any]]:
    floats = table(config.changed(quantization_config=None), stored_architecture(checkpoint))
    rows = []
    with byte_bar(f"Reading {checkpoint.path.name}", sum(entry.nbytes for entry in held.values())) as advance:
        for spec, entry in as_table(held, floats):
            quantized = [f"{spec.path}.{name}" for name in ("weight_packed", "weight_scale", "weight_shape")]
            stored = sum(held[name].nbytes for name in ([spec.name] if spec.name in held else quantized))
            array = entry.read()
            count, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
            for piece, _ in _pieces(array, array):
                numbers = piece[np.isfinite(piece)].astype(np.float64)
                count, total, squares = count + numbers.size, total + numbers.sum(), squares + np.square(numbers).sum()
                low, high = numbers.min(initial=low), numbers.max(initial=high)
            number = layer_number(spec.name)
            row: dict[str, Any] = {"name": spec.name, "layer": None if number < 0 else number, "part": _part(spec)}
            row |= {"bytes": stored, "numbers": count}
            if count:
                mean, std = total / count, math.sqrt(max(0.0, squares / count - (total / count) ** 2))
                row |= {"smallest": float(low), "largest": float(high), "mean": float(mean), "std": std}
            rows.append(row | {"not_finite": array.size - count})
            advance(stored)
            del array
    return rows


def _part(spec: Spec) -> str:
    if spec.kind != "linear":
        return {"embedding": "embeddings", "norm": "norms"}.get(spec.kind, "biases")
    return "attention" if ".self_attn." in spec.path else "feed-forward" if ".fc" in spec.path else "embeddings"


def _numbers(checkpoint: Checkpoint, config: OPTConfig) -> int:
    """How many numbers a checkpoint holds; a quantized Linear those of its weight."""
    parts = [spec for spec in table(config) if spec.packing] if config.quantization_config else []
    stored = {name.removeprefix("model."): math.prod(entry.shape) for name, entry in checkpoint.items()}
    for spec in parts:
        stored[spec.name.removeprefix("model.")] = math.prod(spec.matrix) if spec.kind == "packed" else 0
    return sum(stored.values())


def size_name(config: OPTConfig) -> str | None:
    """ "125m" ... "175b" if the config has the shapes of a published size, else None."""
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "ffn_dim", "word_embed_proj_dim", "vocab_size",
             "max_position_embeddings", "do_layer_norm_before")  # fmt: skip
    for size in SIZES:
        published = OPTConfig.from_size(size)
        if all(getattr(config, name) == getattr(published, name) for name in names):
            return size
    return None


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one tensor, or a field of the config, differs: `what` is "missing", "shape", "dtype", "values" or "config",
    `text` says it in words. `largest` is the largest absolute difference of two numbers, where they can be compared."""

    name: str
    what: str
    text: str
    largest: float | None = None


def diff(
    first: str | Path, second: str | Path, layouts: tuple[str | None, str | None] = (None, None)
) -> Iterator[Difference]:
    """Compare two checkpoints, tensor by tensor; yields nothing if they are the same model, bit for bit.

    The layouts may be any two; a tied head may be stored or not. Tensors of the same numbers in two dtypes differ in
    dtype only (`largest` 0). Raises as `open_checkpoint`, before anything is read.
    """
    a, b = (open_checkpoint(p, layout) for p, layout in zip((first, second), layouts, strict=True))
    return _differences(a, b)


def _differences(a: Opened, b: Opened) -> Iterator[Difference]:
    for field in dataclasses.fields(OPTConfig):
        x, y = getattr(a.config, field.name), getattr(b.config, field.name)
        if x != y and field.name not in (*_OF_TRAINING, "tie_word_embeddings"):
            yield Difference(field.name, "config", f"{x!r} and {y!r}")
    names = list(dict.fromkeys([*a.names, *b.names]))
    total = sum(a.checkpoint[a.names[name]].nbytes for name in a.names)
    with byte_bar("Comparing", total) as advance:
        for name in names:
            if name not in a.names or name not in b.names:
                yield Difference(name, "missing", f"not in {(b if name in a.names else a).checkpoint.path}")
                continue
            x, y = a.checkpoint[a.names[name]], b.checkpoint[b.names[name]]
            found = _difference(name, x, y)
            if found:
                yield found
            advance(x.nbytes)


def _difference(name: str, x: Entry, y: Entry) -> Difference | None:
    if tuple(x.shape) != tuple(y.shape):
        return Difference(name, "shape", f"{list(x.shape)} and {list(y.shape)}")
    equal, largest = True, 0.0
    for p, q in _pieces(x.read(), y.read()):
        if p.dtype == q.dtype and _bits(p) == _bits(q):
            continue
        equal = False
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(p.astype(np.float64) - q.astype(np.float64))
        same = (p == q) | (np.isnan(p) & np.isnan(q))  # inf - inf is not a number
        largest = max(largest, float(np.max(np.where(same, 0.0, np.nan_to_num(apart, nan=np.inf)), initial=0.0)))
    if x.dtype != y.dtype:
        return Difference(name, "dtype", f"{x.dtype} and {y.dtype}, largest difference {largest:.3g}", largest)
    return None if equal else Difference(name, "values", f"largest difference {largest:.3g}", largest)


def _bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _pieces(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two arrays of one shape, some rows of both at a time: comparing makes copies."""
    rows = max(1, 1_000_000 // max(1, math.prod(x.shape[1:])))
    if x.ndim == 0:
        yield x, y
    else:
        for i in range(0, len(x), rows):
            yield x[i : i + rows], y[i : i + rows]
