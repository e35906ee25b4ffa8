"""Peak host memory and time of `from_pretrained`, of every framework, each in a process of its own.

    python -m benchmarks load --size 350m --out load.json

Peak memory is above what the process takes after its imports and after loading opt-demo. On a CPU the model itself lies
in it, so what counts is the peak without the weights. JAX is measured once more with the weights sharded over eight
devices that it makes of the CPU: every tensor whose rows are a multiple of eight, by its rows.
The limits: 1.2 times the weights in the target dtype plus 200 MB; of JAX the weights, the largest tensor and 300 MB.
Linux only: it reads and resets the kernel's own high-water mark.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.checkpoints import random_checkpoint
from benchmarks.ours import modules
from benchmarks.report import MB, ON_CPU, Row, child, console, heading, machine, say, show
from opt_common.checkpoints.tensors import numpy_dtype
from opt_common.config import OPTConfig
from opt_common.files import write_atomically
from opt_common.frameworks import registered
from opt_common.hub import DEMO, fetch
from opt_common.weights import byte_count, table

DEVICES = 8


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the last reset), in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def measure(key: str, folder: str, dtype: str, devices: int) -> Row:
    """Load once in this process: bytes above the level after the imports, and seconds."""
    model_class = registered()[key].model_class()
    how: dict[str, Any] = {"sharding": by_rows(folder)} if devices > 1 else {}
    model_class.from_pretrained(DEMO)  # what a framework allocates once, whatever it loads
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    start = time.perf_counter()
    model = model_class.from_pretrained(folder, dtype=dtype, **how)
    seconds = time.perf_counter() - start
    row = {"peak_MB": (memory("VmHWM") - before) / MB, "after_MB": (memory("VmRSS") - before) / MB, "seconds": seconds}
    return row | (on_devices(model) if devices > 1 else {})


def by_rows(folder: str) -> Any:
    """A tensor's sharding by its name: its rows over all devices, or a copy on each where they cannot be shared."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh, n = Mesh(jax.devices(), "rows"), len(jax.devices())
    shapes = {spec.name: spec.shape for spec in table(OPTConfig.from_pretrained(folder))}

    def sharding(name: str) -> Any:
        return NamedSharding(mesh, PartitionSpec("rows") if shapes[name][0] % n == 0 else PartitionSpec())

    return sharding


def on_devices(model: Any) -> Row:
    """How the bytes of a model lie on its devices."""
    import jax
    from flax import nnx

    arrays = jax.tree.leaves(nnx.state(model, nnx.Param))
    held = dict.fromkeys(jax.devices(), 0)
    for array in arrays:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    copied = sum(array.nbytes for array in arrays if array.is_fully_replicated)
    weights = sum(array.nbytes for array in arrays)
    return {
        "devices": len(held),
        "most_on_a_device_MB": max(held.values()) / MB,
        "copied_to_each_MB": copied / MB,
        "even_share_MB": ((weights - copied) / len(held) + copied) / MB,
    }


def load(
    size: Annotated[str, typer.Option(help="125m to 175b")] = "125m",
    dtype: Annotated[str, typer.Option(help="to load in")] = "float32",
    stored: Annotated[str, typer.Option(help="dtype of the checkpoint")] = "float16",
    out: Annotated[Path | None, typer.Option(help="JSON with every number")] = None,
    smoke: Annotated[bool, typer.Option(help="opt-demo: proves the code alone")] = False,
) -> None:
    """Peak memory and time of from_pretrained, on the CPU, in every framework."""
    report, failed = machine(smoke), False
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch(DEMO, []) if smoke else random_checkpoint(Path(temporary), size, stored)
        config = OPTConfig.from_pretrained(folder)
        weights = byte_count(config, dtype)
        largest = max(spec.size for spec in table(config)) * numpy_dtype(dtype).itemsize
        report |= {"model": "opt-demo" if smoke else f"opt-{size}", "stored": stored, "dtype": dtype}
        report |= {"weights_MB": weights / MB, "largest_tensor_MB": largest / MB, "rows": []}
        for key, devices in (*((key, 1) for key in modules()), ("flax", DEVICES)):
            framework = registered()[key]
            title = framework.title + (f", {devices} devices" if devices > 1 else "")
            row: Row = {"framework": title}
            if framework.missing:
                report["rows"].append(row | {"not_run": {title: framework.missing}})
                continue
            say(title)
            env = ON_CPU | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
            found = child(sys.executable, "load", [key, str(folder), dtype, devices], env)
            if "not_run" in found:
                report["rows"].append(row | {"not_run": {title: found["not_run"]}})
                failed = True
                continue
            row |= found | {"over_weights": found["peak_MB"] * MB / weights}
            row["peak_less_weights_MB"] = found["peak_MB"] - weights / MB
            row["limit_MB"] = modules()[key].load_limit(weights, largest) / MB
            row["met"] = "yes" if row["peak_less_weights_MB"] <= row["limit_MB"] else "NO"
            report["rows"].append(row)
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    printed = console()
    printed.print(heading(report), markup=False, highlight=False)
    sizes = f"{weights / MB:,.0f} MB of weights, the largest tensor {largest / MB:,.0f} MB"
    show(printed, f"{report['model']} from {stored} as {dtype}: {sizes}", report["rows"])
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
