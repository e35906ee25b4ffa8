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

from opt_common.generation import Options, Settings, StopStrings, allowed

Function = Callable[..., Array]


class Callbacks(NamedTuple):
    """processors: by name, from texts [R, T] and scores [R, V] to scores. criteria: from texts [C, T] and scores to
    which of them end, [C] or one for all."""

    processors: dict[str, Callable[[Array, Array], Array]]
    criteria: list[Callable[[Array, Array], ArrayLike]]


def traceable(functions: tuple[Function, ...]) -> bool:
    """Whether they take (ids, scores, cur_len), as transformers' Flax processors do: ids of one width at each step."""
    return all(len(inspect.signature(function).parameters) > 2 for function in functions)


def callbacks(settings: Settings, options: Options) -> Callbacks:
    """Those of a `generate`."""
    found = Callbacks({}, [])
    functions = settings.processors.get("logits_processor", ())
    if not traceable(functions):
        found.processors["logits_processor"] = lambda texts, scores: _in_turn(functions, texts, scores)
    if (function := settings.processors.get("prefix_allowed_tokens_fn")) is not None:
        found.processors["prefix_allowed_tokens_fn"] = lambda texts, scores: jnp.asarray(
            allowed(function, settings.num_beams, np.asarray(texts), np.asarray(scores))
        )
    if settings.stop_strings:
        stops = StopStrings(options.get("tokenizer"), settings.stop_strings)
        found.criteria.append(lambda texts, scores: stops.of(np.asarray(texts)))
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
