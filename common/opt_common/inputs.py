"""The checks of a call's arguments, one for all frameworks: shapes and numbers in, one clear error out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import OPTConfig

Shape = Sequence[int]


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

    `past` counts the tokens in the cache (None while tracing, when it is not a number yet); `slots` and `rows` are the
    cache's size.
    Raises ValueError that names the argument, what was found and what was wanted.
    """
    if (input_ids is None) == (inputs_embeds is None):
        both = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: found {both}, wanted exactly one of the two")
    if input_ids is not None and len(input_ids) != 2:
        raise ValueError(f"input_ids: found shape {list(input_ids)}, wanted [batch, tokens]")
    if inputs_embeds is not None and (len(inputs_embeds) != 3 or inputs_embeds[2] != config.embed_dim):
        wanted = f"[batch, tokens, {config.embed_dim}]"
        raise ValueError(f"inputs_embeds: found shape {list(inputs_embeds)}, wanted {wanted}")
    shape = input_ids if input_ids is not None else inputs_embeds
    assert shape is not None
    B, T = shape[0], shape[1]
    if T == 0:
        raise ValueError(
            f"{'inputs_embeds' if input_ids is None else 'input_ids'}: found no tokens, wanted at least one"
        )
    if rows is not None and rows != B:
        raise ValueError(f"past_key_values: found a cache of {rows} rows, wanted {B}, as many as are given")
    if past is not None and attention_mask is not None and tuple(attention_mask) != (B, past + T):
        held = f" ({past} in past_key_values and {T} new)" if past else ""
        raise ValueError(f"attention_mask: found shape {list(attention_mask)}, wanted [{B}, {past + T}]{held}")
    if position_ids is not None and (len(position_ids) != 2 or position_ids[0] not in (1, B) or position_ids[1] != T):
        raise ValueError(f"position_ids: found shape {list(position_ids)}, wanted [{B}, {T}] or [1, {T}]")
    if slots is not None and (past or 0) + T > slots:
        taken = f"{past or 0} of {slots} slots are taken, {T} tokens are new"
        raise ValueError(f"past_key_values: {taken}; init_cache makes a larger one")
    return B, T


def check_tokens(config: OPTConfig, smallest: int, largest: int) -> None:
    """Raise ValueError if a token id has no row in the embedding; frameworks answer that with garbage, or a crash."""
    if smallest < 0 or largest >= config.vocab_size:
        bad = smallest if smallest < 0 else largest
        raise ValueError(f"input_ids: found token {bad}, wanted 0 to {config.vocab_size - 1} (vocab_size - 1)")


def check_labels(config: OPTConfig, rows: int | None, labels: Shape, whole: bool) -> str:
    """Check the labels of a sequence classification and return its problem type, which transformers' rule gives where
    the config does not: one label is regression, several are single-label if `whole` numbers are given, else
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
    """Whether there is something to learn for a question answering. Raises ValueError for one of two, or a wrong
    shape. `rows` is None while tracing."""
    if (start_positions is None) != (end_positions is None):
        raise ValueError("start_positions, end_positions: found one of them, wanted both or neither")
    for name, shape in (("start_positions", start_positions), ("end_positions", end_positions)):
        if shape is not None and rows is not None and tuple(shape) not in ((rows,), (rows, 1)):
            raise ValueError(f"{name}: found shape {list(shape)}, wanted [{rows}]")
    return start_positions is not None


def check_positions(config: OPTConfig, largest: int, name: str = "position_ids", smallest: int = -1) -> None:
    """Raise ValueError if a position has no row in the position table; -1 is that of padding."""
    limit = config.max_position_embeddings
    if largest >= limit or smallest < -1:
        wrong = largest if largest >= limit else smallest
        raise ValueError(f"{name}: found position {wrong}, wanted -1 to {limit - 1} (max_position_embeddings {limit})")


@dataclass(frozen=True)
class Generation:
    """The settings of one `generate`, checked: how many tokens, how they are chosen, and when a row ends."""

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int  # 0: all
    top_p: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


def check_generate(
    config: OPTConfig,
    width: int,
    longest: int,
    shortest: int,
    *,
    max_new_tokens: int | None,
    max_length: int | None,
    min_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
) -> Generation:
    """The checked settings of a `generate` over prompts `width` columns wide, of which the longest row holds `longest`
    tokens and the shortest `shortest`.

    `max_length` counts the prompt's columns too, as in transformers, and is 20 if neither it nor `max_new_tokens` is
    given. Raises ValueError that names the argument.
    """

    def check(ok: bool, name: str, value: object, wanted: str) -> None:
        if not ok:
            raise ValueError(f"{name}: found {value!r}, wanted {wanted}")

    if max_new_tokens is not None and max_length is not None:
        raise ValueError("max_new_tokens, max_length: found both, wanted one: how much is new, or how long it all gets")
    if max_new_tokens is None:
        max_length = 20 if max_length is None else max_length
        check(max_length > width, "max_length", max_length, f"more than the prompt's {width}, or max_new_tokens")
        max_new_tokens = max_length - width
    eos = eos_token_id if eos_token_id is not None else config.eos_token_ids
    eos = (eos,) if isinstance(eos, int) else tuple(eos)
    pad = pad_token_id if pad_token_id is not None else config.pad_token_id
    pad = pad if pad is not None else (eos[0] if eos else 0)
    check(shortest > 0, "attention_mask", "a row without tokens", "at least one token in every row")
    check(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "a number > 0")
    check(0 <= min_new_tokens <= max_new_tokens, "min_new_tokens", min_new_tokens, f"0 to {max_new_tokens}")
    check(temperature > 0, "temperature", temperature, "a number > 0; do_sample=False for greedy")
    check(top_k is None or top_k >= 0, "top_k", top_k, "a number ≥ 0; 0 for all tokens")
    check(0 < top_p <= 1, "top_p", top_p, "0 < top_p ≤ 1")
    check(all(0 <= i < config.vocab_size for i in eos), "eos_token_id", eos_token_id, f"ids below {config.vocab_size}")
    check(0 <= pad < config.vocab_size, "pad_token_id", pad, f"an id below {config.vocab_size}")
    limit, total = config.max_position_embeddings, longest + max_new_tokens
    if total > limit:
        raise ValueError(
            f"max_new_tokens: a prompt of {longest} tokens and {max_new_tokens} new ones make {total}, "
            f"wanted at most {limit} (max_position_embeddings)"
        )
    return Generation(
        max_new_tokens, min_new_tokens, do_sample, float(temperature), min(top_k or 0, config.vocab_size), float(top_p),
        eos, pad,
    )  # fmt: skip
