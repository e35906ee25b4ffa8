"""Checks of a call's arguments, the same for all frameworks: they see only shapes and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .config import OPTConfig

Shape = Sequence[int]

# What the numbers of an argument may be, in every framework: numpy's letters for kinds of dtypes, and words for them.
KINDS = {
    "input_ids": ("iu", "integers"),
    "position_ids": ("iu", "integers"),
    "attention_mask": ("biuf", "booleans, integers or floats"),
    "inputs_embeds": ("f", "floats"),
    "labels": ("iu", "integers"),  # those of a sequence classification: `check_labels`
    "start_positions": ("iu", "integers"),
    "end_positions": ("iu", "integers"),
}


def kind(dtype: Any) -> tuple[str, str]:
    """numpy's letter for the kind of a dtype ("" for one that holds no real numbers), and its name: of a dtype of
    numpy, PyTorch, TensorFlow or JAX, or of a name."""
    said = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    letters = {"uint": "u", "int": "i", "bool": "b"}
    return "f" if "float" in said else letters.get(said.rstrip("0123456789"), ""), said


def check_kind(name: str, dtype: Any) -> tuple[str, str]:
    """The `kind` of an argument's dtype. Raises ValueError, naming the argument, if it is none of KINDS."""
    (letter, said), (kinds, wanted) = kind(dtype), KINDS[name]
    if not letter or letter not in kinds:
        raise ValueError(f"{name}: found {said}, wanted {wanted}")
    return letter, said


def check_dtype(config: OPTConfig, name: str, dtype: Any) -> None:
    """`check_kind`; of input_ids, also raise ValueError if the dtype cannot hold every token id: those beyond it have
    become others before they came here."""
    letter, said = check_kind(name, dtype)
    if name == "input_ids" and 2 ** (int(said.lstrip("uint")) - (letter == "i")) < config.vocab_size:
        raise ValueError(f"{name}: found {said}, which cannot hold ids up to {config.vocab_size - 1}, wanted int32")


def array(name: str, x: Any) -> np.ndarray:
    """An argument that is no tensor as an array of numpy: it may be one, or lists. Raises ValueError, naming the
    argument, for lists of different lengths, and for what is none of numbers."""
    try:
        found = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name}: found rows of different lengths, wanted equal ones (padding=True)") from error
    if found.dtype.kind in "OSU":
        raise ValueError(f"{name}: found {type(x).__name__} without numbers, wanted a tensor, an array or lists")
    return found if found.size or not isinstance(x, list) else found.astype(int)  # numpy calls no numbers floats


def check_call(
    config: OPTConfig,
    input_ids: Shape | None,
    inputs_embeds: Shape | None,
    attention_mask: Shape | None = None,
    position_ids: Shape | None = None,
    past: int | None = 0,
    slots: int | None = None,
    rows: int | None = None,
) -> tuple[int, int]:
    """Check the shapes of a model call and return (B, T): rows, and tokens a row.

    `past` counts the tokens in the cache (None while tracing, when it has no value yet); `slots` and `rows` are its
    size. Raises ValueError that names the argument, what was found and what was wanted.
    """
    if (input_ids is None) == (inputs_embeds is None):
        both = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: found {both}, wanted exactly one of them")
    if input_ids is not None and len(input_ids) != 2:
        raise ValueError(f"input_ids: found shape {list(input_ids)}, wanted [batch, tokens]")
    if inputs_embeds is not None and (len(inputs_embeds) != 3 or inputs_embeds[2] != config.embed_dim):
        wanted = f"[batch, tokens, {config.embed_dim}]"
        raise ValueError(f"inputs_embeds: found shape {list(inputs_embeds)}, wanted {wanted}")
    shape = input_ids if input_ids is not None else inputs_embeds
    assert shape is not None
    B, T = shape[0], shape[1]
    for count, what in ((B, "rows"), (T, "tokens")):
        if count == 0:
            name = "inputs_embeds" if input_ids is None else "input_ids"
            raise ValueError(f"{name}: found no {what}, wanted at least one")
    if rows is not None and rows != B:
        raise ValueError(f"past_key_values: found a cache of {rows} rows, wanted {B}, as many as in the call")
    if past is not None and attention_mask is not None and tuple(attention_mask) != (B, past + T):
        held = f" ({past} in past_key_values and {T} new)" if past else ""
        raise ValueError(f"attention_mask: found shape {list(attention_mask)}, wanted [{B}, {past + T}]{held}")
    if position_ids is not None and (len(position_ids) != 2 or position_ids[0] not in (1, B) or position_ids[1] != T):
        raise ValueError(f"position_ids: found shape {list(position_ids)}, wanted [{B}, {T}] or [1, {T}]")
    if slots is not None and (past or 0) + T > slots:
        raise ValueError(
            f"past_key_values: found a cache of {slots} slots, {past or 0} of them used, wanted room for {T} new "
            "tokens; init_cache makes a larger one"
        )
    return B, T


def check_tokens(config: OPTConfig, smallest: int, largest: int) -> None:
    """Raise ValueError if a token id has no row in the embedding: frameworks would return garbage or crash."""
    if smallest < 0 or largest >= config.vocab_size:
        bad = smallest if smallest < 0 else largest
        raise ValueError(f"input_ids: found token {bad}, wanted 0 to {config.vocab_size - 1} (vocab_size - 1)")


def check_cache(config: OPTConfig, layers: int | None, heads: int | None, width: int | None) -> None:
    """Raise ValueError if a cache is not one of such a model's; what is None is not known."""
    wanted = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    for found, number, what in zip((layers, heads, width), wanted, ("layers", "heads", "numbers a head"), strict=True):
        if found not in (None, number):
            raise ValueError(f"past_key_values: found {found} {what}, wanted {number}")


def check_classes(name: str, labels: Any, number: int) -> None:
    """Raise ValueError if one of some labels, without those that are -100, is no class of this number of them."""
    if 0 in labels.shape:
        return
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= number:
        bad = smallest if smallest < 0 else largest
        raise ValueError(f"{name}: found {bad}, wanted 0 to {number - 1}, or -100 to leave one out")


def check_labels(config: OPTConfig, rows: int | None, labels: Shape, whole: bool) -> str:
    """Check the labels of a sequence classification and return its problem type. Where the config has none, it follows
    transformers' rule: one label is regression; several are single-label if the labels are `whole` numbers, else
    multi-label. `rows` is None while tracing. Raises ValueError."""
    n = config.num_labels
    several = "single_label_classification" if whole else "multi_label_classification"
    problem = config.problem_type or ("regression" if n == 1 else several)
    if problem == "single_label_classification" and not whole:
        raise ValueError(f"labels: found fractions, wanted whole numbers below {n} for {problem}")
    one_each = problem == "single_label_classification" or n == 1
    shapes = [(rows,), (rows, 1)] if one_each else [(rows, n)]
    if rows is not None and tuple(labels) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"labels: found shape {list(labels)}, wanted {wanted} for {problem} with num_labels {n}")
    return problem


def check_spans(rows: int | None, start_positions: Shape | None, end_positions: Shape | None) -> bool:
    """Whether a question answering has labels. Raises ValueError if only one of the two is given, or for a wrong shape.
    `rows` is None while tracing."""
    if (start_positions is None) != (end_positions is None):
        raise ValueError("start_positions, end_positions: found only one, wanted both or neither")
    for name, shape in (("start_positions", start_positions), ("end_positions", end_positions)):
        if shape is not None and rows is not None and tuple(shape) not in ((rows,), (rows, 1)):
            raise ValueError(f"{name}: found shape {list(shape)}, wanted [{rows}]")
    return start_positions is not None


def check_positions(config: OPTConfig, largest: int, name: str = "position_ids", smallest: int = -1) -> None:
    """Raise ValueError if a position has no row in the position table. Padding is at -1."""
    limit = config.max_position_embeddings
    if largest >= limit or smallest < -1:
        wrong = largest if largest >= limit else smallest
        raise ValueError(f"{name}: found position {wrong}, wanted -1 to {limit - 1} (max_position_embeddings {limit})")
