"""What the host does at each step: the caller's functions, stop strings and the clock.

B prompts   R rows of them   V vocabulary   T columns of the texts so far
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_common.generation import Options, Settings, StopStrings

# Which texts end with their last token, [rows], of the texts so far [rows, T] and the recorded scores
Stops = Callable[[Tensor, tuple[Tensor, ...] | None], Tensor]


def allowed(scores: Tensor, function: Callable[[int, Any], Any], text: Tensor, copies: int) -> Tensor:
    """Only what `prefix_allowed_tokens_fn` allows behind the texts [R, T]; that and nothing else, where it excludes all
    that was left to the rows of a prompt."""
    masks = np.full(scores.shape, -np.inf, np.float32)
    for row in range(scores.shape[0]):
        tokens = list(function(row // copies, text[row]))
        if not tokens:
            raise ValueError(f"prefix_allowed_tokens_fn: found no token for row {row // copies}, wanted at least one")
        masks[row, tokens] = 0
    found = scores + masks
    none = np.isneginf(found.numpy().max(axis=-1)).reshape(-1, copies).all(axis=1).repeat(copies)
    return tf.where(none[:, None], masks, found)


def stops(settings: Settings, options: Options, padding: np.ndarray) -> Stops | None:
    """What the host says about ends. padding: [B], how many columns in front of each prompt are padding."""
    criteria = options.get("stopping_criteria") or ()
    criteria = tuple(criteria) if isinstance(criteria, (list, tuple)) else (criteria,)
    strings = StopStrings(options.get("tokenizer"), settings.stop_strings) if settings.stop_strings else None
    if not criteria and strings is None and settings.max_time is None:
        return None
    began = time.monotonic()

    def ended(text: Tensor, scores: tuple[Tensor, ...] | None) -> Tensor:
        rows = text.shape[0]
        found = np.zeros(rows, bool)
        for criterion in criteria:
            found |= np.asarray(criterion(text, scores), bool)
        if strings is not None:
            for row, ids in enumerate(text.numpy()):
                found[row] |= strings(ids[padding[row * len(padding) // rows] :])
        if settings.max_time is not None:
            found |= time.monotonic() - began > settings.max_time
        return tf.constant(found)

    return ended
