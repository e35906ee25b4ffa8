"""The diagrams of docs/gpu.md: the forward pass against batch size, transformers' attentions and our FlashAttention-2.

    python -m benchmarks speedup measure --out benchmarks/speedup.json    # on a GPU, about a minute
    python -m benchmarks speedup draw benchmarks/speedup.json             # speedup-350m.png, speedup-2.7b.png beside it

`draw` needs matplotlib. The measuring is `benchmarks.gpu`'s: random weights, float16, all logits, no cache, medians.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import systems
from benchmarks.report import say
from benchmarks.systems import Setup
from opt_common.files import read_json, write_atomically

SEQUENCES, BATCHES = (1024, 2048), (1, 2, 4, 8, 16)
OURS, EAGER, FLASH = "ours flash_attention_2", "transformers eager", "transformers flash_attention_2"
# one colour, marker and name for a system, in every panel: told apart without colours too
STYLES = {
    EAGER: ("#d55e00", "s", "transformers eager"),
    "transformers sdpa": ("#a8579b", "^", "transformers sdpa"),
    FLASH: ("#0072b2", "D", "transformers FlashAttention-2"),
    OURS: ("#009e73", "o", "OPT Zoo FlashAttention-2"),
}
app = typer.Typer(help="The diagrams of docs/gpu.md: forward time against batch size, on a GPU.")


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="JSON, written after each cell")],
    sizes: Annotated[str, typer.Option()] = "350m,2.7b",
    smoke: Annotated[bool, typer.Option(help="tiny models on the CPU, once: proves the code alone")] = False,
) -> None:
    """Time every system at every batch size."""
    setup = Setup(smoke)
    if smoke:
        torch.set_num_threads(1)  # tiny models: threads would only wait for each other
    report: dict[str, Any] = systems.machine(setup) | {"rows": []}
    for size in sizes.split(","):
        ours, theirs = systems.build(setup, size)
        for S in SEQUENCES:
            for B in BATCHES:
                say(f"{size} S{S} B{B}")
                arms = systems.forward_arms(ours, theirs, ["flash_attention_2"], setup.tokens(size, B, S))
                ms, not_run = systems.in_turns(setup, arms, budget_ms=100, least=3, most=10)
                report["rows"].append({"size": size, "S": S, "B": B, "ms": ms, "not_run": not_run})
                write_atomically(out, json.dumps(report, indent=1) + "\n")
        del ours, theirs, arms
    notes = {f"not run: {name}: {why}" for row in report["rows"] for name, why in row["not_run"].items()}
    print("\n".join([str(out), *sorted(notes)]))
    if notes and not smoke:
        raise typer.Exit(1)


@app.command()
def draw(numbers: Path) -> None:
    """Draw the PNG of each model beside the numbers."""
    report = read_json(numbers)
    for size in dict.fromkeys(row["size"] for row in report["rows"]):
        path = numbers.with_name(f"{numbers.stem}-{size}.png")
        _draw(report, size, path)
        print(path)


def _draw(report: dict[str, Any], size: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.3), sharey=True, layout="constrained")
    for S, panel in zip(SEQUENCES, axes, strict=True):
        rows = {row["B"]: row["ms"] for row in report["rows"] if row["size"] == size and row["S"] == S}
        for system, (colour, marker, label) in STYLES.items():
            points = [(B, ms[system]) for B, ms in rows.items() if system in ms]
            if points:
                style = {"color": colour, "marker": marker, "label": label, "markersize": 5}
                panel.plot(*zip(*points, strict=True), linewidth=2.4 if system == OURS else 1.4, **style)
        for B, ms in rows.items():
            compared = [EAGER, FLASH] if B == max(rows) else [EAGER]
            for i, other in enumerate(name for name in compared if name in ms and OURS in ms):
                gain, below = f"{ms[other] / ms[OURS]:.1f}×", (0, -7 - 12 * i)
                style = {"color": STYLES[other][0], "ha": "center", "va": "top", "fontweight": "bold"}
                panel.annotate(gain, (B, ms[OURS]), below, textcoords="offset points", **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(rows), [str(B) for B in rows])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        panel.set_title(f"{S} tokens a row")
        panel.set_xlabel("batch size")
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.margins(x=0.08, y=0.12)
    axes[0].set_ylabel("forward pass, milliseconds (log scale)")
    figure.suptitle(f"opt-{size}, {report['dtype']}, {report['device']}", fontweight="bold")
    lines, labels = axes[0].get_legend_handles_labels()
    note = "Times faster than transformers eager (orange) and than transformers FlashAttention-2 (blue)"
    style = {"frameon": False, "fontsize": 8.5, "title": note, "title_fontsize": 8.5}
    figure.legend(lines, labels, loc="outside lower center", ncols=4, **style)
    figure.savefig(path, dpi=200)
    plt.close(figure)
