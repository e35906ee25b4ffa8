"""Every benchmark, as a user starts it, on models so small that no number means anything: that it measures all it says,
and leaves it where it says. What takes a process of its own for each system is slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1]))  # behind what is installed

from benchmarks import compare
from benchmarks.__main__ import app
from benchmarks.peers import Job
from opt_common.config import OPTConfig
from opt_common.frameworks import registered

ROOT = Path(__file__).parents[1]
OURS = {f"opt_{key}" for key, framework in registered().items() if framework.missing is None}


def benchmark(*arguments: object) -> str:
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_cpu(tmp_path):
    """Every system that is here is measured and compared, and one that is not says so."""
    printed = benchmark("cpu", "--smoke", "--out", tmp_path / "cpu.json")
    report = json.loads((tmp_path / "cpu.json").read_text())
    rows = report["rows"]
    assert {row["key"].removesuffix("_packed") for row in rows if row["ours"] and "not_run" not in row} == OURS
    for row in rows:
        if "not_run" in row:
            assert f"not run: {row['system']}" in printed
            continue
        for column in ("prefill B1 S16", "decode B1", "decode B8"):
            numbers = row[column]
            assert 0 < numbers["low"] <= numbers["median"] <= numbers["high"]
            assert row["dtype"] == "int8" or numbers["of_ceiling"] > 0
            assert row["first_s"][column]
    assert "prefill B1 S16" in printed
    assert str(tmp_path) not in json.dumps(report)  # nor any other place of this machine
    assert sys.prefix not in json.dumps(report)


@pytest.mark.slow
def test_growth(tmp_path):
    """Every cell of every system; a second run for one system keeps the rows of the others."""
    out = tmp_path / "growth.json"
    benchmark("growth", "--smoke", "--systems", "opt_pt,transformers_pt", "--out", out)
    first = json.loads(out.read_text())
    assert set(first["rows"][0]["ms"]) == set(first["floors"])  # opt_pt has every cell
    assert "step B1 L16 of 32" in first["floors"]
    benchmark("growth", "--smoke", "--systems", "opt_flax", "--out", out)
    rows = {row["key"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["opt_flax", "opt_pt", "transformers_pt"]
    assert rows["opt_pt"] == first["rows"][0]
    if "opt_flax" in OURS:
        assert set(rows["opt_flax"]["ms"]) == set(first["floors"])


def test_growth_is_drawn_from_the_committed_numbers(tmp_path):
    from benchmarks.growth import draw

    draw(json.loads((ROOT / "benchmarks" / "growth.json").read_text()), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_load(tmp_path):
    """Of eight devices each holds its even share, and nothing whole that could be shared."""
    benchmark("load", "--smoke", "--out", tmp_path / "load.json")
    report = json.loads((tmp_path / "load.json").read_text())
    rows = {row["framework"]: row for row in report["rows"] if "not_run" not in row}
    assert all(row["seconds"] > 0 for row in rows.values())
    if "opt_flax" in OURS:
        sharded = rows["JAX, 8 devices"]
        assert sharded["devices"] == 8
        assert sharded["most_on_a_device_MB"] == pytest.approx(sharded["even_share_MB"])
        assert sharded["even_share_MB"] < report["weights_MB"] / 8 + sharded["copied_to_each_MB"] + 0.001


@pytest.mark.slow
def test_convert(tmp_path):
    """From layout to layout and back, each as planned; a second size keeps the rows of the first."""
    out = tmp_path / "convert.json"
    out.write_text(json.dumps({"sizes": {"opt-6.7b": {"rows": []}}}))
    printed = benchmark("convert", "--smoke", "--repeats", 2, "--folder", tmp_path, "--out", out)
    assert "the last file is the first: yes" in printed
    sizes = json.loads(out.read_text())["sizes"]
    assert list(sizes) == ["opt-6.7b", "opt-demo"]
    rows = sizes["opt-demo"]["rows"]
    chain = ["torch", "metaseq", "tf-h5", "flax-msgpack", "state-dict", "safetensors"]
    assert [row["to"] for row in rows] == [*chain, "8 bits", "4 bits"]
    assert [row["from"] for row in rows] == ["safetensors", *chain, "safetensors"]
    for row in rows:
        assert row["as_planned"] and row["peak_MB"] <= row["limit_MB"]
        assert all(row[name]["low"] > 0 for name in ("ours_MB_s", "cp_MB_s"))
    assert os.listdir(tmp_path) == ["convert.json"]


@pytest.mark.slow
def test_gpu(tmp_path):
    """On a CPU, with tiny models. TensorFlow, which nobody has run on a GPU, is not run, and that is all it says."""
    out = tmp_path / "gpu.json"
    printed = benchmark("gpu", "--smoke", "--sections", "ceilings,frameworks", "--sizes", "350m", "--out", out)
    rows = {row["key"]: row for row in json.loads(out.read_text())["sections"]["frameworks"]["rows"]}
    assert rows["opt_tf"]["not_run"] == ""
    line = next(line for line in printed.splitlines() if "opt_tf" in line)
    assert line.replace("│", " ").split() == ["opt_tf,", "TensorFlow", "float32", "not", "run"]
    for key in OURS - {"opt_tf"}:
        assert rows[key]["decode B16"]["median"] > 0


@pytest.mark.slow
def test_train(tmp_path):
    out = tmp_path / "train.json"
    benchmark("train", "--smoke", "--only", ",".join(OURS | {"transformers"}), "--out", out)
    rows = [row for row in json.loads(out.read_text())["results"] if row["system"] in OURS | {"transformers"}]
    assert {row["system"] for row in rows} == OURS | {"transformers"}
    assert all(row["tokens_s"] > 0 and row["peak_GB"] > 0 and row["x_best"] > 0 for row in rows), rows


@pytest.mark.slow
def test_speedup(tmp_path):
    out = tmp_path / "speedup.json"
    benchmark("speedup", "measure", "--smoke", "--sizes", "350m", "--out", out)
    assert len(json.loads(out.read_text())["rows"]) == 10
    benchmark("speedup", "draw", out)
    assert (tmp_path / "speedup-350m.png").exists()


def test_each_is_a_command():
    """All of them import; none runs a model."""
    names = ["cpu", "convert", "gpu", "growth", "load", "speedup", "train"]
    for name in names:
        ran = CliRunner().invoke(app, [name, "--help"])
        assert ran.exit_code == 0 and "Usage" in ran.output, name


@pytest.mark.parametrize(
    "name", ["cpu.json", "gpu.json", "growth.json", "speedup.json", "train-cpu.json", "train-gpu.json"]
)
def test_committed_numbers_are_readable(name):
    """And are of real shapes."""
    report = json.loads((ROOT / "benchmarks" / name).read_text())
    assert report["device"] and report["date"] and not report.get("smoke")


def test_a_wrong_answer_has_not_run():
    """The time of wrong logits is no time, and neither a peer's nor ours is compared with it."""
    job = Job("", "", "", prefill=[(1, 8)], decode=[1], prompt=4, new=4)
    seconds = {"prefill B1 S8": [0.1], "decode B1": [0.2]}

    def row(key: str, ours: bool, logits: list[float]) -> dict:
        return {"key": key, "dtype": "float32", "ours": ours, "logits": logits, "seconds": seconds}

    rows = [row("opt_pt", True, [1.0, 2.0]), row("quick_and_wrong", False, [1.0, 2.1]), row("peer", False, [1.0, 2.0])]
    rows[1]["seconds"] = {name: [s / 10 for s in values] for name, values in seconds.items()}
    compare.summarize(rows, OPTConfig.from_pretrained("opt-demo"), job, {"float32": 1e9, "read": 1e9})
    assert "wrong" in rows[1]["not_run"]
    assert rows[0]["prefill B1 S8"]["x_best"] == 1
    assert rows[0]["decode B1"] == rows[2]["decode B1"] | {"x_best": 1}
    assert rows[0]["decode B1"]["median"] == pytest.approx(4 / 0.2)
