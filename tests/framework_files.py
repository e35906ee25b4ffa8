"""What the tests of the frameworks' own files share: random tensors of a config, and layouts written and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_common.checkpoints.layouts.layout import Layout
from opt_common.checkpoints.tensors import Entry, Source, numpy_dtype
from opt_common.config import OPTConfig
from opt_common.weights import table

GOLDENS = Path(__file__).parent / "goldens" / "frameworks"
SMALL: dict[str, Any] = dict(
    vocab_size=24, hidden_size=8, num_hidden_layers=11, num_attention_heads=2, ffn_dim=16, max_position_embeddings=8
)
CONFIGS = {
    "pre-norm": OPTConfig(**SMALL),
    "350m": OPTConfig(**SMALL, do_layer_norm_before=False, word_embed_proj_dim=4),
    "untied": OPTConfig(**SMALL, tie_word_embeddings=False),
    "no-bias": OPTConfig(**SMALL, enable_bias=False),
    "removed-final-norm": OPTConfig(**SMALL, _remove_final_layer_norm=True),
}


def random_tensors(config: OPTConfig, dtype: str, architecture: str = "OPTForCausalLM") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {s.name: rng.standard_normal(s.shape).astype(numpy_dtype(dtype)) for s in table(config, architecture)}


def write(
    layout: Layout, folder: Path, arrays: Mapping[str, np.ndarray], config: OPTConfig | None, limit: int = 10**9
) -> Path:
    """The arrays, written into `folder`; the path it is read by."""
    assert layout.write is not None
    told: list[int] = []
    sources = [Source(n, a.shape, a.dtype.name, lambda a=a: a) for n, a in arrays.items()]
    names = layout.write(folder, sources, config, limit, told.append)
    assert told == [a.nbytes for a in arrays.values()]
    assert set(names) <= {path.name for path in folder.iterdir()}
    return folder / layout.main[len(names) > 1]


def same_bits(entries: Mapping[str, Entry], arrays: Mapping[str, np.ndarray]) -> None:
    assert entries.keys() == arrays.keys()
    for name, array in arrays.items():
        entry = entries[name]
        assert (entry.shape, entry.dtype) == (array.shape, array.dtype.name), name
        assert entry.read().tobytes() == entry.map().tobytes() == array.tobytes(), name


def refused(read: Callable[[], Any], path: Path, part: str) -> None:
    """`read` raises ValueError that names the file and the offending part, in one line."""
    with pytest.raises(ValueError) as caught:
        read()
    text = str(caught.value)
    assert str(path) in text and part in text and "\n" not in text, text


def damaged(good: bytes, seed: int) -> bytes:
    """A file cut short, or with some bits and bytes changed."""
    rng = np.random.default_rng(seed)
    if rng.random() < 0.2:
        return good[: rng.integers(len(good))]
    data = bytearray(good)
    for at in rng.integers(len(data), size=rng.integers(1, 9)):
        data[at] = rng.choice([data[at] ^ (1 << rng.integers(8)), 0, 255])
    return bytes(data)
