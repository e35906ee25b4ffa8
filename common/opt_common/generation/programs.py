"""Compiled programs of `generate`: how few will do, and how many a process can have."""

from __future__ import annotations

from pathlib import Path


def columns(n: int) -> int:
    """The width that n columns are padded to, so that one program serves all widths between: 32, multiples of 64 up to
    512, then four widths to each power of two (640, 768, 896, 1024, ...)."""
    return 32 if n <= 32 else n + -n % max(64, 2 ** (n - 1).bit_length() // 8)


def crowded() -> bool:
    """Whether the process has mapped two thirds of the pieces of memory that Linux lets it have, 65,530 by default;
    with more it crashes. On a CPU each program of XLA maps hundreds: of 2 layers 200 to 400, of 24 layers 300 to 900.
    """
    try:
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
        return maps * 3 > int(Path("/proc/sys/vm/max_map_count").read_text()) * 2
    except OSError:  # not Linux
        return False
