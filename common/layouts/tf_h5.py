"""transformers' TensorFlow weights: `tf_model.h5`, or shards with `tf_model.h5.index.json`.

The two are built differently. A single file has Keras's groups, one a layer, and in them the full names:
`model/tfopt_for_causal_lm/model/decoder/...:0`. The first part of a full name, the scope, counts the models that the
program had made and says nothing. A shard has the names without scope at its root, though the index keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from ..config import OPTConfig
from ..files import read_json
from ..hdf5 import create_hdf5, read_hdf5
from ..tensors import Entry, Source, read_sharded, renamed, split, turned, write_sharded
from .names import from_tf, to_tf

MAIN = ("tf_model.h5", "tf_model.h5.index.json")
SHARD = r"tf_model-\d+-of-\d+\.h5"

_SCOPE = "tfopt_for_causal_lm"
_ATTRIBUTE = 64512  # bytes of names that TensorFlow's Keras puts in one attribute; HDF5 has room for 64 KiB


def holds(main: Path) -> bool:
    """Whether an HDF5 file, or an index, is TensorFlow's rather than a preset's of keras-hub."""
    if main.suffix == ".json":
        weight_map = read_json(main).get("weight_map")
        return isinstance(weight_map, dict) and any(str(name).endswith(":0") for name in weight_map)
    return not any(name.startswith(("layers/", "_layer_checkpoint_dependencies/")) for name in read_hdf5(main))


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    if main.name.endswith(".index.json"):
        return read_sharded(main, _entries, lambda name: (from_tf(name) or (name,))[0])
    return [main], _entries(main)


def _entries(path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for stored, entry in read_hdf5(path).items():
        # an unknown name is left as it is, for the check against the config to tell
        name, transposed = from_tf(re.sub(r"^model/(?=[^/]+/model/)", "", stored)) or (stored, False)
        if name in entries:
            raise ValueError(f"{path}: holds {name} twice, once as {stored}")
        entries[name] = turned(entry) if transposed else entry
    return entries


def write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Callable[[int], None]
) -> list[str]:
    for t in tensors:
        if t.dtype == "bfloat16":
            raise ValueError(f"{t.name}: is bfloat16, which HDF5 has no type for and TensorFlow does not read from it")
    stored = [renamed(t, *to_tf(t.name)) for t in tensors]
    write = partial(_write, len(split(stored, limit)) == 1, advance)
    return write_sharded(folder, MAIN[0], stored, limit, write, lambda name: f"{_SCOPE}/{name}")


def _write(whole: bool, advance: Callable[[int], None], path: Path, tensors: list[Source]) -> None:
    with create_hdf5(path) as file:
        names = [f"{_SCOPE}/{t.name}" if whole else t.name for t in tensors]
        for name, tensor in zip(names, tensors, strict=True):
            file.create_dataset(f"model/{name}" if whole else name, data=tensor.array())
            advance(tensor.nbytes)
        if not whole:
            _attribute(file, "layer_names", names)
            return
        file.attrs["backend"] = "tensorflow"
        _attribute(file, "layer_names", ["model"])
        _attribute(file.require_group("model"), "weight_names", names)
        _attribute(file.create_group("top_level_model_weights"), "weight_names", [])


def _attribute(group: h5py.Group, name: str, values: list[str]) -> None:
    """Keras's way with lists of names: in `name`, or, where they are too long for that, in `name0`, `name1` ..."""
    array = np.array([value.encode() for value in values], "S")
    pieces = np.array_split(array, -(-array.nbytes // _ATTRIBUTE) or 1)
    for i, piece in enumerate(pieces):
        group.attrs[name if len(pieces) == 1 else f"{name}{i}"] = piece
