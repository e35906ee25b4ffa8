"""Against what transformers 4.57's TensorFlow and Flax OPT answered (tests/make_goldens.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from backends import relative_error

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("judge", ["tf", "flax"])
@pytest.mark.parametrize("name", ["pre-norm", "350m"])
def test_goldens(framework, name, judge, load):
    """2e-5 of the largest magnitude for each of the two sides: both are float32 runs."""
    golden, model = np.load(GOLDENS / name / "outputs.npz"), load(framework, GOLDENS / name)
    inputs = {"input_ids": golden["input_ids"], "attention_mask": golden["attention_mask"]}
    keep = inputs["attention_mask"].astype(bool)
    found = model(**inputs, output_hidden_states=True)
    assert relative_error(found.logits[keep], golden[f"{judge}_logits"][keep]) <= 4e-5
    for i, state in enumerate(found.hidden_states):
        assert relative_error(state[keep], golden[f"{judge}_hidden_{i}"][keep]) <= 4e-5
    np.testing.assert_array_equal(model.generate(**inputs, max_new_tokens=16), golden[f"{judge}_tokens"])
