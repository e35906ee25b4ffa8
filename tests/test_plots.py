"""The pictures of the command: what they show, and what is refused before any work is done."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1]))  # behind what is installed

from benchmarks import picture
from commands import opt_zoo
from opt_common import bench, cli, plots
from opt_common.checkpoints.convert import convert
from opt_common.checkpoints.examine import PARTS, examine
from opt_common.checkpoints.open import open_checkpoint
from opt_common.frameworks import registered
from opt_common.hub import DEMO
from opt_common.parity import TOLERANCE, Report, Row, _transformers, parity
from opt_common.quantization import QuantizationConfig

ROOT = Path(__file__).parents[1]
BEGINNINGS = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
PRESENT = [key for key, framework in registered().items() if framework.missing is None]


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures as they are written."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def report(**errors: list[float]) -> Report:
    rows = [Row(key, layers=found[:-1], logits=found[-1]) for key, found in errors.items()]
    return Report("/somebody/private/my-opt", "a prompt", "a text", rows, {"transformers 5": [0, 1e-7, 1e-6]})


def lines(figure: Figure) -> dict[str, list[float]]:
    """What is drawn by the names in the legend, and the limit."""
    panel = figure.axes[0]
    return {str(line.get_label()): [*map(float, line.get_ydata())] for line in panel.get_lines()}


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_the_suffix_decides(suffix, tmp_path):
    for name in ("first", "second"):
        plots.draw_parity(report(pt=[0, 1e-7, 2e-7]), TOLERANCE, tmp_path / f"{name}{suffix}")
    first, second = (tmp_path / f"{name}{suffix}" for name in ("first", "second"))
    assert first.read_bytes().startswith(BEGINNINGS[suffix])
    assert first.read_bytes() == second.read_bytes(), "the same numbers gave another file"


def test_every_error_is_drawn(drawn, tmp_path):
    """A line each, exact zeros among them; what is too large or not finite stands at the top and is named."""
    errors = {"pt": [0, 1e-7, 2e-7], "tf": [0, 3e-2, 4e-7], "flax": [0, float("nan"), float("inf")]}
    plots.draw_parity(report(**errors), TOLERANCE, tmp_path / "errors.svg")
    found, top = lines(drawn[0]), 10 * TOLERANCE
    titles = {key: registered()[key].title for key in errors}
    assert found[titles["pt"]] == errors["pt"]
    assert found[titles["tf"]] == [0, top, 4e-7]
    assert found[titles["flax"]] == [0, top, top]
    assert found["transformers 5"] == [0, 1e-7, 1e-6]
    assert [TOLERANCE, TOLERANCE] in found.values()
    notes = [text.get_text() for text in drawn[0].axes[0].texts]
    assert notes.count("not finite") == 2 and "3e-02" in notes and "limit: 2e-5" in notes
    assert drawn[0].axes[0].get_ylim()[1] == top
    assert "my-opt" in (text := (tmp_path / "errors.svg").read_text()) and "private" not in text


@pytest.mark.parametrize(
    ("config", "to", "dtype"), [("350m", "flax-msgpack", "float32"), ("untied", "torch", "bfloat16")]
)
def test_transformers_beside(config, to, dtype, tiny, tmp_path, rng):
    """What is drawn for it is what it computes in float32, whatever file the weights are in."""
    folder, reference = tiny(config)
    convert(folder, tmp_path / "converted", to, dtype)
    ids = rng.integers(3, 96, (1, 9))
    found = _transformers(str(tmp_path / "converted"), ids)
    theirs = copy.deepcopy(reference).to(getattr(torch, dtype)).float()
    with torch.no_grad():
        out = theirs(torch.tensor(ids), output_hidden_states=True)
    for state, wanted in zip(found, [*out.hidden_states, out.logits], strict=True):
        assert np.array_equal(state, wanted.numpy())


def test_parity_of_quantized_weights(tmp_path, monkeypatch):
    """The judge's are the floats that they stand for."""
    key = PRESENT[0]
    # transformers is imported here already: no process of its own
    monkeypatch.setattr("opt_common.parity.ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    convert(DEMO, tmp_path, quantization=QuantizationConfig.rounding(8, None))
    found = parity(str(tmp_path), "The", 3, [key], beside=True)
    assert found.passed and all(max(errors) <= TOLERANCE for errors in found.beside.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("errors.gif", r"--plot: found '.*errors\.gif', wanted a name that ends in \.png, \.svg, \.pdf"),
        ("errors", "--plot: found '.*errors', wanted"),
        ("nowhere/errors.png", "--plot: no such folder: .*nowhere"),
    ],
)
@pytest.mark.parametrize("command", [["parity"], ["inspect", DEMO], ["bench"]])
def test_a_bad_name_is_refused_before_any_work(command, name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "registered", None)  # whatever asks for a framework breaks
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        cli.app([*command, "--plot", str(tmp_path / name)], standalone_mode=False)


def test_without_matplotlib(tmp_path):
    """One sentence, before any work."""
    program = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a);"
        "import opt_common.cli as c; c.main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "inspect", DEMO, "--plot", tmp_path / "sizes.png"],
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (1, "error: matplotlib not installed: pip install 'opt-zoo[plot]'\n")


def test_the_ranges_are_those_of_the_numbers(tiny, tmp_path):
    """Read from any layout, a quantized Linear as the floats that it stands for; whatever is not finite is counted."""
    folder, reference = tiny("350m")
    convert(folder, tmp_path / "h5", "tf-h5")
    convert(folder, tmp_path / "8", quantization=QuantizationConfig.rounding(8, None))
    wanted = {name: tensor.numpy() for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    for path, tolerance in ((tmp_path / "h5", 1e-12), (tmp_path / "8", 1e-2)):
        facts = examine(path, ranges=True)
        rows = {row["name"]: row for row in facts["ranges"]}
        assert rows.keys() == wanted.keys()
        for name, numbers in wanted.items():
            row, scale = rows[name], np.abs(numbers).max()
            assert (row["numbers"], row["not_finite"]) == (numbers.size, 0)
            found = [row[key] for key in ("smallest", "largest", "mean", "std")]
            assert found == pytest.approx(
                [numbers.min(), numbers.max(), numbers.mean(), numbers.std()], abs=scale * tolerance
            )
        assert sum(row["bytes"] for row in rows.values()) == sum(
            e.nbytes for e in open_checkpoint(path).checkpoint.values()
        )
    assert {row["part"] for row in rows.values()} == {*PARTS}
    assert [row["layer"] for row in rows.values() if row["name"].endswith("fc1.weight")] == [0, 1, 2]

    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.decoder.layers.1.fc1.bias"][:3] = np.nan, np.inf, -np.inf
    (tmp_path / "lost").mkdir()
    safetensors.numpy.save_file(weights, tmp_path / "lost" / "model.safetensors")
    (tmp_path / "lost" / "config.json").write_text((folder / "config.json").read_text())
    (lost,) = [row for row in examine(tmp_path / "lost", ranges=True)["ranges"] if row["not_finite"]]
    rest = weights["model.decoder.layers.1.fc1.bias"][3:].astype(float)
    assert (lost["name"], lost["not_finite"]) == ("model.decoder.layers.1.fc1.bias", 3)
    assert (lost["smallest"], lost["largest"]) == (rest.min(), rest.max())


def test_ranges_are_drawn(drawn, tmp_path):
    """A bar for each layer, from the smallest number to the largest, and all the bytes."""
    facts = examine(DEMO, ranges=True)
    plots.draw_ranges("a model", facts | {"misfits": ["one"]}, tmp_path / "ranges.png")
    panels = {panel.get_title("left"): panel for panel in drawn[0].axes}
    bars = panels["size, MB"].patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(sum(row["bytes"] for row in facts["ranges"]) / 1e6)
    for part in PARTS:
        rows = [row for row in facts["ranges"] if row["part"] == part]
        patches = panels[f"{part}: values"].patches
        assert min(bar.get_y() for bar in patches) == min(row["smallest"] for row in rows)
        assert max(bar.get_y() + bar.get_height() for bar in patches) == pytest.approx(max(r["largest"] for r in rows))
    assert len(panels["feed-forward: values"].patches) == 2 * facts["layers"]
    assert "1 tensors do not fit" in drawn[0].get_suptitle()


def test_bench(tiny, tmp_path):
    """Every system that is here is timed and wrote the same text; one that fails is a row that says why."""
    ran = opt_zoo("bench", tiny()[0], "--rounds", 2, "--json", "--plot", tmp_path / "bench.svg")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    rows = {row["system"].partition(" ")[0]: row for row in found["rows"]}
    assert rows.keys() == {
        *(registered()[key].title for key in registered()),
        *(["transformers"] if "pt" in PRESENT else []),
    }
    for row in rows.values():
        assert row["problem"] == "" and row["same_tokens"] and row["device"] in ("CPU", "GPU")
        assert row["first_token_ms"] == pytest.approx(1000 * np.median(row["first_s"])) and len(row["first_s"]) == 2
        assert row["tokens_per_second"] == pytest.approx(found["new"] / np.median(row["whole_s"]))
        assert f"{row['system']}, {row['device']}" in (tmp_path / "bench.svg").read_text()
    base = rows["transformers"] if "pt" in PRESENT else found["rows"][0]
    assert found["compared_with"] == base["system"]
    assert base["first_token_faster"] == base["tokens_per_second_faster"] == 1


def test_the_table_of_bench(monkeypatch, capsys):
    """Medians, how many times faster than transformers, whether the text is the same, how far the times scatter."""
    rows = [
        bench.Row("pt", "PyTorch 2", "CPU", "", [5], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]),
        bench.Row("flax", "JAX", problem="jax not installed: pip install 'opt-zoo[flax]'"),
        bench.Row("transformers", "transformers 5", "CPU", "", [6], [0.5, 0.5, 0.5], [2.0, 2.0, 2.0]),
    ]
    monkeypatch.setattr(bench, "bench", lambda *given: bench.Comparison(*given[:2], 511, 32, 64, rows))
    with pytest.raises(SystemExit, match="0"):
        cli.app(["bench"])
    printed = capsys.readouterr().out
    lines = {
        line.split("  ")[1]: line.split()[2:]
        for line in printed.splitlines()
        if line.startswith("  ") and "CPU" in line
    }
    assert lines == {
        "PyTorch 2": ["CPU", "200.0", "2.50", "64", "2.00", "another"],
        "transformers 5": ["CPU", "500.0", "1.00", "32", "1.00", "same"],
    }
    assert "times faster than transformers 5." in printed and "3.0 times the fastest" in " ".join(printed.split())
    assert "JAX: jax not installed: pip install 'opt-zoo[flax]'" in printed


def test_what_fails_in_bench_is_a_row(tiny, tmp_path, monkeypatch, capsys):
    """transformers 5 reads no Flax file: that is said, and where nothing else ran it is the status."""
    convert(tiny()[0], tmp_path / "flax", "flax-msgpack")
    monkeypatch.setattr(bench, "registered", dict)
    with pytest.raises(SystemExit, match="1"):
        cli.app(["bench", str(tmp_path / "flax"), "--rounds", "1"])
    printed = capsys.readouterr().out
    assert "not run" in printed and re.search(r"transformers 5\.\S+: OSError: ", printed)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_overview(suffix, drawn, tmp_path):
    """Its speeds are the committed ones, over those of transformers 5 on the same machine."""
    picture.draw(report(pt=[0, 1e-7, 2e-7]), tmp_path / f"overview{suffix}")
    assert (tmp_path / f"overview{suffix}").read_bytes().startswith(BEGINNINGS[suffix])
    notes = [text.get_text() for text in drawn[0].axes[1].texts]
    rows = {row["key"]: row for row in json.loads((ROOT / "benchmarks" / "cpu.json").read_text())["rows"][::-1]}
    ours, theirs = rows["opt_flax"], rows["transformers_pt"]
    for cell, times in (
        ("decode B8", ours["decode B8"]["median"] / theirs["decode B8"]["median"]),
        ("prefill B1 S512", theirs["prefill B1 S512"]["median"] / ours["prefill B1 S512"]["median"]),
    ):
        assert picture.faster([*rows.values()][::-1], cell)["flax"] == pytest.approx(times)
        assert f"{times:.1f}×" in notes
    for name in ("overview.svg", "overview.png"):
        assert (ROOT / "benchmarks" / name).exists()
