"""The Hub's `pytorch_model.bin`, or shards with `pytorch_model.bin.index.json`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from ..tensors import Entry, read_sharded

MAIN = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SHARD = r"pytorch_model-\d+-of-\d+\.bin"


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    return read_sharded(main, _entries) if main.name.endswith(".index.json") else ([main], _entries(main))


def _entries(path: Path) -> dict[str, Entry]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path}: reading a .bin takes PyTorch: pip install 'opt-zoo[pt]'") from error
    try:
        # weights_only: a .bin is a pickle, and only tensors may come out of it. Old ones are not zip files: no map.
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not readable as PyTorch weights: {first}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: found something other than names and tensors, wanted a state_dict")

    def entry(tensor: torch.Tensor) -> Entry:
        dtype = str(tensor.dtype).removeprefix("torch.")

        def array(whole: torch.Tensor) -> np.ndarray:
            if dtype == "bfloat16":
                return whole.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return whole.numpy()

        def read() -> np.ndarray:
            return array(tensor.detach().clone(memory_format=torch.contiguous_format))

        return Entry(tuple(tensor.shape), dtype, path, read, lambda: array(tensor.detach().contiguous()))

    return {name: entry(tensor) for name, tensor in tensors.items()}
