"""What the arguments of a call may be, said once for all frameworks."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from backends import COMPLETE
from checkpoints import tiny_config
from long_runs import Run
from opt_common.config import OPTConfig
from opt_common.frameworks import registered
from opt_common.generation.prompts import prompt
from opt_common.inputs import KINDS, check_call, check_dtype

CONFIG = tiny_config(vocab_size=300, layers=1)
IDS = np.array([[2, 5, 6]])
WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
SOME = ["int8", "int32", "uint64"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]


def test_every_type_of_every_argument():
    taken = {
        "input_ids": {*WHOLE} - {"int8", "uint8"},
        "position_ids": {*WHOLE},
        "attention_mask": {*WHOLE, *FLOATS, "bool"},
        "inputs_embeds": {*FLOATS},
        "labels": {*WHOLE},
        "start_positions": {*WHOLE},
        "end_positions": {*WHOLE},
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
        ({"input_ids": [["a", "b"]]}, "input_ids: found list without numbers, wanted a tensor, an array or lists"),
        ({"input_ids": np.zeros((0, 3), int)}, "input_ids: found no rows, wanted at least one"),
        ({"input_ids": np.zeros((1, 0), int)}, "input_ids: found no tokens, wanted at least one"),
        ({"input_ids": IDS, "attention_mask": IDS * 0}, "attention_mask: found 'a row without tokens'"),
        ({"inputs_embeds": np.zeros((1, 3, CONFIG.embed_dim), int)}, "inputs_embeds: found int64, wanted floats"),
        ({"inputs_embeds": np.zeros((0, 3, CONFIG.embed_dim))}, "inputs_embeds: found no rows, wanted at least one"),
        ({"input_ids": [[2, 5], [2]]}, "input_ids: found rows of different lengths, wanted equal ones"),
        ({"input_ids": "a"}, "input_ids: found str without numbers, wanted a tensor, an array or lists"),
        (
            {"input_ids": IDS, "attention_mask": IDS * 1j},
            "attention_mask: found complex128, wanted booleans, integers or",
        ),
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


# === The table, in every framework ===

SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, max_position_embeddings=32,
    init_std=0.3, num_labels=3,
)  # fmt: skip
LM, CLASSES, SPANS = "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"
ROWS = np.array([[2, 5, 6, 7], [2, 8, 9, 4]])
ONES, NONE = np.ones_like(ROWS), np.array([[1, 1, 1, 1], [0, 0, 0, 0]])
EMBEDS = np.random.default_rng(0).normal(size=(2, 4, 32)).astype("float32")
POSITIONS, LABELS = np.arange(4)[None], np.array([1, 2])


class AsItIs(NamedTuple):
    """An argument that does not become a tensor of the framework."""

    value: Any


class Here:
    """Models of one framework, new ones of SIZES, and tensors for them."""

    def __init__(self, key: str) -> None:
        self.key, self.framework = key, registered()[key]
        self.model = functools.cache(self._model)

    def _model(self, architecture: str = LM, **changes: Any) -> Any:
        model = self.framework.model_class(architecture)(OPTConfig(**SIZES | changes))
        return model.eval() if self.key == "pt" else model

    def tensor(self, x: Any) -> Any:
        return self.framework.tensor(x) if isinstance(x, np.ndarray) else x.value if isinstance(x, AsItIs) else x

    def __call__(self, architecture: str = LM, config: tuple[Any, ...] = (), **given: Any) -> Any:
        return self.model(architecture, **dict(config))(**{name: self.tensor(x) for name, x in given.items()})

    def numbers(self, architecture: str = LM, **given: Any) -> np.ndarray:
        """The loss of a call with labels, else its first result."""
        out = self(architecture, **given)
        return self.framework.numpy(out.loss if out.loss is not None else next(iter(out.values())))


@pytest.fixture(scope="module")
def everywhere() -> Any:
    return functools.cache(Here)


@pytest.fixture
def here(everywhere: Any, framework: str) -> Here:
    if framework not in COMPLETE:
        pytest.skip(f"{framework}: checks what it has in a way of its own")
    return everywhere(framework)


def alike(name: str, array: np.ndarray, dtypes: list[str], **beside: Any) -> dict[str, Any]:
    """One argument as numbers of all these types, as an array of numpy's, and as lists."""
    ways = {f"{name}-{dtype}": {name: array.astype(dtype)} for dtype in dtypes}
    ways |= {f"{name}-numpy": {name: AsItIs(array)}, f"{name}-lists": {name: AsItIs(array.tolist())}}
    return {way: ({**beside, name: array}, {**beside, **given}) for way, given in ways.items()}


RIGHT = {
    **alike("input_ids", ROWS, WHOLE),
    **alike("attention_mask", ONES, [*SOME, "bool", "float16", "float64"], input_ids=ROWS),
    **alike("position_ids", POSITIONS, SOME, input_ids=ROWS),
    **alike("inputs_embeds", EMBEDS, ["float32", "float64"]),
    **alike("labels", ROWS, SOME, input_ids=ROWS),
    **{
        f"classes-{way}": tuple({**x, "architecture": CLASSES, "input_ids": ROWS} for x in pair)
        for way, pair in alike("labels", LABELS, SOME, attention_mask=AsItIs(ONES.tolist())).items()
    },
    **alike("start_positions", LABELS, SOME, end_positions=AsItIs([3, 3]), input_ids=ROWS, architecture=SPANS),
    "token_type_ids": ({"input_ids": ROWS}, {"input_ids": ROWS, "token_type_ids": ROWS, "cache_position": POSITIONS}),
    "one-row": ({"input_ids": ROWS[:1]}, {"input_ids": ROWS[0]}),
    "rows-of-rows": ({"input_ids": ROWS}, {"input_ids": ROWS[:, None]}),
}


@pytest.mark.parametrize("way", RIGHT)
def test_right_in_every_framework(way, here):
    plain, given = RIGHT[way]
    wanted = here.numbers(**plain)
    np.testing.assert_array_equal(here.numbers(**given), wanted)
    assert np.isfinite(wanted).all()


FEW, MANY = (("vocab_size", 300),), "labels: found {}, wanted 0 to {}, or -100 to leave one out"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"ids-{x}": ({"input_ids": ROWS.astype(x)}, f"input_ids: found {x}, wanted integers")
        for x in ("float32", "bool")
    },
    "ids-complex": ({"input_ids": ROWS.astype("complex64")}, "input_ids: found complex64, wanted integers"),
    "ids-of-8-bits": (
        {"input_ids": ROWS.astype("uint8"), "config": FEW},
        "input_ids: found uint8, which cannot hold ids up to 299, wanted int32",
    ),
    "ids-beyond-int32": (
        {"input_ids": AsItIs(ROWS + 2**32)},
        "input_ids: found token 429496730., wanted 0 to 95 .vocab_size - 1.",
    ),
    "ids-too-large": ({"input_ids": ROWS + 90}, "input_ids: found token 99, wanted 0 to 95 .vocab_size - 1."),
    "ids-beyond-int64": (
        {"input_ids": AsItIs(ROWS.astype("uint64") + np.uint64(2**64 - 90))},
        "input_ids: found token 184467440737095515.., wanted 0 to 95 .vocab_size - 1.",
    ),
    "ids-negative": ({"input_ids": ROWS - 9}, "input_ids: found token -7, wanted 0 to 95"),
    "ids-ragged": (
        {"input_ids": AsItIs([[2, 5], [2]])},
        "input_ids: found rows of different lengths, wanted equal ones .padding=True.",
    ),
    "ids-text": (
        {"input_ids": AsItIs(["a"])},
        "input_ids: found list without numbers, wanted a tensor, an array or lists",
    ),
    "ids-one-number": ({"input_ids": np.array(3)}, r"input_ids: found shape \[\], wanted \[batch, tokens\]"),
    "no-lists": ({"input_ids": AsItIs([[]])}, "input_ids: found no tokens, wanted at least one"),
    "no-rows": ({"input_ids": ROWS[:0]}, "input_ids: found no rows, wanted at least one"),
    "no-tokens": ({"input_ids": ROWS[:, :0]}, "input_ids: found no tokens, wanted at least one"),
    "nothing": ({}, "input_ids, inputs_embeds: found neither, wanted exactly one of them"),
    "both": ({"input_ids": ROWS, "inputs_embeds": EMBEDS}, "input_ids, inputs_embeds: found both, wanted exactly"),
    "embeds-whole": ({"inputs_embeds": EMBEDS.astype("int32")}, "inputs_embeds: found int32, wanted floats"),
    "embeds-narrow": (
        {"inputs_embeds": EMBEDS[..., :8]},
        r"inputs_embeds: found shape \[2, 4, 8\], wanted \[batch, tokens, 32",
    ),
    "mask-complex": (
        {"input_ids": ROWS, "attention_mask": ONES.astype("complex64")},
        "attention_mask: found complex64, wanted booleans, integers or floats",
    ),
    "mask-wide": (
        {"input_ids": ROWS, "attention_mask": np.ones((2, 5))},
        r"attention_mask: found shape \[2, 5\], wanted \[2, 4",
    ),
    "mask-of-a-row": (
        {"input_ids": ROWS, "attention_mask": ONES[:1]},
        r"attention_mask: found shape \[1, 4\], wanted \[2, 4",
    ),
    "positions-float": (
        {"input_ids": ROWS, "position_ids": POSITIONS.astype("float32")},
        "position_ids: found float32, wanted integers",
    ),
    "positions-too-large": (
        {"input_ids": ROWS, "position_ids": AsItIs(POSITIONS + 2**32)},
        "position_ids: found position 4294967299, wanted -1 to 31",
    ),
    "too-long": ({"input_ids": np.full((1, 33), 5)}, "input_ids: found position 32, wanted -1 to 31"),
    "labels-float": ({"input_ids": ROWS, "labels": ROWS.astype("float32")}, "labels: found float32, wanted integers"),
    "labels-bool": ({"input_ids": ROWS, "labels": ROWS > 2}, "labels: found bool, wanted integers"),
    "labels-too-large": ({"input_ids": ROWS, "labels": ROWS + 90}, MANY.format(99, 95)),
    "labels-negative": ({"input_ids": ROWS, "labels": ROWS - 9}, MANY.format(-5, 95)),
    "labels-wide": ({"input_ids": ROWS, "labels": ROWS[:, 1:]}, r"labels: found shape \[2, 3\], wanted \[2, 4\]"),
    "classes": ({"architecture": CLASSES, "input_ids": ROWS, "labels": LABELS + 1}, MANY.format(3, 2)),
    "classes-bool": (
        {"architecture": CLASSES, "config": (("dropout", 0.0),), "input_ids": ROWS, "labels": LABELS > 1},
        r"labels: found shape \[2\], wanted \[2, 3\] for multi_label_classification",
    ),
    "spans-float": (
        {"architecture": SPANS, "input_ids": ROWS, "start_positions": LABELS / 2, "end_positions": LABELS},
        "start_positions: found float.., wanted integers",
    ),
    "no-cache": ({"input_ids": ROWS, "past_key_values": 7}, "past_key_values: found int, wanted a KVCache"),
    "argument": ({"input_ids": ROWS, "masks": ONES}, "found unknown arguments masks"),
}


@pytest.mark.parametrize("way", WRONG)
def test_wrong_in_every_framework(way, here):
    given, message = WRONG[way]
    with pytest.raises(TypeError if way == "argument" else ValueError, match=f"^{message}"):
        here(**given)


@pytest.mark.parametrize(
    ("batch", "slots", "changes", "message"),
    [
        (3, 8, {}, "found a cache of 3 rows, wanted 2, as many as in the call"),
        (2, 3, {}, "found a cache of 3 slots, 0 of them used, wanted room for 4 new tokens"),
        (2, 8, {"num_hidden_layers": 1}, "found 1 layers, wanted 2"),
        (2, 8, {"num_hidden_layers": 3}, "found 3 layers, wanted 2"),
        (2, 8, {"num_attention_heads": 4}, "found 4 heads, wanted 2"),
        (2, 8, {"hidden_size": 64}, "found 32 numbers a head, wanted 16"),
    ],
)
def test_a_cache_of_another_size(batch, slots, changes, message, here):
    cache = here.model(**changes).init_cache(batch, slots)
    with pytest.raises(ValueError, match=f"^past_key_values: {message}"):
        here(input_ids=ROWS, past_key_values=cache)


@pytest.mark.parametrize("slots", [None, 12])
def test_a_cache_after_a_call_that_failed(slots, here):
    """What is wrong is found before the cache is written, or the cache is as it was."""
    given: dict[str, Any] = {"use_cache": True}
    model = here.model()

    def begun() -> Any:
        past = {} if slots is None else {"past_key_values": model.init_cache(2, slots)}
        return here(input_ids=ROWS, attention_mask=ONES, **past, **given).past_key_values

    wanted = here.numbers(input_ids=ROWS[:, :2], past_key_values=begun(), **given)
    cache = begun()
    for wrong in (
        {"input_ids": ROWS[:, :2] + 95},
        {"input_ids": ROWS[:1, :2]},
        {"input_ids": ROWS[:, :2], "attention_mask": ONES},
        {"input_ids": ROWS[:, :2], "labels": ROWS[:, :2] + 95},  # behind all layers
    ):
        with pytest.raises(ValueError, match="^[a-z_]+: found"):
            here(past_key_values=cache, **given, **wrong)
    np.testing.assert_array_equal(here.numbers(input_ids=ROWS[:, :2], past_key_values=cache, **given), wanted)


def test_a_row_without_tokens(here):
    """It gives numbers, which mean nothing, and changes no other row."""
    found = here.numbers(input_ids=ROWS, attention_mask=NONE)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:1], here.numbers(input_ids=ROWS[:1]), rtol=1e-5, atol=1e-5)


def test_what_is_no_number_stays_in_its_row(here):
    embeds = EMBEDS.copy()
    embeds[1, 2, 0] = np.nan
    found = here.numbers(inputs_embeds=embeds)
    assert np.isnan(found[1, 2:]).any(axis=-1).all() and np.isfinite(found[0]).all()


def test_generate_takes_no_nan(here):
    embeds = EMBEDS.copy()
    embeds[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="^inputs_embeds: found NaN, wanted numbers"):
        here.model().generate(inputs_embeds=here.tensor(embeds), max_new_tokens=2)


def test_generate_in_training_mode():
    """The one framework where it lasts says so, and where nothing drops out it does not."""
    from opt_pt import OPTForCausalLM

    given: dict[str, Any] = {"input_ids": ROWS, "max_new_tokens": 2}
    with pytest.warns(
        UserWarning, match="^generate: found a model in training mode, where dropout is on; wanted model.eval"
    ):
        OPTForCausalLM(OPTConfig(**SIZES)).train().generate(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPTForCausalLM(OPTConfig(**SIZES)).eval().generate(**given)
        OPTForCausalLM(OPTConfig(**SIZES, dropout=0.0)).train().generate(**given)


# Long runs. `python tests/long_runs.py` does as many calls as wanted, and watches memory and compiled programs.


def test_threads_and_forked_workers(framework):
    if framework not in COMPLETE:
        pytest.skip(f"{framework}: has no beams, nor other texts of one prompt")
    run = Run(framework)
    assert run.threads(count=4, each=1, names=("greedy", "sampled")) == {
        "threads": 4,
        "calls": 4,
        "wrong": 0,
        "first": "",
    }
    assert run.workers(batches=1) == {"workers": 2, "texts": 4, "wrong": 0}
