"""What the arguments of a call may be, said once for all frameworks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from checkpoints import tiny_config
from opt_common.generation.prompts import prompt
from opt_common.inputs import KINDS, check_call, check_dtype

CONFIG = tiny_config(vocab_size=300, layers=1)
IDS = np.array([[2, 5, 6]])
WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]


def test_every_type_of_every_argument():
    taken = {
        "input_ids": {*WHOLE} - {"int8", "uint8"},
        "position_ids": {*WHOLE},
        "attention_mask": {*WHOLE, *FLOATS, "bool"},
        "inputs_embeds": {*FLOATS},
    }
    assert taken.keys() == KINDS.keys()
    for name in KINDS:
        for dtype in [*WHOLE, *FLOATS, "bool", "complex64", "<U3", "object"]:
            if dtype in taken[name]:
                check_dtype(CONFIG, name, dtype)
                check_dtype(CONFIG, name, f"torch.{dtype}")
                check_dtype(CONFIG, name, np.dtype(getattr(ml_dtypes, dtype, dtype)))
            else:
                with pytest.raises(ValueError, match=f"{name}: found {dtype}, w"):
                    check_dtype(CONFIG, name, dtype)
    check_dtype(tiny_config(vocab_size=256, layers=1), "input_ids", "uint8")  # which holds them all


@pytest.mark.parametrize("dtype", ["int16", "uint16", "uint32", "uint64"])
def test_a_prompt_of_any_integers(dtype):
    made = prompt(CONFIG, IDS.astype(dtype), None, {})
    assert made.ids.tolist() == IDS.tolist() and made.mask.all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": IDS.astype("float32")}, "input_ids: found float32, wanted integers"),
        ({"input_ids": IDS > 0}, "input_ids: found bool, wanted integers"),
        ({"input_ids": IDS.astype("uint8")}, "input_ids: found uint8, which cannot hold ids up to 299, wanted int32"),
        ({"input_ids": [["a", "b"]]}, "input_ids: found str32, wanted integers"),
        ({"input_ids": np.zeros((0, 3), int)}, "input_ids: found no rows, wanted at least one"),
        ({"input_ids": np.zeros((1, 0), int)}, "input_ids: found no tokens, wanted at least one"),
        ({"input_ids": IDS, "attention_mask": IDS * 0}, "attention_mask: found 'a row without tokens'"),
        ({"inputs_embeds": np.zeros((1, 3, CONFIG.embed_dim), int)}, "inputs_embeds: found int64, wanted floats"),
        ({"inputs_embeds": np.zeros((0, 3, CONFIG.embed_dim))}, "inputs_embeds: found no rows, wanted at least one"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_prompt_that_is_none(given, message):
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    with pytest.raises(ValueError, match=message):
        prompt(CONFIG, ids, mask, given)


@pytest.mark.parametrize(("shape", "what"), [((0, 3), "rows"), ((2, 0), "tokens")])
def test_a_call_of_nothing(shape, what):
    with pytest.raises(ValueError, match=f"input_ids: found no {what}, wanted at least one"):
        check_call(CONFIG, shape, None)
    with pytest.raises(ValueError, match=f"inputs_embeds: found no {what}, wanted at least one"):
        check_call(CONFIG, None, (*shape, CONFIG.embed_dim))
