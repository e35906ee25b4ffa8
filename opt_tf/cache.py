"""The key-value cache.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import optree
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig


@dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of past tokens: a value, passed to a call and returned by it with the new tokens written.

    `KVCache()` grows: each call returns one with as many slots as there are tokens. One of `empty` keeps its size, and
    a program compiled for it serves every call.

    k, v: a tensor a layer, [B, N, S, D] if it grows, else [B·N, S, D]: XLA's products read this without a copy.
    length: how many slots are taken, an int32 scalar; every row takes the same ones. None: all, and it grows.
    segments: [B, S] int32, the document each slot belongs to, counted from 1; 0 is padding, or a slot not taken. None:
        all are 1.
    """

    k: tuple[Tensor, ...] = ()
    v: tuple[Tensor, ...] = ()
    length: Tensor | None = None
    segments: Tensor | None = None

    @classmethod
    def empty(cls, config: OPTConfig, batch: Any, slots: int, dtype: str) -> KVCache:
        """A cache of `batch` rows (a number, or a scalar tensor where it is not known yet) with nothing in it."""
        shape = (batch * config.num_attention_heads, slots, config.head_dim)
        k, v = (tuple(ops.zeros(shape, dtype) for _ in range(config.num_hidden_layers)) for _ in "kv")
        return cls(k, v, ops.zeros((), "int32"), ops.zeros((batch, slots), "int32"))

    @classmethod
    def of(cls, layers: Any) -> KVCache:
        """A cache that grows, of each layer's keys and values [B, N, S, D], as transformers' TensorFlow has them.
        Raises ValueError for anything else."""
        if any(len(getattr(x, "shape", ())) != 4 for x in tf.nest.flatten(layers)):
            raise ValueError("past_key_values: found something else, wanted keys and values [B, N, S, D] of each layer")
        return cls(*(tuple(ops.convert_to_tensor(layer[i]) for layer in layers) for i in (0, 1)))

    @property
    def rows(self) -> int | None:
        """The number of rows, B; None while it is unknown."""
        return (self.k[0] if self.segments is None else self.segments).shape[0] if self.k else None

    @property
    def slots(self) -> Any:
        """The number of slots, S, a scalar tensor where it is not known yet; None if the cache grows."""
        return None if self.length is None else ops.shape(self.segments)[1]

    def _replace(self, **fields: Any) -> KVCache:
        return replace(self, **fields)

    # What transformers' caches do, by the same names

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """How many slots are taken; a scalar tensor where that is not known yet."""
        if self.length is not None:
            return self.length
        return ops.shape(self.k[0])[2] if self.k else 0

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.k)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The keys and values [B, N, length, D] of a layer."""
        k, v = self.k[layer_idx], self.v[layer_idx]
        if self.length is None:
            return k, v
        (B, _), (R, _, D) = ops.shape(self.segments), ops.shape(k)
        return tuple(ops.reshape(x[:, : self.length], (B, R // B, self.length, D)) for x in (k, v))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys and values of each layer."""
        return (self[layer_idx] for layer_idx in range(len(self)))

    # As TensorFlow's functions over nested structures (loops, tf.function) take it apart and put it together

    def __tf_flatten__(self) -> tuple[tuple[bool, bool], tuple[Any, ...]]:
        rest = tuple(x for x in (self.length, self.segments) if x is not None)
        return (self.length is not None, self.segments is not None), (self.k, self.v, rest)

    @classmethod
    def __tf_unflatten__(cls, there: tuple[bool, bool], parts: tuple[Any, ...]) -> KVCache:
        k, v, rest = parts
        rest = list(rest)
        length, segments = (rest.pop(0) if is_there else None for is_there in there)
        return cls(tuple(k), tuple(v), length, segments)


class CacheWriter:
    """The cache during one call: layers write to it, then `advance` gives the cache for the next call. Keras, which
    copies the structures among a layer's arguments, passes it on as it is."""

    def __init__(self, cache: KVCache) -> None:
        self.k, self.v, self.length = dict(enumerate(cache.k)), dict(enumerate(cache.v)), cache.length

    def update(self, k: Tensor, v: Tensor, layer_idx: int, view: Any = None) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, N, T, D] of a layer behind the past ones; return all slots, [B, N, S, D] or
        [B·N, S, D], or without a view, which would hide the free ones, those taken."""
        if self.length is None:
            if layer_idx in self.k:
                k, v = tf.concat([self.k[layer_idx], k], axis=2), tf.concat([self.v[layer_idx], v], axis=2)
            self.k[layer_idx], self.v[layer_idx] = k, v
            return k, v
        B, N, T, D = ops.shape(k)
        for slots, new in ((self.k, k), (self.v, v)):
            slots[layer_idx] = _write(slots[layer_idx], ops.reshape(new, (B * N, T, D)), self.length)
        end = self.length + T if view is None else None
        return self.k[layer_idx][:, :end], self.v[layer_idx][:, :end]

    def advance(self, tokens: Any, segments: Tensor | None) -> KVCache:
        """The cache with the new tokens of this call as past, and the document of each slot, `segments` [B, S]."""
        layers = sorted(self.k)
        length = None if self.length is None else self.length + tokens
        return KVCache(tuple(self.k[i] for i in layers), tuple(self.v[i] for i in layers), length, segments)


def past_length(cache: KVCache | None) -> Any:
    """How many tokens a cache holds; 0 if there is none."""
    return 0 if cache is None else cache.get_seq_length()


@tf.custom_gradient
def _write(old: Tensor, new: Tensor, length: Tensor) -> Any:
    start = (0, length, 0)

    def gradient(upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # XLA's operation has none in TensorFlow
        there = tf.slice(upstream, start, tf.shape(new))
        return ops.slice_update(upstream, start, tf.zeros_like(new)), there, None

    return ops.slice_update(old, start, new), gradient


def _flatten(cache: KVCache) -> tuple[tuple[Any, ...], tuple[bool, bool], None]:
    there, parts = cache.__tf_flatten__()
    return parts, there, None


with suppress(ValueError):  # registered before: this module is being imported again
    optree.register_pytree_node(KVCache, _flatten, KVCache.__tf_unflatten__, namespace="keras")  # Keras's functions
