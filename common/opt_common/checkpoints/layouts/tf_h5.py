"""transformers' TensorFlow weights: `tf_model.h5`, or shards with `tf_model.h5.index.json`.

The two differ. A single file has Keras's groups, one per layer, that hold the full names:
`model/tfopt_for_causal_lm/model/decoder/...:0`. The first part of a full name, the scope, only counts the models that
the program had created. A shard has the names without scope at its root, though the index keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...config import OPTConfig
from ...files import read_json
from ..containers.hdf5 import create_hdf5, imagine_hdf5, read_hdf5
from ..shards import plan_sharded, split, write_sharded
from ..tensors import Source
from .layout import Layout, Progress, reader
from .names import TF_H5_NAMES, TF_SCOPE

if TYPE_CHECKING:
    import h5py

_FILE = "tf_model.h5"
_ATTRIBUTE = 64512  # bytes of names that Keras puts in one attribute; HDF5 has room for 64 KiB


def _holds(main: Path) -> bool:
    """Whether an HDF5 file, or an index, is transformers' rather than a preset's of keras-hub."""
    if main.suffix == ".json":
        weight_map = read_json(main).get("weight_map")
        return isinstance(weight_map, dict) and any(str(name).endswith(":0") for name in weight_map)
    return not any(name.startswith(("layers/", "_layer_checkpoint_dependencies/")) for name in read_hdf5(main))


def _write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Progress
) -> list[str]:
    stored = _stored(tensors)
    whole = len(split(stored, limit)) == 1

    def one(path: Path, shard: list[Source]) -> None:
        with create_hdf5(path) as file:
            for dataset, tensor in _build(file, shard, whole):
                at = 0
                for block in tensor.blocks():
                    dataset[at : at + len(block)] = block
                    at += len(block)
                block = None  # before the next tensor is read
                advance(tensor.nbytes)

    return write_sharded(folder, _FILE, stored, limit, one, _in_index)


def _plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    """The files that `write` would make, and their bytes."""
    stored = _stored(tensors)
    whole = len(split(stored, limit)) == 1

    def size(shard: list[Source]) -> int:
        with imagine_hdf5() as (file, memory):
            for dataset, tensor in _build(file, shard, whole):
                dataset[(0,) * len(tensor.shape)] = 0  # HDF5 takes the place of all at the first write
        return memory.size

    return plan_sharded(_FILE, stored, limit, size, _in_index)


def _stored(tensors: Sequence[Source]) -> list[Source]:
    for t in tensors:
        if t.dtype == "bfloat16":
            raise ValueError(f"{t.name}: is bfloat16, which HDF5 has no type for and TensorFlow cannot read from it")
    return [TF_H5_NAMES.to_stored(t) for t in tensors]


def _in_index(name: str) -> str:
    return TF_SCOPE + name


def _build(file: h5py.File, tensors: list[Source], whole: bool) -> Iterator[tuple[h5py.Dataset, Source]]:
    """Create all of a file but its numbers; yields each dataset when they are to be written."""
    names = [_in_index(t.name) if whole else t.name for t in tensors]
    for name, tensor in zip(names, tensors, strict=True):
        yield file.create_dataset(f"model/{name}" if whole else name, tensor.shape, tensor.dtype), tensor
    if not whole:
        _attribute(file, "layer_names", names)
        return
    file.attrs["backend"] = "tensorflow"
    _attribute(file, "layer_names", ["model"])
    _attribute(file.require_group("model"), "weight_names", names)
    _attribute(file.create_group("top_level_model_weights"), "weight_names", [])


def _attribute(group: h5py.Group, name: str, values: list[str]) -> None:
    """Store a list of names as Keras does: in `name`, or, if it is too long, in `name0`, `name1` ..."""
    array = np.array([value.encode() for value in values], "S")
    pieces = np.array_split(array, -(-array.nbytes // _ATTRIBUTE) or 1)
    for i, piece in enumerate(pieces):
        group.attrs[name if len(pieces) == 1 else f"{name}{i}"] = piece


TF_H5 = Layout(
    main=(_FILE, f"{_FILE}.index.json"),
    shards=r"tf_model-\d+-of-\d+\.h5",
    read=reader(read_hdf5, TF_H5_NAMES),
    write=_write,
    plan=_plan,
    holds=_holds,
)
