"""Checkpoints of the real shapes with random weights, for benchmarks: nothing here is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from opt_common.checkpoints.save import save_checkpoint
from opt_common.checkpoints.tensors import Source, numpy_dtype
from opt_common.config import OPTConfig
from opt_common.weights import Spec, table


def random_checkpoint(folder: Path, size: str, dtype: str = "float16", layers: int | None = None) -> Path:
    """Write an OPT of a published size, or `layers` of it, with weights from N(0, 0.02²), as safetensors; returns
    `folder`."""
    config = OPTConfig.from_size(size, dtype=dtype, **({} if layers is None else {"num_hidden_layers": layers}))
    rng = np.random.default_rng(0)

    def draw(spec: Spec) -> np.ndarray:
        values = rng.standard_normal(spec.shape, np.float32) * 0.02
        return (values + (spec.kind == "norm")).astype(numpy_dtype(dtype))

    sources = [Source(s.name, s.shape, dtype, lambda s=s: draw(s)) for s in table(config)]
    save_checkpoint(folder, sources, {"config.json": config.to_json()})
    return folder
