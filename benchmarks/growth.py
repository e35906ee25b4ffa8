"""Cost as the work grows, on a CPU: all frameworks, and the peers that have a cache to look at.

    python -m benchmarks growth --out benchmarks/growth.json    # and growth.png beside it; 10 to 15 minutes
    python -m benchmarks growth --systems opt_pt --out ...      # these again; the rows of the others stay
    python -m benchmarks growth --smoke                         # opt-demo, once: proves the code alone

opt-125m's shape, float32, random weights, a process for each system, which has a budget of time. Medians.

prefill   forward pass of a row of S tokens, all logits, no cache: milliseconds
length    the last 24 tokens up to a length, of one row, in a cache made for that length, and in one made for 2048
batch     the last 24 tokens up to 128, of B rows
floor     the operations of the prefill at the rate of the best matrix product; of a step, reading every weight and the
          slots that are taken once (dotted: all that are allocated), at the rate of the best read of memory

A step is what `generate` runs for a token, on a cache filled with numbers and not by a prompt: its time is not in its
values. CTranslate2's steps are the times between its own calls back; of its cache nothing can be chosen.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.checkpoints import random_checkpoint
from benchmarks.compare import CPU, ceilings, plan
from benchmarks.ours import modules
from benchmarks.peers import Job
from benchmarks.report import ON_CPU, Row, child, console, flops, heading, machine, read_parameters, say, show, spread
from opt_common.config import OPTConfig
from opt_common.files import read_json, write_atomically
from opt_common.hub import DEMO, fetch

LENGTHS, BATCHES, NEW = (128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32), 24
BUDGET = 170  # seconds of a system, about
# a colour and a marker for a system: told apart without colours too
STYLES = {f"opt_{key}": module.STYLE for key, module in modules().items()} | {
    "transformers_pt": ("#a8579b", "v"),
    "ctranslate2": ("#7f7f7f", "D"),
}


def growth(
    out: Annotated[Path | None, typer.Option(help="JSON, written after each system, and a PNG beside it")] = None,
    systems: Annotated[str, typer.Option()] = ",".join(STYLES),
    peers_python: Annotated[list[str] | None, typer.Option(help="of one more environment; may be repeated")] = None,
    smoke: Annotated[bool, typer.Option(help="opt-demo, once: proves the code alone")] = False,
) -> None:
    """How prefill and decode grow with the length and the batch, on the CPU."""
    wanted = systems.split(",")
    if unknown := [name for name in wanted if name not in STYLES]:
        raise typer.BadParameter(f"{', '.join(unknown)}: wanted some of {', '.join(STYLES)}")
    planned = plan([s for s in CPU if s.key in wanted and s.dtype == "float32"], peers_python)
    lengths, batches, new = ((16, 32), (1, 2), 4) if smoke else (LENGTHS, BATCHES, NEW)
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch(DEMO, []) if smoke else random_checkpoint(Path(temporary), "125m", "float32")
        config = OPTConfig.from_pretrained(folder)
        steps = [(B, lengths[0], lengths[0]) for B in batches]
        steps += [(1, length, slots) for length in lengths for slots in dict.fromkeys((length, lengths[-1]))]
        job = Job("", "", str(folder), [(1, S) for S in lengths], steps=list(dict.fromkeys(steps)), new=new)
        job = replace(job, repeats=(1, 1) if smoke else (3, 3), warm=1, budget_s=BUDGET)
        say("ceilings")
        report = machine(smoke) | {"model": "opt-demo" if smoke else "opt-125m, random weights, float32"}
        report |= {"lengths": lengths, "batches": batches, "ceilings": ceilings(job), "floors": {}, "rows": []}
        if out is not None and out.exists():
            before = read_json(out)
            report["rows"] = [row for row in before["rows"] if row["key"] not in wanted]
            for name, rate in before["ceilings"].items():  # of the best minute, for all
                report["ceilings"][name] = max(rate, report["ceilings"].get(name, 0))
        report["floors"] = floors(config, job, report["ceilings"])
        for system, python, row in planned:
            say(row["system"])
            if "not_run" not in row:
                found = child(python, "peers", asdict(replace(job, system=system.key, dtype=system.dtype)), ON_CPU)
                cells = found.pop("seconds", {})
                row |= {k: v for k, v in found.items() if k == "not_run"} | {"date": machine()["date"]}
                row["ms"] = {cell: {k: 1000 * v for k, v in spread(s).items()} for cell, s in cells.items()}
            report["rows"].append(row)
            report["rows"].sort(key=lambda row: list(STYLES).index(row["key"]))
            if out is not None:
                write_atomically(out, json.dumps(report, indent=1) + "\n")
    if out is not None and not smoke:
        draw(report, out.with_suffix(".png"))
    printed = console()
    printed.print(heading(report), markup=False, highlight=False)
    show(printed, "Milliseconds: a forward pass, or a step of all rows", table(report))


def floors(config: OPTConfig, job: Job, rates: dict[str, float]) -> dict[str, float]:
    """The least milliseconds of each cell."""
    product, reading = (max(v for k, v in rates.items() if k.startswith(what)) for what in ("float32", "read"))
    weights, slot = 4 * read_parameters(config), 4 * 2 * config.num_hidden_layers * config.hidden_size
    found = {f"prefill B{B} S{S}": 1000 * flops(config, B, S) / product for B, S in job.prefill}
    for B, length, slots in job.steps:
        found[f"step B{B} L{length} of {slots}"] = 1000 * (weights + B * slots * slot) / reading
    return found


def table(report: Row) -> list[Row]:
    """A row for each cell, a column for each system."""
    done = [row for row in report["rows"] if "ms" in row]
    lines: list[Row] = []
    for cell, floor in report["floors"].items():
        values = {row["key"]: row["ms"].get(cell, {}).get("median") for row in done}
        lines.append({"cell": cell} | values | {"floor": floor})
    problems = {row["system"]: row["not_run"] for row in report["rows"] if "not_run" in row}
    return [*lines[:-1], lines[-1] | {"not_run": problems}]


def draw(report: Row, path: Path) -> None:
    """Three panels, a line for each system."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    lengths, batches = report["lengths"], report["batches"]
    first, last = lengths[0], lengths[-1]
    lines = (
        (panels[0], [(S, f"prefill B1 S{S}", 1) for S in lengths], False, "-"),
        (panels[1], [(S, f"step B1 L{S} of {S}", 1000) for S in lengths], True, "-"),
        (panels[1], [(S, f"step B1 L{S} of {last}", 1000) for S in lengths], True, "--"),
        (panels[2], [(B, f"step B{B} L{first} of {first}", 1000 * B) for B in batches], True, "-"),
    )
    for panel, cells, inverted, dashes in lines:

        def points(ms: dict[str, float], cells: Any = cells, inverted: bool = inverted) -> list[tuple[int, float]]:
            return [(x, k / ms[cell] if inverted else ms[cell]) for x, cell, k in cells if cell in ms]

        for row in report["rows"]:
            found = points({cell: numbers["median"] for cell, numbers in row.get("ms", {}).items()})
            if len(found) > 1:
                colour, marker = STYLES[row["key"]]
                label = row["system"] if dashes == "-" else None
                style = {"color": colour, "marker": marker, "markersize": 5 if dashes == "-" else 3, "label": label}
                panel.plot(*zip(*found, strict=True), linestyle=dashes, linewidth=1.8 if row["ours"] else 1.2, **style)
        label = "floor: products, or reading weights and cache" if dashes == "-" else None
        style = {"color": "black", "linewidth": 1, "linestyle": ":" if dashes == "-" else (0, (1, 4))}
        panel.plot(*zip(*points(report["floors"]), strict=True), label=label, **style)
    titles = (
        ("Prefill, one row", "tokens", "milliseconds", lengths),
        (f"Decode, one row\ndashed: cache allocated for {last}", "tokens in the cache", "tokens per second", lengths),
        (f"Decode at {first} tokens in the cache", "rows", "tokens per second, all rows", batches),
    )
    for panel, (title, x, y, ticks) in zip(panels, titles, strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_title(title, fontsize=9.5)
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if panel is panels[1] else (1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"{report['model']}, {report['device']}, {report['cores']} cores", fontweight="bold")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=160)
    plt.close(figure)
