"""Safetensors as transformers' Flax classes wrote them: `model.decoder.layers.0.fc1.kernel`, stored [in, out].

Those classes load one file only, so a model that does not fit into one is worth a larger limit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ...config import OPTConfig
from ..tensors import Entry, Source
from . import safetensors
from .names import from_flax, to_flax

MAIN, SHARD = safetensors.MAIN, safetensors.SHARD


def holds(main: Path) -> bool:
    return safetensors.style(main) == "flax"


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    return safetensors.read_styled(main, from_flax)


def write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Callable[[int], None]
) -> list[str]:
    names = safetensors.write_styled(folder, tensors, limit, advance, "flax", to_flax)
    if len(names) > 1:
        text = f"transformers' Flax loads one file only, not these {len(names)}; a larger max_shard_size makes one"
        warnings.warn(text, stacklevel=2)
    return names


def plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    return safetensors.plan_styled(tensors, limit, "flax", to_flax)
