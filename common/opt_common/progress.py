"""Progress bars, for work that takes a while. They show on stderr, on terminals only, and disappear at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


@contextmanager
def byte_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes just done."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(title, total, DownloadColumn(), TransferSpeedColumn()) as advance:
        yield advance


@contextmanager
def counter(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with how many more of `total` are done."""
    from rich.progress import MofNCompleteColumn

    with _bar(title, total, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int, *columns: ProgressColumn) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    hidden = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"  # of torchrun's processes the first shows it
    shown = (TextColumn(title), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*shown, console=Console(stderr=True), transient=True, disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)
