"""The pictures of the command. Drawn without a window, by matplotlib, in the style of zoo.mplstyle."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .frameworks import registered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .bench import Comparison
    from .parity import Report

SUFFIXES = (".png", ".svg", ".pdf")
# The colours of Okabe and Ito, which the colour-blind tell apart, in the order of the registry; markers do it in grey.
_STYLES = (("#0072b2", "^"), ("#009e73", "o"), ("#d55e00", "s"), ("#e69f00", "D"), ("#56b4e9", "P"))
# Another library lies below, as a broad band: where it agrees to the bit, both are seen.
PEER: dict[str, Any] = {"color": "#a8579b", "linewidth": 7, "alpha": 0.35}
_PARTS = {
    "embeddings": "#8c8c8c",
    "attention": "#0072b2",
    "feed-forward": "#d55e00",
    "biases": "#009e73",
    "norms": "#e69f00",
}


def check_plot(path: Path) -> None:
    """Raise before the work, not after it: ValueError for a suffix that is none of SUFFIXES, FileNotFoundError if there
    is no such folder, ImportError without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot: found {str(path)!r}, wanted a name that ends in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot: no such folder: {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib not installed: pip install 'opt-zoo[plot]'")


def style(key: str) -> dict[str, str]:
    """The colour and the marker of a framework, by its key, or of another library."""
    known = list(registered())
    color, marker = _STYLES[known.index(key) % len(_STYLES)] if key in known else (PEER["color"], "v")
    return {"color": color, "marker": marker}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the style of all, written when it is done. The same numbers give the same file."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("opt_common.zoo"):
        figure = Figure(figsize=(width, height))
        yield figure
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(path, metadata=undated.get(path.suffix.lower()))


def _name(model: str) -> str:
    """Of a folder or a Hub name the last part: a picture is shown to others."""
    return Path(model).name or model


def draw_parity(report: Report, limit: float, path: Path) -> None:
    """The errors of the hidden states and of the logits, a line for each framework and for what is beside them."""
    with figure(path, 7.2, 4) as drawing:
        panel = drawing.add_subplot()
        draw_errors(panel, error_lines(report), limit)
        panel.set_title(f"{_name(report.model)}, float32: distance from a float64 run")
        drawing.legend(loc="outside lower center", ncols=4)


def error_lines(report: Report) -> dict[str, tuple[str, list[float]]]:
    """The lines of `draw_errors`, by their titles."""
    ran = [row for row in report.rows if row.layers]
    lines = {registered()[row.framework].title: (row.framework, [*row.layers, row.logits]) for row in ran}
    return lines | {title: (title.partition(" ")[0], errors) for title, errors in report.beside.items()}


def draw_errors(panel: Axes, lines: Mapping[str, tuple[str, Sequence[float]]], limit: float) -> None:
    """The errors of the hidden states, then of the logits, by the titles and the keys of `style`."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    layers = max((len(errors) - 2 for _, errors in lines.values()), default=0)
    top = limit * 10
    for title, (key, errors) in lines.items():
        # one that is too large, or not finite, stands at the top: a point left out would read as none
        kept = np.nan_to_num(np.asarray(errors, float), nan=np.inf, posinf=np.inf)
        shown = np.minimum(kept, top)
        look: dict[str, Any] = {"clip_on": False, "zorder": 3}
        look |= style(key) if key in registered() else PEER | {"zorder": 2}
        panel.plot(range(len(shown)), shown, label=title, **look)
        for x in np.flatnonzero(kept > top):
            size = f"{kept[x]:.0e}" if np.isfinite(kept[x]) else "not finite"
            panel.annotate(size, (x, top), (0, 6), textcoords="offset points", ha="center", color=style(key)["color"])
    panel.set_yscale("symlog", linthresh=1e-8, linscale=0.4)  # an embedding of float16 numbers is exact: 0
    panel.set_ylim(0, top)
    powers = [10.0**n for n in range(-8, int(np.log10(top)) + 1)]
    panel.set_yticks([0, *[power for power in powers if power <= top]])
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "0" if y == 0 else f"$10^{{{np.log10(y):.0f}}}$"))
    panel.axhspan(limit, top, color="#d62728", alpha=0.07, linewidth=0)
    panel.axhline(limit, color="#b2182b", linewidth=1.2)
    style_of_notes: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "annotation_clip": False}
    panel.annotate(f"limit: {limit:.0e}".replace("e-0", "e-"), (0, limit), (0, 4), color="#b2182b", **style_of_notes)
    ulp = 2.0**-24
    panel.axhline(ulp, color="#8c8c8c", linewidth=1, linestyle=":")
    panel.annotate(
        "one rounding in float32", (layers + 1, ulp), (0, -11), color="#666666", ha="right", **style_of_notes
    )
    every = max(1, -(-layers // 12))
    numbers = [*range(every, layers + 1, every)]
    panel.set_xticks([0, *numbers, layers + 1], ["embedding", *map(str, numbers), "logits"])
    panel.set_xlabel("after layer")
    panel.set_ylabel("largest error / largest magnitude")


def draw_ranges(model: str, facts: dict[str, Any], path: Path) -> None:
    """Sizes and ranges of values by layer, from what `examine` found with `ranges`."""
    rows, layers = facts["ranges"], facts["layers"]
    with figure(path, 11, 6) as drawing:
        sizes, *panels = drawing.subplots(2, 3).flat
        bottom = np.zeros(layers + 2)  # before the layers, the layers, after them
        for part, color in _PARTS.items():
            heights = np.zeros(layers + 2)
            for row in rows:
                if row["part"] == part:
                    heights[_place(row, layers)] += row["bytes"] / 1e6
            sizes.bar(range(layers + 2), heights, 0.8, bottom, color=color, label=part)
            bottom += heights
        sizes.set_title("size, MB")
        for (part, color), panel in zip(_PARTS.items(), panels, strict=True):
            found = [row for row in rows if row["part"] == part and row["numbers"]]
            alone = part == "embeddings"
            places = [*dict.fromkeys(_short(row["name"]) if alone else _place(row, layers) for row in found)]
            for x, place in enumerate(places):
                here = [row for row in found if place == (_short(row["name"]) if alone else _place(row, layers))]
                low, high = min(row["smallest"] for row in here), max(row["largest"] for row in here)
                of = np.array([row["numbers"] for row in here]) / sum(row["numbers"] for row in here)
                means, stds = (np.array([row[name] for row in here]) for name in ("mean", "std"))
                mean = of @ means
                std = np.sqrt(max(0.0, of @ (stds**2 + means**2) - mean**2))
                at = x if alone else place
                panel.bar(at, high - low, 0.8, low, color=color, alpha=0.3)
                panel.bar(at, 2 * std, 0.8, mean - std, color=color)
            panel.use_sticky_edges = False
            panel.set_title(f"{part}: values")
            if alone:
                panel.set_xticks(range(len(places)), [str(place) for place in places])
        for panel in (sizes, *panels[1:]):
            every = max(1, -(-layers // 8))
            numbers = [*range(0, layers, every)]
            panel.set_xticks([0, *(i + 1 for i in numbers), layers + 1], ["in", *map(str, numbers), "out"])
            panel.set_xlim(-0.6, layers + 1.6)
            panel.set_xlabel("layer")
        lost = sum(row["not_finite"] for row in rows)
        notes = [f"{lost:,} numbers are NaN or infinite and not drawn"] if lost else []
        notes += (
            [f"{len(facts['misfits'])} tensors do not fit the config and are not drawn"] if facts["misfits"] else []
        )
        drawing.suptitle("\n".join([f"{_name(model)}: {facts['parameters']:,} parameters", *notes]), fontweight="bold")
        ranges = "values: light, smallest to largest; dark, mean ± standard deviation"
        drawing.legend(*sizes.get_legend_handles_labels(), loc="outside lower center", ncols=5, title=ranges)


def _place(row: dict[str, Any], layers: int) -> int:
    """Where a tensor stands on the axis: 0 before the layers, layers + 1 after them."""
    if row["layer"] is not None:
        return row["layer"] + 1
    return 0 if any(name in row["name"] for name in ("embed_", "project_in")) else layers + 1


def _short(name: str) -> str:
    """Such as "tokens" for model.decoder.embed_tokens.weight."""
    return name.split(".")[-2].removeprefix("embed_").replace("_", " ")


def draw_bench(found: Comparison, path: Path) -> None:
    """A bar for each system: the median, from the fastest to the slowest as a line, and times faster than the base."""
    rows, base = found.ran, found.base
    with figure(path, 9.5, 1.5 + 0.45 * len(rows)) as drawing:
        panels = drawing.subplots(1, 2, sharey=True)
        titles = (f"milliseconds to the first token after {found.long}", f"tokens per second, {found.new} new ones")
        for panel, title, rate in zip(panels, titles, (False, True), strict=True):
            for y, row in enumerate(rows):
                of = found.rate if rate else found.first_ms
                numbers = [found.new / s for s in row.whole] if rate else [1000 * s for s in row.first]
                panel.barh(y, of(row), 0.7, color=style(row.key)["color"], alpha=0.85)
                panel.plot([min(numbers), max(numbers)], [y, y], color="#333333", linewidth=1)
                times = of(row) / of(base) if rate else of(base) / of(row)
                text = f"{of(row):,.{0 if of(row) >= 100 else 1}f}" + (f"   {times:.1f}×" if row is not base else "")
                panel.annotate(text, (max(numbers), y), (5, 0), textcoords="offset points", va="center", fontsize=9)
            panel.set_title(title)
            panel.set_yticks(range(len(rows)), [f"{row.title}, {row.device}" for row in rows])
            panel.grid(axis="x")
            panel.grid(visible=False, axis="y")
            panel.tick_params(axis="y", length=0)
            panel.margins(x=0.28)
            panel.set_xlim(left=0)
        panels[0].invert_yaxis()
        note = f"×: times faster than {base.title}" if len(rows) > 1 else ""
        drawing.suptitle(f"{_name(found.model)}, {found.dtype}, one row, a quick look. {note}", fontsize=9.5)
