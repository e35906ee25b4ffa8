"""The picture at the top of the README: how exact the frameworks are, and how fast.

    python -m benchmarks picture    # writes overview.svg and overview.png; half a minute

Left: `opt-zoo parity` of opt-demo, run now. Right: committed numbers, gpu-frameworks-2.7b.json and cpu.json, over those
of transformers 5, which has OPT in PyTorch alone; on the GPU, of its fastest attention in each cell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import Row, say
from opt_common import plots
from opt_common.files import read_json
from opt_common.frameworks import registered
from opt_common.hub import DEMO
from opt_common.parity import TOLERANCE, Report, parity

HERE = Path(__file__).parent
PEER = "transformers_pt"
# what is shown, by the names in the files
CELLS = {
    ("gpu-frameworks-2.7b.json", "opt-2.7b, float16"): {
        "decode, 1 row": "decode B1",
        "decode, 16 rows": "decode B16",
        "prefill, 8 × 2,048": "prefill B8 S2048",
    },
    ("cpu.json", "opt-125m, float32"): {
        "decode, 1 row": "decode B1",
        "decode, 8 rows": "decode B8",
        "prefill, 1 × 512": "prefill B1 S512",
    },
}


def picture(
    out: Annotated[Path, typer.Option(help="the folder of overview.svg and overview.png")] = HERE,
    new_tokens: Annotated[int, typer.Option(help="how many tokens the errors are measured on")] = 200,
) -> None:
    """The README's picture, from a run of parity and the committed numbers."""
    say("parity")
    report = parity(DEMO, "Once upon a time", new_tokens, beside=True)
    for suffix in (".svg", ".png"):
        draw(report, out / f"overview{suffix}")


def faster(rows: list[Row], cell: str) -> dict[str, float]:
    """How many times faster each framework is than transformers' fastest, in float32 or in the only dtype there is."""
    ran = [row for row in rows if cell in row and row["dtype"] == rows[0]["dtype"]]
    rate = {
        row["system"]: 1 / row[cell]["median"] if cell.startswith("prefill") else row[cell]["median"] for row in ran
    }
    base = max(rate[row["system"]] for row in ran if row["key"] == PEER)
    return {row["key"].removeprefix("opt_"): rate[row["system"]] / base for row in ran if row["ours"]}


def draw(report: Report, path: Path) -> None:
    """Errors at the left, speeds at the right."""
    with plots.figure(path, 11, 4.6) as drawing:
        left, right = drawing.subplots(1, 2, width_ratios=(1, 1))
        plots.draw_errors(left, plots.error_lines(report), TOLERANCE)
        left.set_title("Exact: the error against float64, layer by layer")
        y, ticks = 0.0, {}
        for (file, what), cells in CELLS.items():
            found: dict[str, Any] = read_json(HERE / file)
            rows = found["sections"]["frameworks"]["rows"] if "sections" in found else found["rows"]
            device = found["device"].split(" 80GB")[0] + ("" if "sections" in found else f", {found['cores']} cores")
            right.annotate(
                f"{device}: {what}", (1, y - 0.2), (4, 0), textcoords="offset points", fontweight="bold", va="center"
            )
            y += 0.2
            for title, cell in cells.items():
                bars = {key: times for key, times in faster(rows, cell).items() if key in registered()}
                ticks[y + 0.26 * (len(bars) - 1) / 2] = title
                for key, times in bars.items():
                    right.barh(y, times - 1, 0.24, 1, color=plots.style(key)["color"])
                    right.annotate(
                        f"{times:.1f}×",
                        (max(times, 1), y),
                        (4, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8.5,
                    )
                    y += 0.26
                y += 0.2
            y += 0.5
        right.set_yticks([*ticks], [*ticks.values()])
        right.set_ylim(y - 0.5, -0.7)
        right.set_xscale("log", base=2)
        right.set_xlim(0.9, 10)
        right.set_xticks([1, 2, 4, 8], ["1×", "2×", "4×", "8×"])
        right.axvline(1, zorder=0, **plots.PEER)
        right.grid(visible=True, axis="x")
        right.grid(visible=False, axis="y")
        right.tick_params(axis="y", length=0)
        right.set_xlabel("times as fast as transformers 5 in PyTorch")
        right.set_title("Fast: the speed beside transformers 5")
        drawing.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
