"""The key-value cache.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig


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
    def slots(self) -> Any:
        return ops.shape(self.segments)[1]


class CacheWriter:
    """The cache during one call: layers write to it, then `advance` gives the cache for the next call. Keras, which
    copies the structures among a layer's arguments, passes it on as it is."""

    def __init__(self, cache: KVCache) -> None:
        self.k, self.v, self.length = list(cache.k), list(cache.v), cache.length

    def update(self, k: Tensor, v: Tensor, layer_idx: int, view: Any = None) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B·N, T, D] of a layer behind the past ones; return all slots, [B·N, S, D], or
        without a view, which would hide the free ones, those taken."""
        end = self.length + ops.shape(k)[1]
        k = self.k[layer_idx] = _write(self.k[layer_idx], k, self.length)
        v = self.v[layer_idx] = _write(self.v[layer_idx], v, self.length)
        return (k[:, :end], v[:, :end]) if view is None else (k, v)

    def advance(self, tokens: Any, segments: Tensor) -> KVCache:
        """The cache with the new tokens of this call as past, and the document of each slot, `segments` [B, S]."""
        return KVCache(tuple(self.k), tuple(self.v), self.length + tokens, segments)


@tf.custom_gradient
def _write(old: Tensor, new: Tensor, length: Tensor) -> Any:
    start = (0, length, 0)

    def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # XLA's operation has none in TensorFlow
        there = tf.slice(upstream, start, tf.shape(new))
        return ops.slice_update(upstream, start, tf.zeros_like(new)), there, None

    return ops.slice_update(old, start, new), gradient
