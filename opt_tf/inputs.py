"""The arguments of a call: checked, and where its tokens stand, their positions and the document each belongs to.

B batch   T new tokens   S slots: all of a cache, or T without one
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import check_call, check_positions, check_tokens

from .cache import KVCache


def check(
    config: OPTConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    inputs_embeds: Tensor | None,
    use_cache: bool,
    position_ids: Tensor | None,
) -> tuple[Any, Any]:
    """Check the arguments of a call and return (B, T), numbers, or scalar tensors where they are not known yet. Raises
    ValueError that names the argument."""
    eager, given = tf.executing_eagerly(), (input_ids, inputs_embeds, attention_mask, position_ids)
    shapes = [None if x is None else tuple(x.shape) for x in given]
    past, rows, slots = 0, None, config.max_position_embeddings if use_cache else None
    if cache is not None:
        past, rows, slots = int(cache.length) if eager else None, *cache.segments.shape
    if any(
        None in shape for shape in shapes if shape is not None
    ):  # Input(shape=(None,)): no numbers to check these by
        past, rows, slots, shapes[-1] = None, None, None, None
    check_call(config, *shapes, past=past, slots=slots, rows=rows)
    if input_ids is not None and eager:
        check_tokens(config, int(ops.min(input_ids)), int(ops.max(input_ids)))
    return ops.shape(inputs_embeds if input_ids is None else input_ids)[:2]


def columns(hidden_states: Tensor, logits_to_keep: int | Tensor, labels: Tensor | None) -> Tensor:
    """The hidden states whose logits are computed: the last so many, or the columns in a tensor; 0 for all."""
    every = isinstance(logits_to_keep, int) and logits_to_keep == 0
    if labels is not None and not every:
        raise ValueError("labels, logits_to_keep: found both; the loss needs the logits of every token")
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    return ops.take(hidden_states, logits_to_keep, axis=1)


def place(
    config: OPTConfig,
    B: Any,
    T: Any,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> tuple[Tensor, Tensor | None]:
    """Positions [B or 1, T] of the new tokens (padding is -1), and the segments [B, S]: the document of each slot,
    counted from 1, and 0 for padding and free slots (None: all is one document, and nothing padding).

    With `position_ids`, a document begins at each position 0 and wherever the position does not grow.
    """
    if attention_mask is None and position_ids is None and cache is None:
        if isinstance(T, int):
            check_positions(config, T - 1, "input_ids")
        return ops.arange(T)[None], None

    if cache is None:
        past, S, before = 0, T, ops.zeros((B, T), "int32")
    else:
        past, S, before = cache.length, cache.slots, cache.segments
    real = ops.ones((B, S), "int32")
    if attention_mask is not None:
        real = ops.slice_update(ops.zeros((B, S), "int32"), (0, 0), ops.cast(attention_mask != 0, "int32"))
    old, new = before * real, ops.slice(real, (0, past), (B, T))
    current = ops.maximum(ops.max(old, axis=1, keepdims=True), 1)
    if position_ids is None:
        documents = current
        seen = ops.sum(ops.cast(old == current, "int32"), axis=1, keepdims=True)
        positions = (seen + ops.cumsum(new, axis=1)) * new - 1
    else:
        positions = ops.cast(position_ids, "int32")
        starts = positions == 0
        fell = (positions[:, 1:] <= positions[:, :-1]) & (new[:, 1:] * new[:, :-1] != 0)
        starts = ops.concatenate([ops.broadcast_to(starts[:, :1], (B, 1)), starts[:, 1:] | fell], axis=1)
        documents = current + ops.cumsum(ops.cast(starts, "int32"), axis=1)
    if tf.executing_eagerly():
        name = "input_ids" if position_ids is None else "position_ids"
        check_positions(config, int(ops.max(positions)), name, int(ops.min(positions)))
    return positions, ops.slice_update(old, (0, past), new * documents)
