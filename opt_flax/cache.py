"""The key-value cache: a value, and what writes to it during a call.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import DTypeLike

from opt_common.config import OPTConfig

from .attention import Alignment, View


class KVCache(NamedTuple):
    """Keys and values of past tokens: a value, which a call takes and returns with the new tokens written. S is fixed.

    k, v: a [N·B, S, D] array a layer: of that shape XLA's loops read and write them without copies.
    length: how many slots are taken, an int32 scalar; every row takes the same ones.
    segments: [B, S] int32, the document each slot belongs to, counted from 1; 0 is padding, and a slot not taken yet.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    length: Array
    segments: Array

    @classmethod
    def empty(cls, config: OPTConfig, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
        """A cache of a fixed size in which no slot is taken."""
        shape = (batch * config.num_attention_heads, slots, config.head_dim)
        k = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
        v = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
        with jax.ensure_compile_time_eval():  # under jit it is a number, not traced
            length = jnp.zeros((), jnp.int32)
        return cls(k, v, length, jnp.zeros((batch, slots), jnp.int32))

    @property
    def rows(self) -> int:
        """The number of rows, B."""
        return self.segments.shape[0]

    @property
    def slots(self) -> int:
        """The number of slots, S, taken or not."""
        return self.segments.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether no slot is taken; False where that is not known yet."""
        return not isinstance(self.length, Tracer) and int(self.length) == 0

    def select(self, rows: Array) -> KVCache:
        """The cache of those rows, in that order."""

        def taken(x: Array) -> Array:
            return x.reshape(-1, self.rows, *x.shape[1:])[:, rows].reshape(-1, *x.shape[1:])

        k, v = (tuple(map(taken, layers)) for layers in (self.k, self.v))
        return KVCache(k, v, self.length, self.segments[rows])

    def between(self, start: int, end: int) -> KVCache:
        """The cache of those slots, which may be more than there are; `length` must be known."""

        def cut(x: Array) -> Array:
            x = x[:, start:end]
            return jnp.pad(x, ((0, 0), (0, end - start - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

        k, v = (tuple(map(cut, layers)) for layers in (self.k, self.v))
        return KVCache(k, v, self.length - start, cut(self.segments))


class Writer:
    """What the layers of one call write their keys and values to. `cache` is the value so far: the cache of the call
    with the keys and values of the layers that have run."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache

    def update(self, k: Array, v: Array, layer_idx: int | None, view: View = None) -> tuple[Array, Array]:
        """Write the new keys and values [N, B, T, D] of a layer behind the past ones; return all that `view` is about:
        [N, B, T, D] if there are none in the past, else [N, B, S, D].
        `length` moves on once a call, when all layers are done: `advance`."""
        if layer_idx is None:
            raise ValueError("layer_idx: found None, wanted the number of the layer in the cache")
        cache, new = self.cache, (k, v)
        if isinstance(view, Alignment):  # in the cache each token has the slot of its column
            back = view.back[None, :, :, None]
            new = jnp.take_along_axis(k, back, axis=2), jnp.take_along_axis(v, back, axis=2)
        all_k, all_v = (
            lax.dynamic_update_slice_in_dim(past[layer_idx], x.reshape(-1, *x.shape[2:]), cache.length, axis=1)
            for past, x in zip((cache.k, cache.v), new, strict=True)
        )
        self.cache = cache._replace(
            k=(*cache.k[:layer_idx], all_k, *cache.k[layer_idx + 1 :]),
            v=(*cache.v[:layer_idx], all_v, *cache.v[layer_idx + 1 :]),
        )
        if cache.is_empty:
            return k, v
        assert not isinstance(view, Alignment)
        if view is not None:
            S = jnp.shape(view)[-1]
        elif isinstance(cache.length, Tracer):
            raise ValueError("attention_mask: found None and a traced past_key_values, wanted a mask of its slots")
        else:
            S = int(cache.length) + k.shape[2]
        return tuple(x[:, :S].reshape(*k.shape[:2], S, -1) for x in (all_k, all_v))  # type: ignore[return-value]

    def advance(self, tokens: int, segments: Array | None) -> KVCache:
        """The cache with the new tokens of a call counted as past, and the documents [B, S] of all slots; None: the
        new tokens are the first, and all one document."""
        cache = self.cache
        if segments is None:
            segments = jnp.broadcast_to(jnp.arange(cache.slots) < tokens, cache.segments.shape).astype(jnp.int32)
        return cache._replace(length=cache.length + tokens, segments=segments)
