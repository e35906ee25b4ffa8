"""The Hub's `model.safetensors`, or shards with `model.safetensors.index.json`.

transformers writes the same files from PyTorch, TensorFlow and Flax, each with its own names and orientation of
matrices; the names tell which wrote them. TFOPTForCausalLM has no head of its own: a model with one is refused.
FlaxOPTForCausalLM loads one file only, so a model that exceeds one shard is worth a larger limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ...files import read_json
from ..containers import safetensors
from .layout import Container, hub_layout
from .names import FLAX_NAMES, TF_NAMES, TF_SCOPE


def style(main: Path) -> str:
    """Whose names a file, or an index, has: "pt", "tf" or "flax"."""
    if main.name.endswith(".index.json"):
        weight_map = read_json(main).get("weight_map")
        return _style(weight_map, None, main) if isinstance(weight_map, dict) else "pt"
    return _style(*safetensors.describe(main), main)


def _style(names: Iterable[str], said: str | None, path: Path) -> str:
    # PyTorch and Flax name biases alike, and a shard may hold nothing else
    ends = {name.rpartition(".")[2] for name in names}
    found = None
    if any("/" in name for name in names):
        found = "tf"
    elif ends & {"kernel", "scale", "embedding"}:
        found = "flax"
    elif "weight" in ends:
        found = "pt"
    said = said if said in ("pt", "tf", "flax") else None
    if found and said and found != said:
        raise ValueError(f"{path}: metadata gives format {said!r}, but the names of its tensors are those of {found!r}")
    return found or said or "pt"


def _container(style: str) -> Container:
    write, size = partial(safetensors.write, style=style), partial(safetensors.size, style=style)
    return Container(safetensors.read, write, size)


_FILE = "model.safetensors"
SAFETENSORS = hub_layout(_FILE, _container("pt"), holds=lambda main: style(main) == "pt", headed=True)
SAFETENSORS_TF = hub_layout(_FILE, _container("tf"), TF_NAMES, scope=TF_SCOPE, holds=lambda main: style(main) == "tf")
SAFETENSORS_FLAX = hub_layout(
    _FILE,
    _container("flax"),
    FLAX_NAMES,
    holds=lambda main: style(main) == "flax",
    one_file="transformers' Flax",
)
