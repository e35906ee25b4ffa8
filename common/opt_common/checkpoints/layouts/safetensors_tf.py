"""Safetensors as transformers' TensorFlow classes wrote them: `model/decoder/layers.0/fc1/kernel:0`, stored [in, out].

TFOPTForCausalLM has no head of its own: a model with one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...config import OPTConfig
from ..tensors import Entry, Source
from . import safetensors
from .names import from_tf, to_tf

MAIN, SHARD = safetensors.MAIN, safetensors.SHARD


def holds(main: Path) -> bool:
    return safetensors.style(main) == "tf"


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    return safetensors.read_styled(main, from_tf)


def write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Callable[[int], None]
) -> list[str]:
    return safetensors.write_styled(folder, tensors, limit, advance, "tf", to_tf, _in_index)


def plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    return safetensors.plan_styled(tensors, limit, "tf", to_tf, _in_index)


def _in_index(name: str) -> str:
    return f"tfopt_for_causal_lm/{name}"  # as transformers: the index keeps the scope, the shards do not
