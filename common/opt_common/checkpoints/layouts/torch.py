"""PyTorch's own files: the Hub's `pytorch_model.bin`, or shards with an index; and `model.pt`, a saved state_dict.

Both hold the Hub's names and tensors: `torch.save(model.state_dict(), "model.pt")` makes the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...config import OPTConfig
from ..containers import torch_file
from ..tensors import Source
from .layout import Container, Layout, Progress, hub_layout, reader
from .names import holds_metaseq

_FILE = "model.pt"


def _write(path: Path, tensors: Sequence[Source], advance: Progress) -> None:
    torch_file.write(path, {t.name: t for t in tensors}, advance)


def _size(tensors: Sequence[Source]) -> int:
    return torch_file.size({t.name: t for t in tensors})


def _write_one(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Progress
) -> list[str]:
    """One file, whatever `limit`."""
    _write(folder / _FILE, tensors, advance)
    return [_FILE]


TORCH = hub_layout("pytorch_model.bin", Container(torch_file.read, _write, _size), headed=True)
STATE_DICT = Layout(
    main=(_FILE,),
    read=reader(torch_file.read, None),
    write=_write_one,
    plan=lambda tensors, config, limit: [(_FILE, _size(tensors))],
    holds=lambda main: not holds_metaseq(main),  # whose names end alike
    headed=True,
)
