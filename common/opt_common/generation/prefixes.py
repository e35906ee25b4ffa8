"""The tokens that `prefix_allowed_tokens_fn` allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


def allowed(function: Callable[[int, Any], Any], beams: int, texts: Iterable[Any], scores: np.ndarray) -> np.ndarray:
    """The scores [R, V] of what the function allows behind the texts [R, T], and 0 for it where none of it has any
    chance in any beam of its prompt. beams: how many texts share a number. Raises ValueError if it allows nothing."""
    mask = np.full(scores.shape, -np.inf, np.float32)
    for row, text in enumerate(texts):
        tokens = [int(token) for token in function(row // beams, text)]
        if not tokens:
            raise ValueError(f"prefix_allowed_tokens_fn: found no tokens for row {row // beams}, wanted at least one")
        mask[row, tokens] = 0
    found = scores + mask
    lost = np.isneginf(found).reshape(len(found) // beams, -1).all(axis=1)
    return np.where(lost.repeat(beams)[:, None], mask, found)
