"""Rate and peak memory of `opt-zoo convert` through the layouts and back, beside `cp`.

    python -m benchmarks convert --size 2.7b --out benchmarks/convert.json    # the rows of other sizes stay

Real widths and random weights in float16; of the layers only as many as make three gigabytes, unless --layers says
otherwise. Each conversion reads what the one before wrote, and the last file must be the first to the bit. 8 and 4 bits
are rounded from that first one.

A conversion is a process of its own, timed without its imports; `cp`, started in another such, copies the files of its
source. Both end when all is on disk (fsync). Before each, what the last one wrote is removed, all else is on disk, the
source lies in the page cache, and memory for as many bytes has just been touched. The two take turns, and so does who
begins.
Wanted: 60 % of cp's rate by the medians, and at most 2 x the largest tensor + 200 MB above the process after its
imports and after converting opt-demo. Linux only: it reads and resets the kernel's own high-water mark.
"""

from __future__ import annotations

import filecmp
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.checkpoints import random_checkpoint
from benchmarks.load import memory
from benchmarks.report import MB, Row, child, console, heading, machine, say, show, spread
from opt_common.checkpoints.checkpoint import Checkpoint
from opt_common.checkpoints.convert import convert as run
from opt_common.checkpoints.convert import plan
from opt_common.config import OPTConfig
from opt_common.files import read_json, write_atomically
from opt_common.hub import DEMO, fetch
from opt_common.quantization import QuantizationConfig
from opt_common.weights import table

CHAIN = ("torch", "metaseq", "tf-h5", "flax-msgpack", "state-dict", "safetensors")
BITS = {"8 bits": 8, "4 bits": 4}
BYTES = 3_000_000_000
REPEATS = 3


def measure(to: str, source: str, target: str, copied: str) -> Row:
    """Convert once in this process, or `cp` if `to` is that: seconds, and bytes above the level after the imports."""
    with tempfile.TemporaryDirectory() as temporary:
        run(DEMO, temporary, **({} if to == "cp" else how(to)))
    files = Checkpoint(source).files
    prepare(files, [target, copied])
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    start = time.perf_counter()
    if to == "cp":
        copy(files, Path(copied))
    else:
        run(source, target, **how(to))
    return {"seconds": time.perf_counter() - start, "peak": memory("VmHWM") - before}


def how(to: str) -> dict[str, Any]:
    """The options of a conversion."""
    return {"quantization": QuantizationConfig.rounding(BITS[to])} if to in BITS else {"to": to}


def copy(files: list[Path], target: Path) -> None:
    """`cp`, until all is on disk."""
    target.mkdir()
    subprocess.run(["cp", *map(str, files), str(target)], check=True)
    for file in files:
        with open(target / file.name, "rb") as opened:
            os.fsync(opened.fileno())


def prepare(files: list[Path], remove: list[str]) -> None:
    """Nothing is left to be written, the files lie in the page cache, and there is memory for as many bytes: a virtual
    machine may have lent it to another, and then the first touch takes longer than the copy."""
    for folder in remove:
        shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.read(2**24):
                pass
    with mmap.mmap(-1, sum(file.stat().st_size for file in files)) as touched:
        for at in range(0, len(touched), mmap.PAGESIZE):
            touched[at] = 1


def step(source: Path, target: Path, to: str, repeats: int, largest: int) -> Row:
    """One conversion beside cp; leaves its last result."""
    checkpoint = Checkpoint(source)
    nbytes = sum(file.stat().st_size for file in checkpoint.files)
    row: Row = {"from": checkpoint.layout, "to": to, "MB": nbytes / MB}
    foreseen, rates, peak = plan(source, target, **how(to)), {"cp": [], to: []}, 0
    for turn in range(repeats):
        for what in ("cp", to) if (repeats - turn) % 2 else (to, "cp"):  # the conversion is the last
            arguments = [what, *map(str, (source, target, target.with_name("copy")))]
            found = child(sys.executable, "convert", arguments, {})
            if "not_run" in found:
                return row | {"not_run": {f"{row['from']} to {what}": found["not_run"]}}
            rates[what].append(nbytes / MB / found["seconds"])
            peak = peak if what == "cp" else max(peak, found["peak"])
    written = {path.name: path.stat().st_size for path in target.iterdir()}
    limit = 2 * largest + 200 * MB
    row |= {"ours_MB_s": spread(rates[to]), "cp_MB_s": spread(rates["cp"])}
    row["of_cp"] = row["ours_MB_s"]["median"] / row["cp_MB_s"]["median"]
    row |= {"peak_MB": peak / MB, "limit_MB": limit / MB, "as_planned": dict(foreseen.files) == written}
    row["met"] = "yes" if row["of_cp"] >= 0.6 and peak <= limit and row["as_planned"] else "NO"
    return row


def layers_of(size: str, nbytes: int) -> int:
    """How many layers make a checkpoint of about so many bytes in float16."""
    one, two = (sum(2 * spec.size for spec in table(OPTConfig.from_size(size, num_hidden_layers=n))) for n in (1, 2))
    return min(OPTConfig.from_size(size).num_hidden_layers, max(1, round((nbytes - one) / (two - one)) + 1))


def convert(
    size: Annotated[str, typer.Option(help="125m to 175b: its widths")] = "2.7b",
    layers: Annotated[int | None, typer.Option(help="default: as many as make 3 GB")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = REPEATS,
    folder: Annotated[Path | None, typer.Option(help="on the disk to measure; default: for temporary files")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON with every number")] = None,
    smoke: Annotated[bool, typer.Option(help="opt-demo: proves the code alone")] = False,
) -> None:
    """Rate and peak memory of converting, beside cp, from layout to layout and back."""
    report: Row = {"sizes": {}}
    if out is not None and out.exists():
        report = read_json(out)
    found: Row = machine(smoke)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        root = Path(temporary)
        say("weights")
        if smoke:
            given = fetch(DEMO, [])
        else:
            given = random_checkpoint(root / "given", size, layers=layers or layers_of(size, BYTES))
        config, rows, last = OPTConfig.from_pretrained(given), [], given
        largest = max(2 * math.prod(spec.shape) for spec in table(config))
        found |= {"model": "opt-demo" if smoke else f"opt-{size}", "layers": config.num_hidden_layers}
        found |= {"largest_tensor_MB": largest / MB, "rows": rows}
        for to in CHAIN:
            say(f"to {to}")
            rows.append(step(last, root / to, to, repeats, largest))
            if "not_run" in rows[-1]:
                break
            if last != given:
                shutil.rmtree(last)
            last = root / to
        for bits in BITS:
            say(f"to {bits}")
            rows.append(step(given, root / bits.replace(" ", "-"), bits, repeats, largest))
        first = Checkpoint(given).files
        same = last.name == CHAIN[-1] and all(filecmp.cmp(file, last / file.name, shallow=False) for file in first)
        found["same_in_the_end"] = same
    report["sizes"][found["model"]] = found
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    printed = console()
    printed.print(heading(found), markup=False, highlight=False)
    title = f"{found['model']}, {config.num_hidden_layers} layers, float16"
    medians = [{k: v["median"] if k.endswith("MB_s") else v for k, v in row.items()} for row in rows]
    show(printed, f"{title}; the last file is the first: {'yes' if same else 'NO'}", medians)
    if not same:
        raise typer.Exit(1)


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
