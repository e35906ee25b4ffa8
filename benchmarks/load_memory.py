"""Peak host memory and time of `from_pretrained`, per framework, each in a process of its own.

    python -m benchmarks.load_memory --size 350m

The target is 1.2 times the weights in the target dtype plus 200 MB, above what the process takes after its imports.
Linux only: it reads and resets the kernel's own high-water mark.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import random_checkpoint
from opt_common.config import OPTConfig
from opt_common.frameworks import FRAMEWORKS
from opt_common.weights import byte_count

MB = 1_000_000


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset), in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure(key: str, folder: str, dtype: str) -> dict[str, float]:
    """Load once in this process: bytes above the level after the imports, and seconds."""
    from opt_common.hub import DEMO

    model_class = FRAMEWORKS[key].model_class()
    model_class.from_pretrained(DEMO)  # what a framework allocates once, whatever it loads
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    start = time.perf_counter()
    model = model_class.from_pretrained(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    peak, after = memory("VmHWM") - before, memory("VmRSS") - before
    del model
    return {"peak": peak, "after": after, "seconds": seconds}


def main(
    size: Annotated[str, typer.Option(help="125m to 175b")] = "125m",
    dtype: Annotated[str, typer.Option(help="to load in")] = "float32",
    stored: Annotated[str, typer.Option(help="dtype of the checkpoint")] = "float16",
    child: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[str, typer.Option(hidden=True)] = "",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Measure the peak memory of from_pretrained in every framework."""
    if child:
        print(json.dumps(measure(child, folder, dtype)))
        return
    weights = byte_count(OPTConfig.from_size(size), dtype)
    limit = 1.2 * weights + 200 * MB
    rows = []
    with tempfile.TemporaryDirectory() as temporary, Console(stderr=True).status("Measuring"):
        random_checkpoint(Path(temporary), size, stored)
        for key, framework in FRAMEWORKS.items():
            if framework.missing:
                rows.append({"framework": framework.title, "problem": framework.missing})
                continue
            command = [sys.executable, "-m", "benchmarks.load_memory", "--child", key, "--folder", temporary]
            ran = subprocess.run([*command, "--dtype", dtype], capture_output=True, text=True, check=True)
            rows.append({"framework": framework.title, **json.loads(ran.stdout.splitlines()[-1])})
    if as_json:
        print(json.dumps({"size": size, "dtype": dtype, "weights": weights, "limit": limit, "rows": rows}, indent=2))
        return
    shown = Table(
        title=f"opt-{size} from {stored} as {dtype}: weights {weights / MB:.0f} MB, limit {limit / MB:.0f} MB"
    )
    for name in ("framework", "peak MB", "of weights", "after MB", "seconds", ""):
        shown.add_column(name, justify="left" if name in ("framework", "") else "right")
    for row in rows:
        if "problem" in row:
            shown.add_row(row["framework"], "", "", "", "", row["problem"])
            continue
        ok = "within" if row["peak"] <= limit else "over"
        numbers = f"{row['peak'] / MB:.0f}", f"{row['peak'] / weights:.2f}", f"{row['after'] / MB:.0f}"
        shown.add_row(row["framework"], *numbers, f"{row['seconds']:.2f}", ok)
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
