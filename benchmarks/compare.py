"""All frameworks here beside every peer that an environment given here has, and what the machine can do.

    python -m benchmarks cpu --out cpu.json    # ours, and the peers that are installed here
    python -m benchmarks cpu --peers-python A/bin/python --peers-python B/bin/python    # and in other environments
    python -m benchmarks cpu --smoke    # opt-demo, a few tokens, once: proves the code alone

Ours run in the environment that runs this; a peer runs in the first, this one included, that has what it needs:

    transformers PyTorch              pip install transformers==5.23.0 torch
    transformers TensorFlow, Flax     pip install transformers==4.57.6 tensorflow tf_keras jax flax torch
    keras-hub, CTranslate2            pip install keras-hub==0.32.0 tensorflow ctranslate2==4.8.5 transformers torch

One checkpoint of random weights (on a CPU opt-125m's shape), all cores. Each system is measured in a process of its
own, one after another, in rounds: a slow minute of the machine does not fall on one system alone. Medians over all.

prefill   forward pass of B rows of S tokens, all logits, no cache; compiled where the framework compiles
decode    a whole greedy `generate`, none of whose tokens ends a row: new tokens per second of all B rows (on a CPU
          prompt 32, 64 new tokens)
beams     the same by beam search, 4 beams of one prompt, new tokens of all beams; "–" where it is not measured
spread    the largest less the smallest, over the median
int8      of CTranslate2 all matrices and what goes into them; of ours, as int4, the matrices of the layers: the head,
          and what goes into a product, stay float32
x best    ours over the best peer; a float32 row is held to the float32 peers, every other to all
ceiling   the seconds that the work takes at least (its operations at the rate of a matrix product of its dtype, or
          reading the weights once a step, whichever is longer; the cache is not counted), over those that it took
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.checkpoints import random_checkpoint
from benchmarks.ours import modules
from benchmarks.peers import Job, System
from benchmarks.report import ON_CPU, Row, child, console, flops, heading, machine, over, read_parameters, say, spread
from opt_common.config import OPTConfig
from opt_common.files import write_atomically
from opt_common.hub import DEMO, fetch

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}
WRONG = {
    "float32": 1e-4,
    "bfloat16": 5e-2,
    "float16": 2e-2,
    "int8": 2e-1,
    "int4": 5e-1,
}  # of the logits, over their norm


PT5 = {"transformers": "5.", "torch": ""}
TF4 = {"transformers": "4.", "tensorflow": "", "tf-keras": "", "torch": ""}
FLAX4 = {"transformers": "4.", "flax": "", "torch": ""}
CT2 = {"ctranslate2": "", "transformers": "", "torch": ""}
CPU = (
    *(system for module in modules().values() for system in module.CPU),
    System("transformers_pt", "transformers {} PyTorch", "float32", PT5),
    System("transformers_tf", "transformers {} TensorFlow", "float32", TF4),
    System("transformers_flax", "transformers {} Flax", "float32", FLAX4),
    System("keras_hub", "keras-hub {} TensorFlow", "float32", {"keras-hub": "", "tensorflow": ""}),
    System("ctranslate2", "CTranslate2 {}", "float32", CT2),
    System("transformers_pt", "transformers {} PyTorch", "bfloat16", PT5),
    System("ctranslate2", "CTranslate2 {}", "int8", CT2),
)
FLASH = "flash_attention_2"
GPU = (
    *(system for module in modules().values() for system in module.GPU),
    System("transformers_pt", "transformers {} PyTorch, sdpa", "float16", PT5),
    System("transformers_pt", "transformers {} PyTorch, FA2", "float16", PT5 | {"flash-attn": ""}, FLASH),
)


def packages(python: str) -> dict[str, str]:
    """The version of every package of an environment."""
    code = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
    ran = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in json.loads(ran.stdout) if name}


def plan(systems: Sequence[System], peers_python: Sequence[str] | None = None) -> list[tuple[System, str, Row]]:
    """For each system the python that has it, and its row of the report; "not_run" there says why it does not run."""
    environments = {python: packages(python) for python in (sys.executable, *(peers_python or []))}
    rows = []
    for system in systems:
        row: Row = {"key": system.key, "dtype": system.dtype, "ours": system.ours}
        homes = list(environments)[: 1 if system.ours else None]
        for python in homes:
            versions = {name: environments[python].get(name) for name in system.needs}
            if not system.never and all(v and v.startswith(system.needs[name]) for name, v in versions.items()):
                title = system.title.format(next(iter(versions.values())))
                rows.append((system, python, {"system": title} | row | {"versions": versions}))
                break
        else:
            wanted = ", ".join(f"{name} {version}".strip() for name, version in system.needs.items())
            title = " ".join(system.title.replace("{}", next(iter(system.needs.values())).rstrip(".")).split())
            why = "" if system.never else f"no environment given here has {wanted}"
            rows.append((system, "", {"system": title.replace(" ,", ",")} | row | {"not_run": why}))
    return rows


def ceilings(job: Job) -> dict[str, float]:
    """What this CPU does, measured in a process of its own."""
    found = child(sys.executable, "peers", asdict(replace(job, system="ceilings")), ON_CPU)
    if "not_run" in found:
        raise RuntimeError(f"ceilings: {found['not_run']}")
    return found


def turn(rows: list[tuple[System, str, Row]], job: Job, env: dict[str, str]) -> None:
    """Measure every system once more; its seconds are added to those of its row."""
    for system, python, row in rows:
        if "not_run" in row:
            continue
        say(f"{row['system']} {row['dtype']}")
        its = replace(job, system=system.key, dtype=system.dtype, attention=system.attention)
        found = child(python, "peers", asdict(its), env)
        for name in ("seconds", "first_s"):
            for column, took in found.get(name, {}).items():
                took = took if isinstance(took, list) else [took]
                found[name][column] = row.get(name, {}).get(column, []) + took
        row |= found


def columns(job: Job) -> list[str]:
    written = [f"decode B{B}" for B in job.decode] + [f"beams B{K}" for K in job.beams]
    return [f"prefill B{B} S{S}" for B, S in job.prefill] + written


def floors(config: OPTConfig, job: Job, product: float | None, reading: float | None, width: float) -> dict[str, Any]:
    """The least seconds of each column, by FLOP/s and bytes/s; None where these were not measured."""
    if not product or not reading:
        return dict.fromkeys(columns(job))
    E, V, once = config.embed_dim, config.vocab_size, read_parameters(config) * width / reading

    def least(operations: int) -> float:
        return max(operations / product, once)

    found = {f"prefill B{B} S{S}": least(flops(config, B, S)) for B, S in job.prefill}
    for name, rows, B in [*(("decode", B, B) for B in job.decode), *(("beams", 1, K) for K in job.beams)]:
        # of a prompt, the logits of the last token alone
        prompt = least(flops(config, rows, job.prompt) - 2 * rows * (job.prompt - 1) * V * E)
        found[f"{name} B{B}"] = prompt + (job.new - 1) * least(flops(config, B, 1))
    return found


def summarize(rows: list[Row], config: OPTConfig, job: Job, rates: dict[str, float]) -> None:
    """Give each row its medians and what they are held to; a row whose logits are wrong has not run.

    rates: FLOP/s by what begins with the dtype, bytes/s by what begins with "read"."""
    dtypes = ("float32", *dict.fromkeys(row["dtype"] for row in rows))
    truth = next((row["logits"] for t in dtypes for row in rows if row["dtype"] == t and "logits" in row), None)
    for row in rows:
        if "not_run" in row:
            continue
        if row["key"] != "keras_hub":  # whose weights are its own
            row["error"] = float(np.linalg.norm(np.subtract(row["logits"], truth)) / np.linalg.norm(truth))
            if not row["error"] < WRONG[row["dtype"]]:
                row["not_run"] = f"logits off by {row['error']:.1e} of their norm: the time of a wrong answer"
                continue
        product, reading = (
            max((rate for name, rate in rates.items() if name.startswith(what)), default=None)
            for what in (row["dtype"], "read")
        )
        least = floors(config, job, product, reading, BYTES[row["dtype"]])
        for column in (column for column in columns(job) if column in row["seconds"]):
            seconds, B = row["seconds"][column], int(column.split()[1][1:])
            prefill = column.startswith("prefill")
            row[column] = spread(1000 * s if prefill else B * job.new / s for s in seconds)
            row[column]["of_ceiling"] = over(least[column], spread(seconds)["median"])
    done = [row for row in rows if "not_run" not in row]
    for row in (row for row in done if row["ours"]):
        peers = [p for p in done if not p["ours"] and (row["dtype"] != "float32" or p["dtype"] == "float32")]
        for column in (column for column in columns(job) if column in row):
            best = min if column.startswith("prefill") else max
            theirs = best((p[column]["median"] for p in peers if column in p), default=None)
            row[column]["x_best"] = over(row[column]["median"], theirs)
    for row in rows:
        row.pop("logits", None)


def drawn(rows: list[Row], columns: list[str]) -> Table:
    """The table; a row that did not run says so."""
    title = "prefill in milliseconds, x best wanted ≤ 1; decode in new tokens per second, x best wanted ≥ 1"
    table = Table(title=title, title_justify="left")
    table.add_column("system", no_wrap=True)
    table.add_column("dtype")
    for name in columns:
        for over_it in (name, "spread", "x best", "ceiling"):
            table.add_column(over_it, justify="right")
    for row in rows:
        cells = []
        for column in columns if "not_run" not in row else ():
            if column not in row:
                cells += ["–", "", "", ""]
                continue
            numbers = row[column]
            wide, best, part = numbers["high"] - numbers["low"], numbers.get("x_best"), numbers["of_ceiling"]
            cells += [f"{numbers['median']:.0f}", f"{wide / numbers['median']:.0%}"]
            cells += ["" if best is None else f"{best:.2f}", "–" if part is None else f"{part:.0%}"]
        table.add_row(row["system"], row["dtype"], *(cells or ["not run"]))
    return table


def notes(rows: list[Row]) -> list[str]:
    """Why rows did not run, where there is more to say than that."""
    return [f"not run: {row['system']} {row['dtype']}: {row['not_run']}" for row in rows if row.get("not_run")]


def rates_in_words(rates: dict[str, float]) -> str:
    units = {name: "GB" if name.startswith("read") else "GFLOP" for name in rates}
    return ", ".join(f"{name} {rate / 1e9:,.0f} {units[name]}/s" for name, rate in rates.items())


def cpu(
    out: Annotated[Path | None, typer.Option(help="JSON with every number")] = None,
    peers_python: Annotated[list[str] | None, typer.Option(help="of one more environment; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(help="how often each system is started")] = 2,
    smoke: Annotated[bool, typer.Option(help="opt-demo, a few tokens, once: proves the code alone")] = False,
) -> None:
    """All frameworks on the CPU, beside every peer."""
    systems, rounds = CPU, 1 if smoke else rounds
    if smoke:  # each system in its first dtype: another one runs the same code
        systems = list({system.key: system for system in reversed(CPU)}.values())[::-1]
    planned = plan(systems, peers_python)
    rows = [row for _, _, row in planned]
    report = machine(smoke) | {"model": "opt-demo" if smoke else "opt-125m, random weights", "rounds": rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch(DEMO, []) if smoke else random_checkpoint(Path(temporary), "125m", "float32")
        config = OPTConfig.from_pretrained(folder)
        shape = {"prompt": 4, "new": 4, "repeats": (1, 1)} if smoke else {"prompt": 32, "new": 64, "repeats": (7, 4)}
        job = Job("", "", str(folder), prefill=[(1, 16 if smoke else 512)], decode=[1, 8], beams=[4], **shape)
        rates: dict[str, float] = {}
        for i in range(rounds):
            say(f"round {i + 1}: ceilings")
            rates = {name: max(rate, rates.get(name, 0)) for name, rate in ceilings(job).items()}
            turn(planned, job, ON_CPU)
    summarize(rows, config, job, rates)
    report |= {"ceilings": rates, "rows": rows}
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1) + "\n")
    printed = console()
    head = f"{report['model']}, {rounds} rounds; {rates_in_words(rates)}"
    for line in (heading(report), head, drawn(rows, columns(job)), *notes(rows)):
        printed.print(line, markup=False, highlight=False)
    if any(system.ours and python and "not_run" in row for system, python, row in planned):
        raise typer.Exit(1)
