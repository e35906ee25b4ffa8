"""The options of `generate`: declared, documented and checked once for all frameworks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np

from .config import OPTConfig
from .inputs import check_call, check_tokens


class Options(TypedDict, total=False):
    """The keyword arguments of every `generate`. Defaults are transformers'."""

    max_new_tokens: int | None
    """How many tokens to add at most. Default: 20, if `max_length` is not given either."""

    max_length: int | None
    """The same limit, counting the prompt's columns too."""

    min_new_tokens: int
    """No row ends before it has this many new tokens. Default: 0."""

    do_sample: bool
    """Draw each token at random instead of taking the likeliest. Default: False."""

    temperature: float
    """Sampling: divide the logits by it. Default: 1.0."""

    top_k: int | None
    """Sampling: keep the k likeliest tokens, after temperature. 0 or None keeps all. Default: 50."""

    top_p: float
    """Sampling: keep the fewest tokens whose probabilities add up to p, after top_k. Default: 1.0, all."""

    seed: int | None
    """Sampling: makes the draw repeatable. Default: a random seed."""

    eos_token_id: int | Sequence[int] | None
    """The token or tokens that end a row. Default: the config's. An empty list: no token does."""

    pad_token_id: int | None
    """Fills a row after its end. Default: the config's, or else the first `eos_token_id`."""


@dataclass(frozen=True)
class Generation:
    """The checked settings of one `generate`."""

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int  # 0: all
    top_p: float
    seed: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


@dataclass(frozen=True)
class Prompt:
    """What `generate` continues: ids [B, T], mask [B, T] (True: a real token), and the settings."""

    ids: np.ndarray
    mask: np.ndarray
    settings: Generation


def prompt(config: OPTConfig, input_ids: Any, attention_mask: Any, options: Options) -> Prompt:
    """The checked arguments of a `generate`, in numpy. Without a mask, everything but the config's `pad_token_id` is
    real. Raises ValueError that names the argument."""
    ids = np.asarray(input_ids)
    B, T = check_call(config, ids.shape, None, None if attention_mask is None else np.shape(attention_mask))
    check_tokens(config, int(ids.min()), int(ids.max()))
    if attention_mask is None:
        mask = np.ones((B, T), bool) if config.pad_token_id is None else ids != config.pad_token_id
    else:
        mask = np.asarray(attention_mask) != 0
    counts = mask.sum(axis=1)
    return Prompt(ids, mask, check_generate(config, T, int(counts.max()), int(counts.min()), **options))


def check_generate(
    config: OPTConfig, width: int, longest: int, shortest: int, **options: Unpack[Options]
) -> Generation:
    """The checked settings of a `generate` over prompts `width` columns wide, whose longest row has `longest` tokens
    and whose shortest has `shortest`.

    Raises ValueError that names the argument, and TypeError for options that do not exist.
    """

    def check(ok: bool, name: str, value: object, wanted: str) -> None:
        if not ok:
            raise ValueError(f"{name}: found {value!r}, wanted {wanted}")

    if unknown := options.keys() - Options.__annotations__:
        names = ", ".join(Options.__annotations__)
        raise TypeError(f"generate: found unknown options {', '.join(sorted(unknown))}, wanted some of {names}")
    new, length = options.get("max_new_tokens"), options.get("max_length")
    if new is not None and length is not None:
        raise ValueError("max_new_tokens, max_length: found both, wanted only one of them")
    if length is not None:
        check(length > width, "max_length", length, f"more than the prompt's {width}, or max_new_tokens")
        new = length - width
    new = 20 if new is None else new
    given = options.get("eos_token_id")
    eos = config.eos_token_ids if given is None else (given,) if isinstance(given, int) else tuple(given)
    pad = options.get("pad_token_id")
    pad = config.pad_token_id if pad is None else pad
    pad = pad if pad is not None else eos[0] if eos else 0
    shortest_new, temperature = options.get("min_new_tokens", 0), options.get("temperature", 1.0)
    top_k, top_p, seed = options.get("top_k", 50), options.get("top_p", 1.0), options.get("seed")
    check(shortest > 0, "attention_mask", "a row without tokens", "at least one token in every row")
    check(new > 0, "max_new_tokens", new, "a number > 0")
    check(0 <= shortest_new <= new, "min_new_tokens", shortest_new, f"0 to {new}")
    check(temperature > 0, "temperature", temperature, "a number > 0; do_sample=False for greedy")
    check(top_k is None or top_k >= 0, "top_k", top_k, "a number ≥ 0; 0 for all tokens")
    check(0 < top_p <= 1, "top_p", top_p, "0 < top_p ≤ 1")
    check(all(0 <= i < config.vocab_size for i in eos), "eos_token_id", given, f"ids below {config.vocab_size}")
    check(0 <= pad < config.vocab_size, "pad_token_id", pad, f"an id below {config.vocab_size}")
    limit, total = config.max_position_embeddings, longest + new
    if total > limit:
        raise ValueError(
            f"max_new_tokens: a prompt of {longest} tokens and {new} new ones make {total}, "
            f"wanted at most {limit} (max_position_embeddings)"
        )
    return Generation(
        max_new_tokens=new,
        min_new_tokens=shortest_new,
        do_sample=options.get("do_sample", False),
        temperature=float(temperature),
        top_k=min(top_k or 0, config.vocab_size),
        top_p=float(top_p),
        seed=secrets.randbits(63) if seed is None else seed,
        eos_token_ids=eos,
        pad_token_id=pad,
    )
