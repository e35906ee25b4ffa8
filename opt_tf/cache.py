"""The key-value cache, and where the tokens of a call stand: their positions and which slots each may look at.

B batch   T new tokens   S slots   t, s of a block of them   N heads   D head width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import check_positions

# A long call is computed in blocks of tokens, each with the slots up to its last one: of 4 blocks, 3/8 of the scores
# are never computed; of 8, 7/16, in a larger program. A block has at least FEWEST tokens.
BLOCKS, FEWEST = 4, 64


class KVCache(NamedTuple):
    """Keys and values of past tokens: a value, passed to a call and returned by it with the new tokens written.

    k, v: a [B·N, S, D] tensor a layer; S is fixed when the cache is made. XLA's products read this without a copy; of
        [B, N, S, D] they make one if B is 1, of [B, S, N, D] always.
    length: how many slots are taken, an int32 scalar; every row takes the same ones.
    segments: [B, S] int32, the document each slot belongs to, counted from 1; 0 is padding, or a slot not taken.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    length: Tensor
    segments: Tensor

    @classmethod
    def empty(cls, config: OPTConfig, batch: Any, slots: int, dtype: str) -> KVCache:
        """A cache of `batch` rows (a number, or a scalar tensor where it is not known yet) with nothing in it."""
        shape = (batch * config.num_attention_heads, slots, config.head_dim)
        k, v = (tuple(ops.zeros(shape, dtype) for _ in range(config.num_hidden_layers)) for _ in "kv")
        return cls(k, v, ops.zeros((), "int32"), ops.zeros((batch, slots), "int32"))

    @property
    def slots(self) -> int:
        return self.segments.shape[1]


def update(past: tuple[Tensor, Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write the new keys and values [B·N, T, D] of a layer behind the past ones; return all slots, [B·N, S, D].
    `past` is the layer's k and v and the cache's length."""
    old_k, old_v, length = past
    return _write(old_k, k, length), _write(old_v, v, length)


@tf.custom_gradient
def _write(old: Tensor, new: Tensor, length: Tensor) -> Any:
    start = (0, length, 0)

    def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # XLA's operation has none in TensorFlow
        there = tf.slice(upstream, start, tf.shape(new))
        return ops.slice_update(upstream, start, tf.zeros_like(new)), there, None

    return ops.slice_update(old, start, new), gradient


def place(
    config: OPTConfig,
    B: Any,
    T: Any,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
    """Positions [B or 1, T] of the new tokens (padding is -1), the boolean masks [B or 1, 1, t, s] of what each may
    attend to, one for every t of them, of the first s slots (none of the t sees more), and the segments [B, S]
    (None: all one document). B and T are numbers, or scalar tensors.

    A token attends to the earlier tokens of its own segment. Segment 0 is padding, which so attends to padding alone:
    no row of a mask is empty, and nothing real sees it. With `position_ids`, a document begins at each position 0
    and wherever the position does not grow.

    The number of past tokens may be a tensor, so everything is as wide as the cache; causality hides the free slots.
    """
    if attention_mask is None and position_ids is None and cache is None:
        if isinstance(T, int):
            check_positions(config, T - 1, "input_ids")
        slots = ops.arange(T)
        return slots[None], _blocks((slots[:, None] >= slots)[None, None], 0), None

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

    new = new * documents
    segments = ops.slice_update(old, (0, past), new)
    slots = ops.arange(S)
    mask = (past + ops.arange(T)[:, None] >= slots) & (new[:, :, None] == segments[:, None, :])
    return positions, _blocks(mask[:, None], tf.get_static_value(past) if cache is not None else 0), segments


def _blocks(mask: Tensor, past: int | None) -> tuple[Tensor, ...]:
    """The mask [B or 1, 1, T, S] in at most BLOCKS parts of the T, each without the slots behind its last token; whole
    where T or the number of past tokens is not known yet."""
    T = mask.shape[2]
    if T is None or past is None:
        return (mask,)
    t = max(-(-T // BLOCKS), FEWEST)
    return tuple(mask[:, :, first : first + t, : past + min(first + t, T)] for first in range(0, T, t))
