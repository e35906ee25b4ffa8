"""The tokenizer against transformers' GPT2Tokenizer: the same files, the same calls.

A small vocabulary is made here. OPT's own is used too if OPT_TOKENIZER names a folder that holds it.
"""

from __future__ import annotations

import copy as copies
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from opt_common.tokenizer import AutoTokenizer, BatchEncoding, GPT2Tokenizer, gpt2

transformers = pytest.importorskip("transformers", minversion="5")

TEXTS = [
    "",
    " ",
    "   ",
    "Hello world",
    "I like you.",
    " leading and trailing  ",
    "many     spaces   inside",
    "It's we'll they'd I'm you've 'quoted' O'Neill's",
    "line\nline\r\nline\rline\n\n\nend\n",
    "tab\there\t\tthere \t end",
    "3.14159, 1,000,000 and 2^10 = 1024; 50%",
    "def f(x):\n    return x ** 2  # square\n",
    "caf\u00e9 cafe\u0301 na\u00efve A\u030a \u1e9b\u0323",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f\U0001f44d\U0001f3fd",
    "日本語 한국어 русский العربية",
    "zero\u200bwidth\u00a0space\u3000\u2028line\u2029par\x85nel\ufeffbom",
    "".join(map(chr, range(32))) + "\x7f\x00\x00",
    "\ufffd\uffff\U0010ffff",
    "</s>",
    "x</s>y </s> z</s></s> <pad> <s>a</s> <unk><mask> <|endoftext|> </S> < /s>",
]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not like it.",
    "I like you. You like me. They're saying hello to the world; it's a small world.",
    "Numbers such as 1024 and 3.14159 are here, and\ttabs, and\nlines.",
    "def f(x): return x ** 2",
    "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \U0001f600",
] * 4

# As in the Hub's facebook/opt-* repositories.
BOS = {"content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
MAP = {"bos_token": BOS, "eos_token": BOS, "unk_token": BOS, "pad_token": "<pad>"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CONFIG = {name: token if token == "<pad>" else BOS | {"__type": "AddedToken"} for name, token in MAP.items()} | {
    "errors": "replace",
    "add_prefix_space": False,
    "add_bos_token": True,
    "special_tokens_map_file": None,
    "tokenizer_class": "GPT2Tokenizer",
}


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def theirs_of(folder: Path, **options: Any) -> Any:
    return transformers.GPT2Tokenizer.from_pretrained(str(folder), local_files_only=True, **options)


def same(ours: GPT2Tokenizer, theirs: Any, texts: list[str] = TEXTS) -> None:
    got, want = ours(texts), theirs(texts)
    for i, text in enumerate(texts):
        assert got["input_ids"][i] == want["input_ids"][i], repr(text)
    assert got["attention_mask"] == want["attention_mask"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a Hub repository's, with a byte-level BPE of 500 tokens."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=499, initial_alphabet=alphabet, special_tokens=special, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.model.save(str(folder))
    vocab = read(folder / "vocab.json")
    write(folder, "vocab.json", vocab | {"<mask>": len(vocab)})
    write(folder, "tokenizer_config.json", CONFIG)
    write(folder, "special_tokens_map.json", MAP)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not os.environ.get("OPT_TOKENIZER"):
        pytest.skip("set OPT_TOKENIZER to a folder with OPT's vocab.json and merges.txt")
    folder = tmp_path_factory.mktemp("real")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(Path(os.environ["OPT_TOKENIZER"], name), folder / name)
    write(folder, "tokenizer_config.json", CONFIG)
    write(folder, "special_tokens_map.json", MAP)
    return folder


@pytest.fixture(scope="module", params=["small", "real"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def ours(folder: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return theirs_of(folder)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """The small folder, to be changed."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


# ---- ids


def test_small_vocabulary_is_like_opts(small: Path) -> None:
    vocab = read(small / "vocab.json")
    assert [vocab[token] for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, len(vocab) - 1]
    assert len((small / "merges.txt").read_text(encoding="utf-8").splitlines()) > 100


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("I like you.", [2, 100, 101, 47, 4]),
        ("Hello world", [2, 31414, 232]),
        ("", [2]),
        ("x</s>y", [2, 1178, 2, 219]),
        ("<pad>", [2, 1]),
    ],
)
def test_known_ids(real: Path, text: str, ids: list[int]) -> None:
    assert GPT2Tokenizer.from_pretrained(real)(text) == {"input_ids": ids, "attention_mask": [1] * len(ids)}


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text(ours: GPT2Tokenizer, theirs: Any, text: str) -> None:
    assert ours(text) == dict(theirs(text))
    assert ours(text).input_ids[0] == 2
    assert ours(text, add_special_tokens=False) == dict(theirs(text, add_special_tokens=False))
    assert ours.encode(text) == theirs.encode(text)
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.convert_tokens_to_ids(ours.tokenize(text)) == ours.encode(text, add_special_tokens=False)


def test_every_code_point_below_0x3000(ours: GPT2Tokenizer, theirs: Any) -> None:
    chunks = ["".join(map(chr, range(start, start + 32))) for start in range(0, 0x3000, 32)]
    same(ours, theirs, chunks)
    same(ours, theirs, [f" {chr(code)}a{chr(code)} {chr(code)}{chr(code)}1" for code in range(0x3000)])
    assert ours.batch_decode(ours(chunks, add_special_tokens=False).input_ids) == chunks


@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from(["</s>", "<pad>", " ", "\n", "a", "'s", "\u0301"])).map("".join)
)
@settings(max_examples=200, deadline=None)
def test_any_text(ours: GPT2Tokenizer, theirs: Any, text: str) -> None:
    assert ours(text) == dict(theirs(text))
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == "</s>" + text


def test_a_megabyte_takes_seconds(ours: GPT2Tokenizer, theirs: Any) -> None:
    text = ("a" * 300_000 + " ".join(TEXTS) * 600 + " " * 300_000)[:1_000_000]
    start = time.monotonic()
    ids = ours.encode(text)
    back = ours.decode(ids[1:])
    assert time.monotonic() - start < 30
    assert back == text
    assert ids == theirs.encode(text)


def test_lone_surrogate_is_refused_as_in_transformers(ours: GPT2Tokenizer, theirs: Any) -> None:
    for tokenizer in (ours, theirs):
        with pytest.raises(TypeError):
            tokenizer("\ud800")


def test_prefix_space(copy: Path) -> None:
    write(copy, "tokenizer_config.json", CONFIG | {"add_prefix_space": True})
    ours = GPT2Tokenizer.from_pretrained(copy)
    same(ours, theirs_of(copy))
    assert ours.tokenize("dog") == ours.tokenize(" dog")


# ---- batches, pairs, padding, truncation


def test_batch(ours: GPT2Tokenizer, theirs: Any) -> None:
    same(ours, theirs)
    assert ours(tuple(TEXTS)) == ours(TEXTS)
    assert ours(["a"]) == {"input_ids": [ours("a").input_ids], "attention_mask": [[1, 1]]}
    assert ours([]) == {"input_ids": [], "attention_mask": []}
    assert ours("a", return_attention_mask=False) == {"input_ids": ours.encode("a")}


def test_pairs(ours: GPT2Tokenizer, theirs: Any) -> None:
    assert ours("Who?", "I do.") == dict(theirs("Who?", "I do."))
    assert ours("Who?", "I do.").input_ids == ours.encode("Who?") + ours.encode("I do.")
    assert ours("Who?", "") == dict(theirs("Who?", "")) == ours("Who?")
    assert ours(TEXTS, TEXTS[::-1]) == dict(theirs(TEXTS, TEXTS[::-1]))
    assert ours.encode("a", "b", add_special_tokens=False) == theirs.encode("a", "b", add_special_tokens=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [True, "longest", "max_length"])
@pytest.mark.parametrize("truncation", [False, True])
@pytest.mark.parametrize("max_length", [2, 9, 60])
@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_padding(
    ours: GPT2Tokenizer, theirs: Any, side: str, padding: bool | str, truncation: bool, max_length: int
) -> None:
    options: dict[str, Any] = {"padding": padding, "truncation": truncation, "max_length": max_length}
    got = ours(TEXTS, padding_side=side, **options)
    assert got == dict(theirs(TEXTS, padding_side=side, **options))
    assert any(row[0 if side == "left" else -1] == ours.pad_token_id == 1 for row in got.input_ids)
    assert ours("a b", **options) == dict(theirs("a b", **options))


def test_padding_side_is_settable_and_read(copy: Path) -> None:
    write(copy, "tokenizer_config.json", CONFIG | {"padding_side": "left"})
    ours = GPT2Tokenizer.from_pretrained(copy)
    assert ours.padding_side == "left"
    assert ours(TEXTS, padding=True) == dict(theirs_of(copy)(TEXTS, padding=True))
    assert ours(["a", "a b"], padding=True)["attention_mask"][0][0] == 0
    ours.padding_side = "right"
    assert ours(["a", "a b"], padding=True)["attention_mask"][0][0] == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation(copy: Path, side: str) -> None:
    write(copy, "tokenizer_config.json", CONFIG | {"truncation_side": side})
    ours, theirs = GPT2Tokenizer.from_pretrained(copy), theirs_of(copy)
    whole = ours.encode("one two three four")
    for length in range(1, len(whole) + 3):
        got = ours("one two three four", truncation=True, max_length=length)
        assert got == dict(theirs("one two three four", truncation=True, max_length=length))
        assert got.input_ids == whole[:1] + (
            whole[1:length] if side == "right" else whole[1:][-length + 1 :] * (length > 1)
        )
        assert ours(TEXTS, max_length=length) == dict(theirs(TEXTS, max_length=length))  # cuts without being asked to
        options: dict[str, Any] = {"truncation": True, "max_length": length, "add_special_tokens": False}
        assert ours(TEXTS, **options) == dict(theirs(TEXTS, **options))
    assert ours(TEXTS, truncation=False, max_length=3) == ours(TEXTS)
    assert ours("a b", truncation=True, max_length=0, add_special_tokens=False).input_ids == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_of_pairs(copy: Path, side: str) -> None:
    write(copy, "tokenizer_config.json", CONFIG | {"truncation_side": side})
    ours, theirs = GPT2Tokenizer.from_pretrained(copy), theirs_of(copy)
    words = "a b c d e f".split()
    texts = [" ".join(words[:i]) for i in range(7) for _ in range(7)]
    pairs = [" ".join(words[:i]) for _ in range(7) for i in range(7)]
    for length in range(2, 16):
        got = ours(texts, pairs, truncation=True, max_length=length)
        assert got == dict(theirs(texts, pairs, truncation=True, max_length=length)), length


def test_model_max_length(copy: Path) -> None:
    unlimited = GPT2Tokenizer.from_pretrained(copy)
    assert unlimited.model_max_length == theirs_of(copy).model_max_length == int(1e30)
    assert unlimited(TEXTS, truncation=True, padding="max_length") == unlimited(TEXTS)
    write(copy, "tokenizer_config.json", CONFIG | {"model_max_length": 6})
    ours, theirs = GPT2Tokenizer.from_pretrained(copy), theirs_of(copy)
    got = ours(TEXTS, truncation=True, padding="max_length")
    assert got == dict(theirs(TEXTS, truncation=True, padding="max_length"))
    assert {len(row) for row in got.input_ids} == {6}
    assert ours(TEXTS) == unlimited(TEXTS)


def listed(encoding: Any) -> dict[str, Any]:
    """Its values as lists, each with its dtype."""
    return {
        key: (str(getattr(value, "dtype", "")), value.tolist() if hasattr(value, "tolist") else value)
        for key, value in encoding.items()
    }


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, with every record of its rows; or that it raises."""
    try:
        encoding = call()
    except BaseException as error:  # the library's panic, which transformers lets pass, is no Exception
        assert not isinstance(error, KeyboardInterrupt | SystemExit)
        return "an error"
    rows = range(len(encoding.encodings))
    records = [(encoding.tokens(i), encoding.word_ids(i), encoding.sequence_ids(i)) for i in rows]
    return listed(encoding), records


WORD = st.sampled_from(["", "a", "It's", " dog </s> x", "a b c d e f", "na\u00efve \U0001f600<pad>"])
WORDS = st.lists(WORD, max_size=4)
BATCH = st.lists(WORD, min_size=1, max_size=3)
FLAGS = ("token_type_ids", "attention_mask", "overflowing_tokens", "special_tokens_mask", "offsets_mapping", "length")
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "add_special_tokens": st.booleans(),
        "padding": st.sampled_from([True, False, "longest", "max_length", "do_not_pad"]),
        "truncation": st.sampled_from(
            [True, False, None, "longest_first", "only_first", "only_second", "do_not_truncate"]
        ),
        "max_length": st.integers(2, 12),
        "stride": st.integers(0, 2),
        "pad_to_multiple_of": st.sampled_from([2, 8]),
        "padding_side": st.sampled_from(["left", "right"]),
        "split_special_tokens": st.booleans(),
        **{f"return_{flag}": st.booleans() for flag in FLAGS},
    },
)


@given(
    inputs=st.tuples(WORD)
    | st.tuples(WORD, WORD)
    | st.tuples(BATCH)
    | st.tuples(st.lists(st.tuples(WORD, WORD), min_size=1, max_size=3))
    | BATCH.flatmap(lambda rows: st.tuples(st.just(rows), st.lists(WORD, min_size=len(rows), max_size=len(rows)))),
    options=OPTIONS,
    side=st.sampled_from(["left", "right"]),
    bound=st.sampled_from([int(1e30), 7]),
)
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore:.max_length. is ignored")
def test_any_options(
    ours: GPT2Tokenizer, theirs: Any, inputs: tuple[Any, ...], options: dict[str, Any], side: str, bound: int
) -> None:
    for tokenizer in (ours, theirs):
        tokenizer.truncation_side, tokenizer.model_max_length = side, bound
    try:
        assert outcome(lambda: ours(*inputs, **options)) == outcome(lambda: theirs(*inputs, **options))
    finally:
        for tokenizer in (ours, theirs):
            tokenizer.truncation_side, tokenizer.model_max_length = "right", int(1e30)


@given(inputs=st.tuples(WORDS) | st.tuples(WORDS, WORDS) | st.tuples(st.lists(WORDS, min_size=1, max_size=3)))
@settings(max_examples=50, deadline=None)
def test_words(ours: GPT2Tokenizer, theirs: Any, inputs: tuple[Any, ...]) -> None:
    options = {"is_split_into_words": True, "truncation": True, "max_length": 9, "return_offsets_mapping": True}
    assert outcome(lambda: ours(*inputs, **options)) == outcome(lambda: theirs(*inputs, **options))


def test_places_of_tokens(ours: GPT2Tokenizer, theirs: Any) -> None:
    """From characters to tokens and words, and back."""
    got, want = (t(["It's me", "no"], ["who?", "x</s>"]) for t in (ours, theirs))
    for method, first, second in (
        ("char_to_token", 3, (1, 0)),
        ("char_to_token", 0, (0, 1, 1)),
        ("char_to_word", 3, (1, 1)),
        ("token_to_chars", 0, (1, 1)),
        ("token_to_word", 1, (0, 2)),
        ("token_to_sequence", 1, (0, 4)),
        ("word_to_tokens", 1, (0, 0, 1)),
        ("word_to_chars", 1, (0, 0, 1)),
        ("word_to_tokens", 99, (0, 99)),
    ):
        ask, asked = getattr(got, method), getattr(want, method)
        assert (ask(first), ask(*second)) == (asked(first), asked(*second)), method
    span = got.word_to_tokens(1)
    other: Any = want.word_to_tokens(1)
    assert span is not None and (span.start, span.end) == (other.start, other.end)
    assert (got.n_sequences, got.is_fast, len(got.encodings or ())) == (want.n_sequences, True, 2)
    assert got[1].ids == want[1].ids == got.input_ids[1]
    assert got.copy().tokens() == pickle.loads(pickle.dumps(got)).tokens() == want.tokens()
    assert copies.deepcopy(got) == got == dict(got.data)


def test_targets(ours: GPT2Tokenizer, theirs: Any) -> None:
    assert ours("a", text_target="b c") == dict(theirs("a", text_target="b c"))
    assert ours(text_target=["b c"], return_tensors="np")["input_ids"].tolist() == [ours.encode("b c")]


def test_options_as_transformers_enums(ours: GPT2Tokenizer, theirs: Any) -> None:
    from transformers.tokenization_utils_base import TruncationStrategy
    from transformers.utils.generic import PaddingStrategy, TensorType

    options: dict[str, Any] = {
        "padding": PaddingStrategy.MAX_LENGTH,
        "truncation": TruncationStrategy.LONGEST_FIRST,
        "max_length": 3,
        "return_tensors": TensorType.NUMPY,
    }
    assert outcome(lambda: ours(TEXTS, **options)) == outcome(lambda: theirs(TEXTS, **options)) != "an error"


def test_tokenize_and_encode(ours: GPT2Tokenizer, theirs: Any) -> None:
    for call in (
        lambda t: t.tokenize("a dog", "b", add_special_tokens=True),
        lambda t: t.tokenize("a dog", truncation=True, max_length=1),
        lambda t: t.encode("a dog", None, False),
        lambda t: t.encode("a dog", "b", truncation=True, max_length=4),
    ):
        assert call(ours) == call(theirs)
    with pytest.warns(UserWarning, match="add_prefix_space: changes nothing in a call; from_pretrained takes it"):
        assert ours.encode("dog", add_prefix_space=True) == theirs.encode("dog", add_prefix_space=True)


ROWS = {"input_ids": [[2, 5, 6], [2]], "special_tokens_mask": [[1, 0, 0], [1]], "token_type_ids": [[0, 0, 0], [0]]}


@pytest.mark.parametrize(
    ("encoded", "options"),
    [
        (ROWS, {}),
        (ROWS | {"labels": [0.5, 1.5]}, {"return_tensors": "pt"}),
        (ROWS | {"labels": [0, 1]}, {"padding": "max_length", "max_length": 5, "padding_side": "left"}),
        (ROWS, {"padding": "max_length", "max_length": 2}),
        (ROWS, {"padding": "max_length"}),
        (ROWS, {"padding": False}),
        (ROWS | {"attention_mask": [[1, 1, 1], [1]]}, {"pad_to_multiple_of": 4, "return_attention_mask": False}),
        ([{"input_ids": [2, 5], "label": 1}, {"input_ids": [2], "label": 0}], {"return_tensors": "np"}),
        ([{"input_ids": np.array([2, 5])}, {"input_ids": np.array([2])}], {}),
        ({"input_ids": np.array([[2, 5], [2, 1]])}, {"pad_to_multiple_of": 8}),
        ({"input_ids": [2, 5]}, {"padding": "max_length", "max_length": 4, "return_tensors": "pt"}),
        ({"input_ids": []}, {}),
        ({"input_ids": []}, {"return_attention_mask": True}),
        ({"input_ids": [[2], [2]], "labels": [1]}, {}),
        ({"labels": [1]}, {}),
    ],
    ids=str,
)
def test_pad(ours: GPT2Tokenizer, theirs: Any, encoded: Any, options: dict[str, Any]) -> None:
    results = []
    for tokenizer in (ours, theirs):
        try:
            results.append(listed(tokenizer.pad(copies.deepcopy(encoded), **options)))
        except (ValueError, AssertionError):
            results.append("an error")
    assert results[0] == results[1]


def test_pad_says_what_is_wrong(ours: GPT2Tokenizer) -> None:
    with pytest.raises(ValueError, match="encoded_inputs: found labels, wanted input_ids"):
        ours.pad({"labels": [1]})
    with pytest.raises(ValueError, match="labels: found 1 rows, wanted 2 as in input_ids"):
        ours.pad({"input_ids": [[2], [2]], "labels": [1]})


def test_collators(ours: GPT2Tokenizer, theirs: Any) -> None:
    pytest.importorskip("torch")
    for collate in (
        lambda t: transformers.DataCollatorForLanguageModeling(t, mlm=False)([t(text) for text in TEXTS]),
        lambda t: transformers.DataCollatorWithPadding(t)([dict(t(text), label=1) for text in TEXTS]),
    ):
        got, want = collate(ours), collate(theirs)
        assert listed(got) == listed(want)


def test_threads_do_not_disturb_each_other(small: Path) -> None:
    ours = GPT2Tokenizer.from_pretrained(small)
    calls: list[dict[str, Any]] = [
        {},
        {"truncation": True, "max_length": 3},
        {"padding": True},
        {"padding_side": "left", "padding": True},
    ]
    want = [ours(TEXTS, **call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: ours(TEXTS, **calls[i % 4]) == want[i % 4], range(200))) == [True] * 200


def test_pickle(small: Path) -> None:
    ours = GPT2Tokenizer.from_pretrained(small, padding_side="left", image_token="<image>")
    ours.add_tokens(["<new>"])
    for again in (pickle.loads(pickle.dumps(ours)), copies.deepcopy(ours)):
        assert again([*TEXTS, "<new><image>"], padding=True) == ours([*TEXTS, "<new><image>"], padding=True)
        assert (again.special_tokens_map, again.padding_side) == (ours.special_tokens_map, "left")


# ---- tensors


@pytest.mark.parametrize(
    ("kind", "framework", "dtype"),
    [("np", "numpy", "int64"), ("pt", "torch", "int64"), ("tf", "tensorflow", "int32"), ("jax", "jax", "int32")],
)
def test_tensors(small: Path, kind: str, framework: str, dtype: str) -> None:
    pytest.importorskip(framework)
    ours = GPT2Tokenizer.from_pretrained(small)
    lists, tensors = ours(TEXTS, padding=True), ours(TEXTS, padding=True, return_tensors=kind)
    for key, value in tensors.items():
        assert type(value).__module__.split(".")[0] in (framework, framework + "lib")
        assert dtype in str(value.dtype)
        assert np.asarray(value).tolist() == lists[key]
    one = ours("I like you.", return_tensors=kind)
    assert np.asarray(one.input_ids).tolist() == [ours.encode("I like you.")]
    assert np.asarray(ours.encode("I like you.", return_tensors=kind)).shape == one["attention_mask"].shape
    assert tuple(ours("", add_special_tokens=False, return_tensors=kind).input_ids.shape) == (1, 0)
    assert tuple(ours([], return_tensors=kind).input_ids.shape) == (0, 0)

    assert ours.decode(one.input_ids[0]) == "</s>I like you."
    assert ours.decode(one.input_ids[0][1]) == ours.decode(ours.encode("I like you.")[1])
    assert ours.batch_decode(tensors.input_ids, skip_special_tokens=True) == ours.batch_decode(lists.input_ids, True)
    assert ours.batch_decode(list(tensors.input_ids)) == ours.batch_decode(lists.input_ids)
    assert ours.convert_ids_to_tokens(one.input_ids[0]) == ["</s>", *ours.tokenize("I like you.")]


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_tensors_are_those_of_transformers(ours: GPT2Tokenizer, theirs: Any, kind: str) -> None:
    got, want = (t(TEXTS, padding=True, return_tensors=kind) for t in (ours, theirs))
    assert got.keys() == want.keys()
    for key in got:
        assert got[key].dtype == want[key].dtype and (got[key] == want[key]).all()


def test_batch_encoding() -> None:
    torch = pytest.importorskip("torch")
    encoding = BatchEncoding({"input_ids": torch.tensor([[2, 3]]), "attention_mask": [[1, 1]]})
    assert dict(**encoding).keys() == {"input_ids", "attention_mask"}
    assert encoding.to("meta") is encoding
    assert encoding.input_ids.device.type == encoding["input_ids"].device.type == "meta"
    assert encoding.attention_mask == [[1, 1]]
    with pytest.warns(UserWarning, match="device: found torch.float16, wanted a device"):
        assert encoding.to(torch.float16).input_ids.dtype == torch.int64  # ids in half precision would be other ids
    with pytest.raises(AttributeError, match="no 'labels', only input_ids, attention_mask"):
        _ = encoding.labels
    with pytest.raises(ValueError, match="no tokenizer made this BatchEncoding"):
        encoding.word_ids()
    with pytest.raises(KeyError, match="wanted a name or a slice"):
        _ = encoding[0]


def test_import_needs_no_framework() -> None:
    code = (
        "import sys, opt_common.tokenizer;"
        "print({'torch', 'tensorflow', 'jax', 'flax', 'keras', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- ids to text


def test_decode(ours: GPT2Tokenizer, theirs: Any) -> None:
    size = len(ours)
    every = list(range(size + 7))  # the model has seven rows more than the vocabulary
    for skip in (False, True):
        for ids in (
            every,
            every[::-1],
            [],
            [2],
            [1, 2, 2, 5, 1],
            [size, 5, size + 6, 10**6],
            [size],
            5,
            [250, 120, 99],
        ):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.batch_decode([[i] for i in every], skip) == theirs.batch_decode([[i] for i in every], skip)
        assert ours.batch_decode([2, 5, 6], skip) == theirs.batch_decode([2, 5, 6], skip)
    assert ours.batch_decode([]) == []
    assert ours.decode([size, 5]) == ours.decode([5]) != ""


def test_decode_skips_special_tokens(ours: GPT2Tokenizer) -> None:
    rows = ours(TEXTS[:10], padding=True).input_ids
    assert ours.batch_decode(rows, skip_special_tokens=True) == TEXTS[:10]
    assert ours.decode(ours.encode("a</s>b <pad><mask>"), skip_special_tokens=True) == "ab <mask>"
    assert ours.decode(ours.encode("a</s>b <pad><mask>")) == "</s>a</s>b <pad><mask>"


def test_decode_of_several(ours: GPT2Tokenizer, theirs: Any) -> None:
    for rows in ([[2, 5], [2]], np.array([[2, 5]]), {"input_ids": [2, 5]}, ours("a b"), (2, 5)):
        assert ours.decode(rows) == theirs.decode(rows)
    with pytest.raises(OverflowError):
        ours.decode([-100])


def test_vocabulary(ours: GPT2Tokenizer, theirs: Any) -> None:
    assert len(ours) == len(theirs) == ours.vocab_size == theirs.vocab_size
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, name + "_id") == getattr(theirs, name + "_id")
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (2, 2, 2, 1)
    assert ours.padding_side == theirs.padding_side == "right"
    every = list(range(len(ours) + 7))
    assert ours.convert_ids_to_tokens(every) == theirs.convert_ids_to_tokens(every)
    assert ours.convert_ids_to_tokens(2) == "</s>"
    assert ours.convert_ids_to_tokens(len(ours)) is None
    tokens = ["</s>", "no such token", "\u0120the", "<mask>", ""]
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("<pad>") == 1
    assert ours.convert_tokens_to_string(["</s>", "\u0120a"]) == theirs.convert_tokens_to_string(["</s>", "\u0120a"])
    assert ours.convert_ids_to_tokens([2, 5, 1], skip_special_tokens=True) == ours.convert_ids_to_tokens([5])
    assert ours.get_vocab() == ours.vocab == theirs.get_vocab()


# ---- settings and special tokens

ATTRIBUTES = (
    "bos_token eos_token unk_token sep_token pad_token cls_token mask_token bos_token_id eos_token_id unk_token_id"
    " sep_token_id pad_token_id cls_token_id mask_token_id all_special_ids all_special_tokens special_tokens_map"
    " extra_special_tokens extra_special_tokens_ids added_tokens_encoder model_max_length padding_side truncation_side"
    " model_input_names max_len_single_sentence max_len_sentences_pair vocab_files_names pad_token_type_id vocab_size"
    " is_fast clean_up_tokenization_spaces split_special_tokens chat_template SPECIAL_TOKENS_ATTRIBUTES"
).split()


def alike(ours: Any, theirs: Any, texts: list[str] = TEXTS) -> None:
    same(ours, theirs, texts)
    assert {name: getattr(ours, name) for name in ATTRIBUTES} == {name: getattr(theirs, name) for name in ATTRIBUTES}
    assert (len(ours), ours.get_added_vocab()) == (len(theirs), theirs.get_added_vocab())
    assert ours.num_special_tokens_to_add(pair=True) == theirs.num_special_tokens_to_add(pair=True)
    for text in texts:
        ids = theirs.encode(text, text)
        assert ours.encode(text, text) == ids
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


TYPED = ["input_ids", "attention_mask", "token_type_ids"]


@pytest.mark.parametrize(
    "given",
    [
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 5},
        {"max_len": 7, "use_fast": False, "trust_remote_code": True, "device_map": "auto", "pad_token": None},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_prefix_space": True, "split_special_tokens": True},
        {"bos_token": "<s>", "pad_token": "</s>", "clean_up_tokenization_spaces": True},
        {"pad_token": "[PAD]", "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"},
        {"pad_token": AddedToken("<sep>", lstrip=True, special=True)},
        {"additional_special_tokens": ["<sep>", "<new>"]},
        {"extra_special_tokens": {"image_token": "<new>"}, "model_input_names": TYPED},
        {"image_token": "<new>", "chat_template": "{{ messages }}"},
    ],
    ids=str,
)
def test_settings_as_keywords(small: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    ours, theirs = GPT2Tokenizer.from_pretrained(small, **given), theirs_of(small, **given)
    texts = [*TEXTS, "a <sep> b <new>[PAD]<cls>"]
    alike(ours, theirs, texts)
    assert getattr(ours, "image_token_id", None) == getattr(theirs, "image_token_id", None)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        alike(GPT2Tokenizer.from_pretrained(folder), theirs, texts)
        alike(ours, theirs_of(folder), texts)


def test_unknown_keyword(small: Path) -> None:
    with pytest.raises(TypeError, match="from_pretrained: found gguf_file, paddingside, wanted keywords of GPT2Tokeni"):
        GPT2Tokenizer.from_pretrained(small, paddingside="left", gguf_file="x")
    assert GPT2Tokenizer.from_pretrained(small, gguf_file=None)
    with pytest.raises(ValueError, match="padding_side: found 'up'"):
        GPT2Tokenizer.from_pretrained(small, padding_side="up")


def by_ids(t: Any) -> Any:
    t.bos_token_id, t.pad_token_id = 0, 2
    return t.bos_token, t.pad_token  # a text still begins with the old one


def bos_and_eos(t: Any) -> Any:
    t.add_bos_token, t.add_eos_token = False, True
    return t.encode("a")


def bos_alone(t: Any) -> Any:
    t.add_eos_token = True
    t.add_eos_token = False


def template_of_the_library(t: Any) -> Any:
    t._tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return t.encode("a b c d", truncation=True, max_length=3)


def extra_one_by_one(t: Any) -> Any:
    first = t.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    return first, t.add_special_tokens({"extra_special_tokens": ["<new>"]}, replace_extra_special_tokens=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pad_token", t.eos_token),
        lambda t: setattr(t, "pad_token", None),
        lambda t: setattr(t, "mask_token", AddedToken("<mask>")),
        lambda t: setattr(t, "extra_special_tokens", ["<mask>"]),
        lambda t: setattr(t, "add_prefix_space", True),
        by_ids,
        bos_and_eos,
        bos_alone,
        template_of_the_library,
        extra_one_by_one,
        lambda t: (t.add_tokens(["<new>", "dog"]), t.add_tokens("<sep>"), t.add_tokens([])),
        lambda t: t.add_tokens(["<new>"], special_tokens=True),
        lambda t: t.add_special_tokens({"pad_token": "<new>", "cls_token": AddedToken("<sep>", rstrip=True)}),
        lambda t: t.add_special_tokens({"additional_special_tokens": ["<sep>", "<new>"]}),
        lambda t: (t.add_special_tokens({}), t.add_special_tokens({"extra_special_tokens": []})),
    ],
)
def test_changes(small: Path, change: Callable[[Any], Any]) -> None:
    ours, theirs = GPT2Tokenizer.from_pretrained(small), theirs_of(small)
    assert change(ours) == change(theirs)
    alike(ours, theirs, [*TEXTS, "a <sep> b <new>c"])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"foo_token": "x"}, "special_tokens_dict: found 'foo_token', wanted one of bos_token"),
        ({"pad_token": 3}, "pad_token: found 3, wanted a str or an AddedToken"),
        ({"extra_special_tokens": "<a>"}, "extra_special_tokens: found '<a>', wanted a list of tokens"),
    ],
)
def test_special_tokens_that_are_none(small: Path, tokens: dict[str, Any], message: str) -> None:
    ours = GPT2Tokenizer.from_pretrained(small)
    with pytest.raises(ValueError, match=message):
        ours.add_special_tokens(tokens)
    assert len(ours) == len(GPT2Tokenizer.from_pretrained(small))


def test_special_tokens_mask(ours: GPT2Tokenizer, theirs: Any) -> None:
    ids = [2, 5, 1]
    want = theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == want
    with pytest.raises(ValueError, match="wanted one row of ids and already_has_special_tokens=True"):
        ours.get_special_tokens_mask(ids)


@pytest.mark.parametrize(
    "given", [{}, {"new_special_tokens": ["<new>"], "special_tokens_map": {"<pad>": "[P]", "</s>": "<end>"}}], ids=str
)
def test_a_vocabulary_learnt_from_texts(small: Path, given: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"padding_side": "left", "image_token": "<image>"}
    learnt = [
        t.train_new_from_iterator([SENTENCES], 320, show_progress=False, **given)
        for t in (GPT2Tokenizer.from_pretrained(small, **changes), theirs_of(small, **changes))
    ]
    assert learnt[0].get_vocab() == learnt[1].get_vocab()
    alike(learnt[0], learnt[1], [*TEXTS, "<new> [P]<end><image>"])


# ---- chat templates

CHAT = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": "a dog "}]
TURNS = (
    "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TRIMMED = (
    "{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}"
    "{% generation %}{{ m.content | trim }}{% endgeneration %}<{{ m.role | tojson }}>{% endfor %}"
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tokenize": False, "add_generation_prompt": True},
        {"return_dict": False},
        {"return_tensors": "np", "max_length": 12, "truncation": True, "padding": True},
        {"tokenizer_kwargs": {"return_offsets_mapping": True}},
        {"tokenize": False, "continue_final_message": True},
        {"tokenize": False, "continue_final_message": "content", "chat_template": TRIMMED},
        {"tokenize": False, "chat_template": TRIMMED},
        {"tokenize": False, "tools": [{"name": "f"}]},
        {"tokenize": False, "chat_template": "other", "word": "x"},
    ],
    ids=str,
)
@pytest.mark.parametrize("several", [False, True])
def test_chat(small: Path, several: bool, options: dict[str, Any]) -> None:
    pytest.importorskip("jinja2")
    templates = {"default": TURNS, "tool_use": "{{ tools[0].name }}", "other": "{{ word }}{{ documents }}"}
    results = []
    for tokenizer in (GPT2Tokenizer.from_pretrained(small), theirs_of(small)):
        tokenizer.chat_template = templates
        result = tokenizer.apply_chat_template([CHAT, CHAT[:2]] if several else CHAT, **options)
        results.append(listed(result if hasattr(result, "keys") else {"": result}))
    assert results[0] == results[1]
    assert CHAT[-1]["content"] == "a dog "


def test_chat_blocks_and_files(small: Path, copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    (copy / "chat_template.jinja").write_text("{{ messages[-1].content[-1].text }}.")
    ours, theirs = GPT2Tokenizer.from_pretrained(copy), theirs_of(copy)
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}]
    for options in list[dict[str, Any]]([{}, {"continue_final_message": True}]):
        want = theirs.apply_chat_template(chat, tokenize=False, **options)
        assert ours.apply_chat_template(chat, tokenize=False, **options) == want
    ours.chat_template = {"default": "d", "other": "o"}
    ours.save_pretrained(tmp_path)
    for tokenizer in (GPT2Tokenizer.from_pretrained(tmp_path), theirs_of(tmp_path)):
        assert tokenizer.chat_template == ours.chat_template


@pytest.mark.parametrize(
    ("chat", "options", "message"),
    [
        (CHAT, {}, "chat_template: found none"),
        ([], {"chat_template": "x"}, "conversation: found none"),
        (CHAT, {"chat_template": "x", "tools": [print]}, "tools: .* wanted JSON schemas"),
        (
            CHAT,
            {"chat_template": "x", "return_assistant_tokens_mask": True},
            "return_assistant_tokens_mask: found True",
        ),
        (CHAT, {"chat_template": "x", "continue_final_message": True}, "the template leaves out the last message"),
        ([{"role": "user"}], {"chat_template": "x", "continue_final_message": True}, "found None as content"),
        (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "wanted one of the two"),
    ],
)
def test_chat_errors(small: Path, chat: Any, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(ValueError, match=message):
        GPT2Tokenizer.from_pretrained(small).apply_chat_template(chat, **options)


def test_a_template_does_not_reach_into_python(small: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    ours = GPT2Tokenizer.from_pretrained(small)
    for template in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('no') }}"):
        with pytest.raises(jinja2.TemplateError):
            ours.apply_chat_template(CHAT, chat_template=template, tokenize=False)


# ---- files


def test_defaults_are_opts(copy: Path) -> None:
    want = theirs_of(copy)
    (copy / "tokenizer_config.json").unlink()
    (copy / "special_tokens_map.json").unlink()
    same(GPT2Tokenizer.from_pretrained(str(copy)), want)


def test_constructor(small: Path) -> None:
    lines = (small / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    same(GPT2Tokenizer(read(small / "vocab.json"), merges), theirs_of(small))
    plain = GPT2Tokenizer(read(small / "vocab.json"), merges, add_bos_token=False)
    assert plain.encode("dog") == plain.encode("dog", add_special_tokens=False)
    with pytest.raises(ValueError, match="vocab and merges make no BPE.*out of vocabulary"):
        GPT2Tokenizer({"a": 0}, [("a", "b")])
    with pytest.raises(ValueError, match="padding_side: found 'up', wanted 'left' or 'right'"):
        GPT2Tokenizer({"a": 0}, [], padding_side="up")


def test_special_tokens_map_overrides_the_config(copy: Path) -> None:
    write(copy, "special_tokens_map.json", MAP | {"bos_token": "<s>", "pad_token": {"content": "<unk>"}})
    ours = GPT2Tokenizer.from_pretrained(copy)
    same(ours, theirs_of(copy))
    assert (ours.bos_token_id, ours.pad_token_id, ours.encode("")) == (0, 3, [0])


@pytest.mark.parametrize("typed", [False, True], ids=["special_tokens_map", "tokenizer_config"])
def test_flags_of_special_tokens(copy: Path, tmp_path: Path, typed: bool) -> None:
    pad = {"content": "<pad>", "single_word": False, "lstrip": True, "rstrip": True, "normalized": False}
    bos = BOS | {"single_word": True}
    if typed:
        listed = {"1": pad | {"special": True}, "2": bos | {"special": True}}
        write(copy, "tokenizer_config.json", CONFIG | {"added_tokens_decoder": listed})
    else:
        write(copy, "special_tokens_map.json", {"bos_token": bos, "eos_token": bos, "unk_token": bos, "pad_token": pad})
    ours, theirs = GPT2Tokenizer.from_pretrained(copy), theirs_of(copy)
    texts = [*TEXTS, "a  <pad>  b", "a</s>b </s> c"]
    same(ours, theirs, texts)
    assert ours.encode("\t <pad> \n") == [2, 1]  # which takes up the space around it
    assert ours.encode("a</s>b").count(2) == 1
    ours.save_pretrained(tmp_path / "saved")
    same(ours, theirs_of(tmp_path / "saved"), texts)


def test_windows_line_ends(copy: Path) -> None:
    merges = (copy / "merges.txt").read_bytes()
    (copy / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    same(GPT2Tokenizer.from_pretrained(copy), theirs_of(copy))


@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_json_alone(copy: Path, tmp_path: Path, bos: bool) -> None:
    write(copy, "tokenizer_config.json", CONFIG | {"add_bos_token": bos})
    theirs_of(copy).save_pretrained(str(tmp_path / "new"))
    assert sorted(os.listdir(tmp_path / "new")) == ["tokenizer.json", "tokenizer_config.json"]
    assert "add_bos_token" not in read(tmp_path / "new" / "tokenizer_config.json")
    ours = GPT2Tokenizer.from_pretrained(tmp_path / "new")
    same(ours, theirs_of(tmp_path / "new"))
    assert ours.add_bos_token is bos

    content = read(tmp_path / "new" / "tokenizer.json")
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]  # as it was until 2024
    write(tmp_path / "new", "tokenizer.json", content)
    same(GPT2Tokenizer.from_pretrained(tmp_path / "new"), theirs_of(tmp_path / "new"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "something other than a byte-level BPE"),
        ({"pre_tokenizer": None}, "something other than a byte-level BPE"),
        ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}, "something other than a byte-level BPE"),
        ({"pre_tokenizer": BYTES | {"use_regex": False}}, "something other than GPT-2's byte-level BPE"),
        ({"normalizer": {"type": "NFC"}}, "something other than GPT-2's byte-level BPE"),
        ({"model": {}}, "tokenizer.json is none of the tokenizers library"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "tokenizer.json is none of the tokenizers library"),
    ],
)
def test_other_kinds_of_tokenizer_json_are_refused(
    copy: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    theirs_of(copy).save_pretrained(str(tmp_path / "new"))
    write(tmp_path / "new", "tokenizer.json", read(tmp_path / "new" / "tokenizer.json") | change)
    with pytest.raises(ValueError, match=message):
        GPT2Tokenizer.from_pretrained(tmp_path / "new")


@pytest.mark.parametrize("pair", ["the longest twice", "</s> </s>", "no pair", "e"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_merge_of_no_token(small: Path, tmp_path: Path, capfd: Any, whole: bool, pair: str) -> None:
    """The library panics, which is no Exception, over one that is longer than every token."""
    if pair == "the longest twice":
        longest = max(read(small / "vocab.json"), key=lambda token: len(token.encode()))
        pair = f"{longest} {longest}"
    if whole:
        GPT2Tokenizer.from_pretrained(small).save_pretrained(tmp_path / "new")
        saved = read(tmp_path / "new" / "tokenizer.json")
        saved["model"]["merges"].append(pair.split(" "))
        write(tmp_path / "new", "tokenizer.json", saved)
    else:
        shutil.copytree(small, tmp_path / "new")
        with open(tmp_path / "new" / "merges.txt", "a", encoding="utf-8") as file:
            file.write(pair + "\n")
    with pytest.raises(ValueError, match="merges") as error:
        GPT2Tokenizer.from_pretrained(tmp_path / "new")
    assert str(error.value).startswith(f"{tmp_path / 'new'}: ")
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_of_the_library_is_an_error(small: Path, tmp_path: Path, capfd: Any) -> None:
    GPT2Tokenizer.from_pretrained(small).save_pretrained(tmp_path / "new")
    saved = read(tmp_path / "new" / "tokenizer.json")
    saved["model"] |= {"continuing_subword_prefix": "#" * 9, "merges": [["h", "e"]]}
    write(tmp_path / "new", "tokenizer.json", saved)
    with pytest.raises(ValueError, match="none of the tokenizers library"):
        GPT2Tokenizer.from_pretrained(tmp_path / "new")
    assert "panicked" in capfd.readouterr().err  # else this test needs another way to one


@pytest.mark.parametrize("texts", ["single", "pair"])
def test_a_post_processor_with_unknown_tokens(small: Path, tmp_path: Path, texts: str) -> None:
    """It would panic at the first text, in an error that names no file."""
    GPT2Tokenizer.from_pretrained(small).save_pretrained(tmp_path / "new")
    saved = read(tmp_path / "new" / "tokenizer.json")
    saved["post_processor"][texts].append({"SpecialToken": {"id": "nowhere", "type_id": 0}})
    write(tmp_path / "new", "tokenizer.json", saved)
    with pytest.raises(ValueError, match="none of the tokenizers library") as error:
        GPT2Tokenizer.from_pretrained(tmp_path / "new")
    assert str(error.value).startswith(f"{tmp_path / 'new'}: ")


@pytest.mark.parametrize("where", ["config", "decoder", "whole", "map", "extra"])
def test_a_very_long_special_token(small: Path, tmp_path: Path, where: str) -> None:
    """The library takes seconds and gigabytes to look for one of a megabyte."""
    GPT2Tokenizer.from_pretrained(small).save_pretrained(tmp_path / "new")
    text, (whole, config) = "".join(map(chr, range(0x4E00, 0x4E00 + 1001))), (
        read(tmp_path / "new" / name) for name in ("tokenizer.json", "tokenizer_config.json")
    )  # fmt: skip
    if where == "config":
        config["pad_token"] = text
    elif where == "decoder":
        config["added_tokens_decoder"]["0"] = {"content": text}
    elif where == "extra":
        config["extra_special_tokens"] = [text]
    elif where == "whole":
        whole["added_tokens"].append(whole["added_tokens"][0] | {"content": text, "id": 999})
    else:
        del config["added_tokens_decoder"]
        write(tmp_path / "new", "special_tokens_map.json", {"pad_token": text})
    write(tmp_path / "new", "tokenizer.json", whole)
    write(tmp_path / "new", "tokenizer_config.json", config)
    with pytest.raises(ValueError, match="1001 characters, wanted at most 1000") as error:
        GPT2Tokenizer.from_pretrained(tmp_path / "new")
    assert str(error.value).startswith(f"{tmp_path / 'new'}: ") and len(str(error.value)) < 400


def test_tokenizer_json_of_keras_hub_is_passed_over(copy: Path) -> None:
    write(copy, "tokenizer.json", {"module": "keras_hub.src.models.opt.opt_tokenizer", "config": {}})
    ours = GPT2Tokenizer.from_pretrained(copy)
    (copy / "tokenizer.json").unlink()
    same(ours, theirs_of(copy))


def galactica(small: Path, folder: Path, **settings: Any) -> Path:
    """A folder like Galactica's: a tokenizer.json that splits digits and knows no special token by its role."""
    folder.mkdir()
    backend = Tokenizer(models.BPE.from_file(str(small / "vocab.json"), str(small / "merges.txt")))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("[REF]", "isolated"), *steps])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["[REF]", "<s>", "<pad>"])
    if settings.pop("enabled", False):
        backend.enable_padding(direction="left", pad_id=1, pad_token="<pad>")
        backend.enable_truncation(4, direction="left")
    backend.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    write(folder, "config.json", {"model_type": "opt"})
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"enabled": True}, {"bos_token": "<s>", "add_bos_token": True, "pad_token": "<pad>"}],
    ids=str,
)
def test_another_bpe(small: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = galactica(small, tmp_path / "galactica", **settings)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    texts = ["a 2024 b", "x[REF]1.5[REF]<s>y", "<pad>12"]
    ours = AutoTokenizer.from_pretrained(folder)
    GPT2Tokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    for tokenizer in (
        ours,
        GPT2Tokenizer.from_pretrained(tmp_path / "saved"),
        transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved")),
    ):
        same(tokenizer, theirs, texts)
        assert tokenizer.special_tokens_map == theirs.special_tokens_map
        assert (tokenizer.padding_side, tokenizer.truncation_side) == (theirs.padding_side, theirs.truncation_side)
    assert not (tmp_path / "saved" / "vocab.json").exists()  # which would say nothing of the digits
    if ours.pad_token is None:
        with pytest.raises(ValueError, match="padding: wanted a pad_token"):
            ours(texts, padding=True)
    for tokenizer in (ours, theirs):
        tokenizer.pad_token_id = 1
    assert ours(texts, padding=True) == dict(theirs(texts, padding=True))


ADDED = ["a <new> b<new>", "<strip>  x  <strip> y", "dogword dog", "<sep><new></s>"]


@pytest.fixture
def extended(copy: Path) -> Any:
    theirs = theirs_of(copy)
    theirs.add_tokens(["<new>", "dogword", AddedToken("<strip>", lstrip=True, rstrip=True)])
    theirs.add_special_tokens({"sep_token": "<sep>"})
    return theirs


def test_added_tokens(extended: Any, tmp_path: Path) -> None:
    extended.save_pretrained(str(tmp_path / "new"))
    ours = GPT2Tokenizer.from_pretrained(tmp_path / "new")
    same(ours, extended, TEXTS + ADDED)
    assert (len(ours), ours.vocab_size) == (len(extended), len(extended) - 4)
    for text in ADDED:
        ids = extended.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == extended.decode(ids, skip_special_tokens=skip)
    ours.save_pretrained(tmp_path / "saved")
    same(GPT2Tokenizer.from_pretrained(tmp_path / "saved"), extended, TEXTS + ADDED)
    same(ours, theirs_of(tmp_path / "saved"), TEXTS + ADDED)


def test_added_tokens_before_transformers_4_34(copy: Path) -> None:
    size = len(read(copy / "vocab.json"))
    write(copy, "added_tokens.json", {"dogword": size + 1, "<new>": size, "<sep>": size + 2})
    write(copy, "special_tokens_map.json", MAP | {"additional_special_tokens": ["<sep>"], "mask_token": "<mask>"})
    ours, theirs = GPT2Tokenizer.from_pretrained(copy), theirs_of(copy)
    texts = TEXTS + ["a <new> b<new>", "dogword dog", "<sep><new></s>"]
    same(ours, theirs, texts)
    assert ours.encode("<new>dogword<sep><mask>") == [2, size, size + 1, size + 2, size - 1]
    assert ours.decode([size, size + 2, size - 1], skip_special_tokens=True) == "<new>"
    write(copy, "added_tokens.json", {"<new>": size + 5})
    with pytest.raises(ValueError, match=f"'<new>' should be {size + 5}, but the files make it {size}"):
        GPT2Tokenizer.from_pretrained(copy)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"add_bos_token": False},
        {"padding_side": "left", "truncation_side": "left", "model_max_length": 2048},
        {"add_prefix_space": True, "bos_token": "<s>", "pad_token": "<unk>"},
    ],
    ids=str,
)
def test_save_pretrained(copy: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    (copy / "special_tokens_map.json").unlink()
    write(copy, "tokenizer_config.json", CONFIG | change)
    theirs, ours = theirs_of(copy), GPT2Tokenizer.from_pretrained(copy)
    saved = tmp_path / "a" / "b"
    ours.save_pretrained(saved)
    ours.save_pretrained(str(saved))  # over the old
    tables = ["merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(os.listdir(saved)) == tables
    assert read(saved / "vocab.json") == read(copy / "vocab.json")
    assert (saved / "merges.txt").read_bytes() == (copy / "merges.txt").read_bytes()
    older = shutil.copytree(saved, tmp_path / "older")
    (older / "tokenizer.json").unlink()
    again = [
        GPT2Tokenizer.from_pretrained(saved),
        GPT2Tokenizer.from_pretrained(older),
        theirs_of(older),
        theirs_of(saved),
        transformers.AutoTokenizer.from_pretrained(str(saved), local_files_only=True),
    ]
    for tokenizer in again:
        same(ours, tokenizer)
        for name in (
            "padding_side",
            "truncation_side",
            "model_max_length",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        ):
            assert getattr(tokenizer, name) == getattr(ours, name) == getattr(theirs, name)
    same(ours, theirs)


def test_save_pretrained_of_opt(ours: GPT2Tokenizer, theirs: Any, folder: Path, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    assert read(tmp_path / "vocab.json") == read(folder / "vocab.json")
    want = (folder / "merges.txt").read_text(encoding="utf-8")
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines() == want.splitlines()
    same(GPT2Tokenizer.from_pretrained(tmp_path), theirs)
    same(ours, theirs_of(tmp_path))


def test_save_pretrained_beside_a_tokenizer_json(copy: Path, small: Path) -> None:
    theirs = theirs_of(copy)
    theirs.add_tokens(["<other>"])
    theirs.save_pretrained(str(copy))
    ours = GPT2Tokenizer.from_pretrained(small, padding_side="left")
    written = ours.save_pretrained(copy)
    assert sorted(written) == sorted(str(copy / name) for name in os.listdir(copy))
    for tokenizer in (GPT2Tokenizer.from_pretrained(copy), theirs_of(copy)):
        same(tokenizer, ours)
        assert (len(tokenizer), tokenizer.padding_side) == (len(ours), "left")


def test_save_vocabulary(small: Path, tmp_path: Path) -> None:
    ours = GPT2Tokenizer.from_pretrained(small)
    assert ours.save_vocabulary(tmp_path, "p") == (str(tmp_path / "p-vocab.json"),)
    assert read(tmp_path / "p-vocab.json") == read(small / "vocab.json")
    assert (tmp_path / "p-merges.txt").read_bytes() == (small / "merges.txt").read_bytes()


def test_from_pretrained_fetches(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(gpt2, "fetch", lambda *args, **options: calls.append((*args, options)) or small)
    options: dict[str, Any] = {"revision": "r", "cache_dir": "c", "token": "t", "local_files_only": True}
    GPT2Tokenizer.from_pretrained("facebook/opt-125m", **options)
    [(name, files, passed)] = calls
    assert (name, passed) == ("facebook/opt-125m", options)
    assert {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"} <= {
        *files
    }
    monkeypatch.setattr(gpt2, "fetch", lambda name, files, **options: calls.append(files) or small.parent)
    same(GPT2Tokenizer.from_pretrained("a/b", subfolder=small.name), theirs_of(small))
    assert f"{small.name}/vocab.json" in calls[-1]


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_missing_files(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(FileNotFoundError, match="wanted vocab.json and merges.txt, or tokenizer.json; found") as caught:
        GPT2Tokenizer.from_pretrained(copy)
    assert str(copy) in str(caught.value)
    assert missing not in str(caught.value).partition("found")[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b'{"a": 0', "vocab.json"),
        ("vocab.json", b"[]", "vocab.json"),
        ("vocab.json", b'{"a": "b"}', "vocab.json.*make no BPE"),
        ("vocab.json", b'{"a": 0}', "vocab.json.*make no BPE.*out of vocabulary"),
        ("merges.txt", b"#version: 0.2\n\xff a\n", "merges.txt is not UTF-8"),
        ("merges.txt", b"#version: 0.2\na b\nabc\n", "line 3 of merges.txt is 'abc', wanted two tokens"),
        ("merges.txt", b"#version: 0.2\na b c\n", "line 2 of merges.txt is 'a b c', wanted two tokens"),
        ("merges.txt", b"#version: 0.2\na zzz\n", "merges.txt.*`zzz` out of vocabulary"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json"),
        ("tokenizer_config.json", b'{"padding_side": "up"}', "tokenizer_config.json.*found 'up'"),
        ("tokenizer_config.json", b'{"model_max_length": "long"}', "tokenizer_config.json.*long"),
        ("tokenizer_config.json", b'{"model_max_length": Infinity}', "tokenizer_config.json.*infinity"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}', "tokenizer_config.json"),
        ("special_tokens_map.json", b'{"bos_token": {"lstrip": true}}', "special_tokens_map.json.*lstrip"),
        ("special_tokens_map.json", b'{"bos_token": 7}', "special_tokens_map.json.*special token is 7"),
        ("special_tokens_map.json", b"\xff", "special_tokens_map.json"),
    ],
)
def test_broken_files(copy: Path, name: str, content: bytes, message: str) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        GPT2Tokenizer.from_pretrained(copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "tokenizer", "message"),
    [
        ({"model_type": "opt"}, {"tokenizer_class": "GPT2Tokenizer"}, ""),
        ({"model_type": "opt"}, {}, ""),
        ({"model_type": "blip-2"}, CONFIG, ""),
        ({}, {}, ""),
        ({"model_type": "llama"}, {}, "config.json: model_type: found 'llama', wanted 'opt'"),
        ({"model_type": "gpt2"}, {"tokenizer_class": "GPT2Tokenizer"}, "config.json: model_type: found 'gpt2'"),
        ({"model_type": "opt"}, {"tokenizer_class": "LlamaTokenizer"}, "tokenizer_config.json: tokenizer_class: found"),
    ],
    ids=str,
)
def test_auto(copy: Path, config: dict[str, Any], tokenizer: dict[str, Any], message: str) -> None:
    write(copy, "config.json", config)
    write(copy, "tokenizer_config.json", tokenizer)
    if message:
        with pytest.raises(ValueError, match=message):
            AutoTokenizer.from_pretrained(copy)
    else:
        ours = AutoTokenizer.from_pretrained(copy, use_fast=True, padding_side="left")
        assert type(ours) is GPT2Tokenizer
        assert (ours.padding_side, ours.name_or_path) == ("left", str(copy))
        same(ours, GPT2Tokenizer.from_pretrained(copy))


# ---- errors of a call

SHORT = {"text_pair": "a", "truncation": "only_second", "max_length": 3}
CUT_AND_FILL = {"truncation": True, "padding": True, "max_length": 5, "pad_to_multiple_of": 4}


@pytest.mark.parametrize(
    ("error", "message", "text", "options"),
    [
        (TypeError, "wanted a str or a list of str, found None", None, {}),
        (TypeError, "wanted a str or a list of str, found 5", 5, {}),
        (TypeError, "wanted a str or a list of str, found b'a'", b"a", {}),
        (TypeError, r"wanted a str or a list of str, found \['a', 5\]", ["a", 5], {}),
        (TypeError, "wanted a str or a list of str", [["a"]], {}),
        (ValueError, "padding: found 'up', wanted True, False or one of longest, max_length", "a", {"padding": "up"}),
        (
            ValueError,
            "truncation: found 'up', wanted True, False, None or one of longest_first",
            "a",
            {"truncation": "up"},
        ),
        (
            ValueError,
            "padding_side: found 'up', wanted 'left' or 'right'",
            "a",
            {"padding": True, "padding_side": "up"},
        ),
        (ValueError, "return_tensors: found 'mx', wanted one of np, jax, pt, tf", "a", {"return_tensors": "mx"}),
        (
            ValueError,
            "input_ids: found rows of 2 to 4, wanted rows of one length: pass padding=True",
            ["a", "a b"],
            {"return_tensors": "np"},
        ),
        (TypeError, "wanted a list of words.*found 'a b'", "a b", {"is_split_into_words": True}),
        (TypeError, "unexpected keyword argument 'return_tensor'", "a", {"return_tensor": "np"}),
        (ValueError, "'only_second', max_length=3.*too short", "a b", SHORT),
        (ValueError, "stride", "a b c d", {"truncation": True, "max_length": 3, "stride": 2}),
        (ValueError, "max_length: found 5, wanted a multiple of pad_to_multiple_of, 4", "a", CUT_AND_FILL),
        (ValueError, "max_length 0 leaves no room for 1 </s>", "a", {"truncation": True, "max_length": 0}),
        (ValueError, "max_length 1 leaves no room for 2 </s>", "a", {"text_pair": "b", "max_length": 1}),
        (
            ValueError,
            "text_pair: wanted a str if text is one, and else a list of as many texts",
            "a",
            {"text_pair": ["b"]},
        ),
        (
            ValueError,
            "text_pair: wanted a str if text is one, and else a list of as many texts",
            ["a"],
            {"text_pair": "b"},
        ),
        (
            ValueError,
            "text_pair: wanted a str if text is one, and else a list of as many texts",
            ["a"],
            {"text_pair": ["b", "c"]},
        ),
    ],
)
def test_call_errors(small: Path, error: type[Exception], message: str, text: Any, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        GPT2Tokenizer.from_pretrained(small)(text, **options)


def test_missing_framework(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="return_tensors='pt' needs PyTorch: .*torch"):
        GPT2Tokenizer.from_pretrained(small)("a", return_tensors="pt")


def test_a_token_outside_the_vocabulary(small: Path) -> None:
    ours, theirs = GPT2Tokenizer.from_pretrained(small), theirs_of(small)
    with pytest.warns(UserWarning, match=r"pad_token: '\[PAD\]' is not in the vocabulary and gets unk_token's id, 2"):
        ours.pad_token = "[PAD]"
    theirs.pad_token = "[PAD]"
    assert ours.pad_token_id == theirs.pad_token_id == 2
    assert ours(["a", "a b"], padding=True) == dict(theirs(["a", "a b"], padding=True))
    wrong: Any = 3
    with pytest.raises(ValueError, match="pad_token: found 3, wanted a str, an AddedToken or None"):
        ours.pad_token = wrong
    ours.pad_token = None
    with pytest.raises(ValueError, match="padding: wanted a pad_token"):
        ours(["a", "a b"], padding=True)
