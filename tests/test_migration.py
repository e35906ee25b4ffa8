"""The scripts of docs/coming-from-tfopt.md: the new one, and the old one where what it imports is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "coming-from-tfopt.md"
SAVING = "\nimport numpy as np\nnp.savez('found', loss=loss, logits=out.logits, step=step.logits)\n"


def scripts() -> list[str]:
    """The old and the new script of the page."""
    return re.findall(r"```python[^\n]*\n(.*?)```", PAGE.read_text(), re.DOTALL)[:2]


def run(script: str, folder: Path, checkpoint: Path) -> dict[str, np.ndarray]:
    """The numbers that a script gives, run on a checkpoint in place of the Hub's; skipped where it cannot be."""
    folder.mkdir()
    (folder / "script.py").write_text(script.replace("facebook/opt-125m", str(checkpoint)) + SAVING)
    legacy = {"TF_USE_LEGACY_KERAS": "1"} if "transformers" in script else {}
    ran = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=os.environ | legacy, capture_output=True, text=True
    )
    if legacy and re.search(r"^ImportError: cannot import name|tf-keras", ran.stderr, re.MULTILINE):
        pytest.skip("transformers has no such classes; wanted 4.57 with its framework")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (folder / "my-opt" / "saved_model" / "1" / "saved_model.pb").is_file()
    with np.load(folder / "found.npz") as found:
        return dict(found)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """opt-demo's tokenizer beside random weights of its shape, large enough to tell mistakes by."""
    from opt_common.config import OPTConfig
    from opt_common.hub import fetch
    from opt_common.tokenizer import GPT2Tokenizer
    from opt_tf import TFOPTForCausalLM

    folder, demo = tmp_path_factory.mktemp("migration") / "opt", fetch("opt-demo", ["config.json"])
    config = OPTConfig.from_pretrained(demo, num_hidden_layers=2, dropout=0.0, init_std=0.1)
    TFOPTForCausalLM(config).save_pretrained(folder)
    GPT2Tokenizer.from_pretrained(demo).save_pretrained(folder)
    return folder


def test_the_scripts_differ_in_the_import():
    old, new = (script.splitlines() for script in scripts())
    assert [b for a, b in zip(old, new, strict=True) if a != b] == [
        "from opt_tf import AutoTokenizer, TFOPTForCausalLM"
    ]


def test_from_tfopt(checkpoint, tmp_path):
    from opt_tf import AutoTokenizer, TFOPTForCausalLM

    found = run(scripts()[1], tmp_path / "new", checkpoint)
    model = TFOPTForCausalLM.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)("Hello, my dog", return_tensors="np")["input_ids"]
    np.testing.assert_allclose(found["logits"], model(ids).logits, rtol=0, atol=1e-4)
    token = found["logits"][:, -1:].argmax(-1)
    whole = model(np.concatenate([ids, token], axis=1)).logits[:, -1:]
    np.testing.assert_allclose(found["step"], whole, rtol=0, atol=1e-4)
    old = run(scripts()[0], tmp_path / "old", checkpoint)
    for name, wanted in old.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-4, err_msg=name)
