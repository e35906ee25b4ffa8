"""The examples as they are printed, broken off and started again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
SAVED = {"pt": "training.pt", "tf": "training.keras", "flax": "training/4/_CHECKPOINT_METADATA"}


def test_killed_and_started_again(framework, tmp_path):
    """The weights are those of a run that was never broken off."""
    text = tmp_path / "text.txt"
    text.write_text("The king had a daughter who was beautiful beyond all measure. " * 40, encoding="utf-8")

    def command(out: str, steps: int) -> list[str]:
        script = str(EXAMPLES / f"finetune_{framework}.py")
        given = {"--steps": steps, "--save-every": 4, "--rows": 2}
        return [
            sys.executable,
            script,
            str(text),
            str(tmp_path / out),
            *(str(x) for pair in given.items() for x in pair),
        ]

    process = subprocess.Popen(command("killed", 100_000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / SAVED[framework]).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for out in ("killed", "whole"):
        ran = subprocess.run(command(out, 40), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found = re.search(r"^step (\d+) of 40$", ran.stdout, re.MULTILINE)
        assert found and (0 < int(found[1]) < 40) == (out == "killed"), ran.stdout
        first, last = map(float, re.findall(r"loss ([\d.]+) at first, ([\d.]+) at last", ran.stdout)[0])
        assert last < first
        assert (tmp_path / out / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights, wanted = (load_file(tmp_path / out / "model.safetensors") for out in ("killed", "whole"))
    for name, array in wanted.items():
        np.testing.assert_array_equal(weights[name], array, err_msg=name)
