"""What every benchmark shares: the machine and the versions above the numbers, what the work costs at least, a system
in a process of its own, and how all of it is shown. Imports no framework."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opt_common.config import OPTConfig
from opt_common.frameworks import registered
from opt_common.weights import parameter_count

Row = dict[str, Any]
MB = 1_000_000
STARTED = time.perf_counter()
PACKAGES = ("numpy", *(name for framework in registered().values() for name in framework.needs))
PACKAGES += ("triton", "transformers", "flash-attn")
# for a process that measures: a CPU, no download, no greetings
ON_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def machine(smoke: bool = False, device: str | None = None) -> Row:
    """What stands above the numbers: the processor, the versions and the date; no name of a machine."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device is not None and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        if driver := subprocess.run(query, capture_output=True, text=True).stdout.strip():
            versions["driver"] = driver
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "device": device or (names[0] if names else platform.processor()),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "smoke": smoke,
    }


def heading(report: Row) -> str:
    """That in a line."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    kind = "; smoke run, no number means anything" if report["smoke"] else ""
    machine = f"{report['device']}, {report['cores']} cores, load before {report['load_before']:.1f}"
    return f"{machine}, {report['date']}{kind}\n{versions}"


def flops(config: OPTConfig, B: int, S: int) -> int:
    """Of a forward pass: 2 x parameters x tokens (a tied head counts, the position table does not), and causal
    attention, 2 x layers x B x S² x hidden."""
    H = config.hidden_size
    return 2 * read_parameters(config) * B * S + 2 * config.num_hidden_layers * B * S * S * H


def read_parameters(config: OPTConfig) -> int:
    """Those that a step reads: all but the position table."""
    return parameter_count(config) - (config.max_position_embeddings + 2) * config.hidden_size


def child(python: str, module: str, argument: Any, env: dict[str, str], timeout: float = 1200) -> Row:
    """What `python -m benchmarks.MODULE ARGUMENT` prints as the last line, as JSON; or {"not_run": why}."""
    command = [python, "-m", f"benchmarks.{module}", json.dumps(argument)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"not_run": f"{timeout:.0f} seconds were not enough"}
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return {"not_run": (errors or lines)[-1][:300]}
    return json.loads(ran.stdout.splitlines()[-1])


def spread(numbers: Iterable[float]) -> Row:
    """Median, smallest, largest."""
    numbers = list(numbers)
    return {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}


def over(a: float | None, b: float | None) -> float | None:
    """a / b, or None where either is missing."""
    return None if a is None or not b else a / b


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.perf_counter() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 240)


def show(console: Console, title: str, rows: list[Row]) -> None:
    """Rows as a table, headed by their keys; below it, what did not run and why."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key != "not_run"))
    table = Table(title=title, title_justify="left")
    notes = [f"not run: {name}: {why}" for row in rows for name, why in row.get("not_run", {}).items()]
    for key in keys:
        words = all(isinstance(row.get(key), str | None) for row in rows)
        heading = key.replace("flash_attention_2", "FA2").replace("_", " ")
        table.add_column(heading, justify="left" if words else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in keys))
    console.print(table if keys else title)
    for note in dict.fromkeys(notes):
        console.print(note, markup=False, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    places = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{places}f}"
