"""`torch.save(model.state_dict(), "model.pt")`: one file of the Hub's names and tensors. Takes no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...config import OPTConfig
from ..tensors import Entry, Source
from . import metaseq, torch_bin

MAIN = ("model.pt",)
SHARD = r"(?!)"


def holds(main: Path) -> bool:
    """Whether this file is one of names and tensors rather than metaseq's, whose names end alike."""
    return metaseq.find(main) is None


def read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    return [main], torch_bin.entries(main)


def write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Callable[[int], None]
) -> list[str]:
    torch_bin.save(folder / MAIN[0], {t.name: t for t in tensors}, advance)
    return [MAIN[0]]


def plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    """The file that `write` would make, and its bytes."""
    return [(MAIN[0], torch_bin.size({t.name: t for t in tensors}))]
