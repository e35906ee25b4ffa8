"""OPT on the CPU: all three frameworks, every peer that an environment given here has, and what this CPU can do.

    python -m benchmarks.cpu --out cpu.json    # ours, and the peers that are installed here
    python -m benchmarks.cpu --peers-python A/bin/python --peers-python B/bin/python    # and in other environments
    python -m benchmarks.cpu --smoke    # opt-demo, a few tokens, once: proves the code alone

Ours run in the environment that runs this; a peer runs in the first, this one included, that has what it needs:

    transformers PyTorch              pip install transformers==5.23.0 torch
    transformers TensorFlow, Flax     pip install transformers==4.57.6 tensorflow tf_keras jax flax torch
    keras-hub, CTranslate2            pip install keras-hub==0.32.0 tensorflow ctranslate2==4.8.5 transformers torch

opt-125m's shape, one checkpoint of random weights, all cores. Each system is measured in a process of its own, one
after another, in rounds: a slow minute of the machine does not fall on one system alone. Medians over all rounds.

prefill   forward pass of 512 tokens, all logits, no cache; compiled where the framework compiles
decode    a whole greedy `generate`, prompt 32, 64 new tokens, none of which ends a row: tokens per second of all rows
spread    the largest less the smallest, over the median
x best    ours over the best peer; a float32 row is held to the float32 peers, the bfloat16 row to all
ceiling   the seconds that the work takes at least (its operations at the rate of a matrix product of its dtype, or
          reading the weights once a step, whichever is longer; the cache is not counted), over those that it took
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoints import random_checkpoint
from benchmarks.cpu_peers import THREADS, Job
from benchmarks.systems import flops, over, say
from opt_common.config import OPTConfig
from opt_common.files import write_atomically
from opt_common.hub import DEMO, fetch
from opt_common.weights import parameter_count

Row = dict[str, Any]
COLUMNS = ("prefill", "B1", "B8")
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
WRONG = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 2e-1}  # of the logits, over their norm
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class System:
    """A function of `benchmarks.cpu_peers`, and the packages it needs by the beginning of their versions."""

    key: str
    title: str  # {} is the version of the first package
    dtype: str
    needs: dict[str, str]

    @property
    def ours(self) -> bool:
        return self.key.startswith("opt_")


PT5 = {"transformers": "5.", "torch": ""}
TF4 = {"transformers": "4.", "tensorflow": "", "tf-keras": "", "torch": ""}
FLAX4 = {"transformers": "4.", "flax": "", "torch": ""}
CT2 = {"ctranslate2": "", "transformers": "", "torch": ""}
SYSTEMS = (
    System("opt_pt", "opt_pt, torch {}", "float32", {"torch": ""}),
    System("opt_pt_packed", "opt_pt, torch {}, packed", "float32", {"torch": ""}),
    System("opt_tf", "opt_tf, TensorFlow {}", "float32", {"tensorflow": "", "keras": ""}),
    System("opt_flax", "opt_flax, JAX {}", "float32", {"jax": "", "flax": ""}),
    System("opt_pt", "opt_pt, torch {}", "bfloat16", {"torch": ""}),
    System("opt_pt_packed", "opt_pt, torch {}, packed", "bfloat16", {"torch": ""}),
    System("transformers_pt", "transformers {} PyTorch", "float32", PT5),
    System("transformers_tf", "transformers {} TensorFlow", "float32", TF4),
    System("transformers_flax", "transformers {} Flax", "float32", FLAX4),
    System("keras_hub", "keras-hub {} TensorFlow", "float32", {"keras-hub": "", "tensorflow": ""}),
    System("ctranslate2", "CTranslate2 {}", "float32", CT2),
    System("transformers_pt", "transformers {} PyTorch", "bfloat16", PT5),
    System("ctranslate2", "CTranslate2 {}", "int8", CT2),
)


def packages(python: str) -> dict[str, str]:
    """The version of every package of an environment."""
    code = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in json.loads(ran.stdout) if name}


def plan(environments: dict[str, dict[str, str]]) -> list[Row]:
    """A row for each system: the python that has it, or why it does not run."""
    rows = []
    for system in SYSTEMS:
        row: Row = {"key": system.key, "dtype": system.dtype, "ours": system.ours}
        homes = list(environments)[: 1 if system.ours else None]
        for python in homes:
            versions = {name: environments[python].get(name) for name in system.needs}
            if all(v is not None and v.startswith(system.needs[name]) for name, v in versions.items()):
                title = system.title.format(next(iter(versions.values())))
                rows.append({"system": title} | row | {"python": python, "versions": versions})
                break
        else:
            wanted = ", ".join(f"{name} {version}".strip() for name, version in system.needs.items())
            title = " ".join(system.title.replace("{}", next(iter(system.needs.values())).rstrip(".")).split())
            rows.append({"system": title} | row | {"not_run": f"no environment given here has {wanted}"})
    return rows


def child(python: str, job: Job) -> Row:
    """What one process of `benchmarks.cpu_peers` measured, or {"not_run": why}."""
    command = [python, "-m", "benchmarks.cpu_peers", json.dumps(asdict(job))]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT, timeout=1200)
    except subprocess.TimeoutExpired:
        return {"not_run": "20 minutes were not enough"}
    if ran.returncode:
        lines = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return {"not_run": (errors or lines)[-1][:300]}
    return json.loads(ran.stdout.splitlines()[-1])


def floors(config: OPTConfig, job: Job, dtype: str, rates: dict[str, float]) -> dict[str, float | None]:
    """The least seconds of each column; None for a dtype whose products were not timed."""
    products = [rate for name, rate in rates.items() if name.startswith(dtype)]
    if not products:
        return dict.fromkeys(COLUMNS)
    E, V = config.embed_dim, config.vocab_size
    weights = parameter_count(config) - (config.max_position_embeddings + 2) * config.hidden_size
    reading = weights * BYTES[dtype] / max(rate for name, rate in rates.items() if name.startswith("read"))

    def least(operations: int) -> float:
        return max(operations / max(products), reading)

    found: dict[str, float | None] = {"prefill": least(flops(config, 1, job.tokens))}
    for B in job.batches:
        prompt = least(
            flops(config, B, job.prompt) - 2 * B * (job.prompt - 1) * V * E
        )  # logits of the last token alone
        found[f"B{B}"] = prompt + (job.new - 1) * least(flops(config, B, 1))
    return found


def summarize(rows: list[Row], config: OPTConfig, job: Job, rates: dict[str, float]) -> None:
    """Give each row its medians and what they are held to; a row whose logits are wrong has not run."""
    truth = next((row["logits"] for row in rows if row["dtype"] == "float32" and "logits" in row), None)
    for row in rows:
        if "not_run" in row or "logits" not in row:
            continue
        if row["key"] != "keras_hub":  # whose weights are its own
            row["error"] = float(np.linalg.norm(np.subtract(row["logits"], truth)) / np.linalg.norm(truth))
            if not row["error"] < WRONG[row["dtype"]]:
                row["not_run"] = f"logits off by {row['error']:.1e} of their norm: the time of a wrong answer"
                continue
        least = floors(config, job, row["dtype"], rates)
        for column in COLUMNS:
            seconds = row["seconds"][column]
            numbers = [1000 * s if column == "prefill" else int(column[1:]) * job.new / s for s in seconds]
            row[column] = {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
            row[column]["of_ceiling"] = over(least[column], statistics.median(seconds))
    done = [row for row in rows if "prefill" in row and "not_run" not in row]
    for row in (row for row in done if row["ours"]):
        peers = [p for p in done if not p["ours"] and (row["dtype"] != "float32" or p["dtype"] == "float32")]
        for column in COLUMNS:
            best = (min if column == "prefill" else max)((p[column]["median"] for p in peers), default=None)
            row[column]["x_best"] = over(row[column]["median"], best)


def drawn(rows: list[Row]) -> Table:
    """The table; a row that did not run says so, and why is printed below."""
    title = "prefill in milliseconds, x best wanted ≤ 1; decode in new tokens per second, x best wanted ≥ 1"
    table = Table(title=title, title_justify="left")
    table.add_column("system", no_wrap=True)
    table.add_column("dtype")
    for name in ("prefill", "decode B1", "decode B8"):
        for heading in (name, "spread", "x best", "ceiling"):
            table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for column in COLUMNS if "not_run" not in row else ():
            numbers = row[column]
            spread, best, part = numbers["high"] - numbers["low"], numbers.get("x_best"), numbers["of_ceiling"]
            cells += [f"{numbers['median']:.0f}", f"{spread / numbers['median']:.0%}"]
            cells += ["" if best is None else f"{best:.2f}", "–" if part is None else f"{part:.0%}"]
        table.add_row(row["system"], row["dtype"], *(cells or ["not run"]))
    return table


def cpu() -> str:
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.processor()


def main(
    out: Annotated[Path | None, typer.Option(help="JSON with every number")] = None,
    peers_python: Annotated[list[str] | None, typer.Option(help="of one more environment; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(help="how often each system is started")] = 2,
    smoke: Annotated[bool, typer.Option(help="opt-demo, a few tokens, once: proves the code alone")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print that instead of the table")] = False,
) -> None:
    """Measure OPT on the CPU beside its peers."""
    load, rounds = os.getloadavg()[0], 1 if smoke else rounds
    rows = plan({python: packages(python) for python in (sys.executable, *(peers_python or []))})
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch(DEMO, []) if smoke else random_checkpoint(Path(temporary), "125m", "float32")
        config = OPTConfig.from_pretrained(folder)
        sizes = {"tokens": 16, "prompt": 4, "new": 4} if smoke else {"tokens": 512, "prompt": 32, "new": 64}
        job = {"folder": str(folder), "batches": [1, 8], "repeats": (1, 1) if smoke else (7, 4)} | sizes
        rates: dict[str, float] = {}
        for turn in range(rounds):
            say(f"round {turn + 1}: ceilings")
            found = child(sys.executable, Job(system="ceilings", dtype="", **job))
            if "not_run" in found:
                raise RuntimeError(f"ceilings: {found['not_run']}")
            rates = {name: max(rate, rates.get(name, 0)) for name, rate in found.items()}
            for row in (row for row in rows if "not_run" not in row):
                say(f"round {turn + 1}: {row['system']} {row['dtype']}")
                found = child(row["python"], Job(system=row["key"], dtype=row["dtype"], **job))
                for column in COLUMNS if "not_run" not in found else ():
                    seconds = row.get("seconds", {}).get(column, []) + found["seconds"][column]
                    found["seconds"][column] = seconds
                row |= found
    summarize(rows, config, Job(system="", dtype="", **job), rates)
    report = {
        "smoke": smoke,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": THREADS,
        "load_before": load,
        "python": platform.python_version(),
        "rounds": rounds,
        "ceilings": rates,
        "rows": rows,
    }
    text = json.dumps(report, indent=1) + "\n"
    if out is not None:
        write_atomically(out, text)
    if as_json:
        print(text)
        return
    console = Console(width=None if sys.stdout.isatty() else 170)
    found = [
        f"{name} {rate / 1e9:,.0f} {'GB' if name.startswith('read') else 'GFLOP'}/s" for name, rate in rates.items()
    ]
    notes = [f"not run: {row['system']} {row['dtype']}: {row['not_run']}" for row in rows if "not_run" in row]
    kind = "smoke run, no number means anything" if smoke else "opt-125m's shape, random weights"
    head = f"{report['cpu']}, {THREADS} cores, load before {load:.1f}, {report['date']}; {kind}; {rounds} rounds"
    for line in (head, ", ".join(found), drawn(rows), *notes):
        console.print(line, markup=False, highlight=False)
    if any(row["ours"] and "python" in row and "not_run" in row for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
