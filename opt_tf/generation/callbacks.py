"""What the host does at each step: the caller's functions, stop strings and the clock.

T columns of the texts so far
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_common.generation import Options, Settings, StopStrings

# Which texts end with their last token, [rows], of the texts so far [rows, T] and the recorded scores
Stops = Callable[[Tensor, tuple[Tensor, ...] | None], Tensor]


def stops(settings: Settings, options: Options) -> Stops | None:
    """What the host says about ends."""
    criteria = options.get("stopping_criteria") or ()
    criteria = tuple(criteria) if isinstance(criteria, (list, tuple)) else (criteria,)
    strings = StopStrings(options.get("tokenizer"), settings.stop_strings) if settings.stop_strings else None
    if not criteria and strings is None and settings.max_time is None:
        return None
    began = time.monotonic()

    def ended(text: Tensor, scores: tuple[Tensor, ...] | None) -> Tensor:
        found = np.zeros(text.shape[0], bool)
        for criterion in criteria:
            found |= np.asarray(criterion(text, scores), bool)
        if strings is not None:
            found |= strings.of(text.numpy())
        if settings.max_time is not None:
            found |= time.monotonic() - began > settings.max_time
        return tf.constant(found)

    return ended
