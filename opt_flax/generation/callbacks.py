"""The caller's functions that take part in each step, outside of any compiled program.

R texts of B prompts   C candidates: R, or of beams more   T columns of a text so far   V vocabulary
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from opt_common.generation import Options, Settings, StopStrings

Function = Callable[..., Array]


class Callbacks(NamedTuple):
    """processors: by name, from texts [R, T] and scores [R, V] to scores. criteria: from texts [C, T] and scores to
    which of them end, [C] or one for all."""

    processors: dict[str, Callable[[Array, Array], Array]]
    criteria: list[Callable[[Array, Array], ArrayLike]]


def traceable(functions: tuple[Function, ...]) -> bool:
    """Whether they take (ids, scores, cur_len), as transformers' Flax processors do: ids of one width at each step."""
    return all(len(inspect.signature(function).parameters) > 2 for function in functions)


def callbacks(settings: Settings, options: Options, padding: np.ndarray) -> Callbacks:
    """Those of a `generate` whose prompts have so many columns of padding, [B], on the left."""
    found = Callbacks({}, [])
    functions = settings.processors.get("logits_processor", ())
    if not traceable(functions):
        found.processors["logits_processor"] = lambda texts, scores: _in_turn(functions, texts, scores)
    if (allowed := settings.processors.get("prefix_allowed_tokens_fn")) is not None:
        each = max(settings.num_beams, settings.num_return_sequences)
        found.processors["prefix_allowed_tokens_fn"] = lambda texts, scores: _allowed(allowed, each, texts, scores)
    if settings.stop_strings:
        stops = StopStrings(options.get("tokenizer"), settings.stop_strings)
        found.criteria.append(lambda texts, scores: _stopped(stops, padding, np.asarray(texts)))
    if settings.max_time is not None:
        until = time.monotonic() + settings.max_time
        found.criteria.append(lambda texts, scores: time.monotonic() > until)
    criteria: Any = options.get("stopping_criteria", ())
    found.criteria.extend(criteria if isinstance(criteria, (list, tuple)) else [criteria])
    return found


def _in_turn(functions: tuple[Function, ...], texts: Array, scores: Array) -> Array:
    for function in functions:
        scores = function(texts, scores, texts.shape[1]) if traceable((function,)) else function(texts, scores)
    return scores


def _allowed(function: Callable[[int, Any], Any], each: int, texts: Array, scores: Array) -> Array:
    """The scores of the tokens that `prefix_allowed_tokens_fn` allows, and 0 for them where none has any chance in any
    text of its prompt."""
    mask = np.full(scores.shape, -np.inf, np.float32)
    for row, text in enumerate(np.asarray(texts)):
        tokens = [int(token) for token in function(row // each, text)]
        if not tokens:
            raise ValueError(f"prefix_allowed_tokens_fn: found no tokens for row {row // each}, wanted at least one")
        mask[row, tokens] = 0
    found = np.asarray(scores) + mask
    lost = np.isneginf(found).reshape(len(found) // each, -1).all(axis=1)
    return jnp.asarray(np.where(lost.repeat(each)[:, None], mask, found))


def _stopped(stops: StopStrings, padding: np.ndarray, texts: np.ndarray) -> np.ndarray:
    padding = padding.repeat(len(texts) // len(padding))
    return np.array([stops(text[n:]) for text, n in zip(texts, padding, strict=True)])
