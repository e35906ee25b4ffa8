"""The key-value cache, and where the tokens of a call stand: their positions and which slots each may look at.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from opt_common.config import OPTConfig
from opt_common.inputs import check_positions


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
        shape = (batch * config.num_attention_heads, slots, config.head_dim)
        k = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
        v = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
        with jax.ensure_compile_time_eval():  # under jit it is a number, not traced
            length = jnp.zeros((), jnp.int32)
        return cls(k, v, length, jnp.zeros((batch, slots), jnp.int32))

    @property
    def slots(self) -> int:
        return self.segments.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether no slot is taken; False where that is not known yet."""
        return not isinstance(self.length, Tracer) and int(self.length) == 0

    def update(self, layer: int, k: Array, v: Array) -> KVCache:
        """With the new keys and values [N·B, T, D] of a layer behind the past ones.
        `length` moves on once a call, when all layers are done."""
        k = lax.dynamic_update_slice_in_dim(self.k[layer], k, self.length, axis=1)
        v = lax.dynamic_update_slice_in_dim(self.v[layer], v, self.length, axis=1)
        return self._replace(
            k=(*self.k[:layer], k, *self.k[layer + 1 :]),
            v=(*self.v[:layer], v, *self.v[layer + 1 :]),
        )


def place(
    config: OPTConfig,
    B: int,
    T: int,
    attention_mask: ArrayLike | None,
    position_ids: ArrayLike | None,
    cache: KVCache | None,
) -> tuple[Array, Array]:
    """Positions [B or 1, T] of the new tokens (padding is -1), and the segments [B, S]: the document of each slot,
    counted from 1, and 0 for padding, or for a slot not taken yet.

    With `position_ids`, a document begins at each position 0 and wherever the position does not grow.
    """
    past, S = (0, T) if cache is None else (cache.length, cache.slots)
    slots = jnp.arange(S, dtype=jnp.int32)
    empty = cache is None or cache.is_empty
    if attention_mask is None and position_ids is None and empty:
        check_positions(config, T - 1, "input_ids")
        return slots[None, :T], jnp.broadcast_to(slots < T, (B, S)).astype(jnp.int32)

    before = jnp.zeros((B, S), jnp.int32) if cache is None else cache.segments
    real = jnp.ones((B, S), jnp.int32)
    if attention_mask is not None:
        # under jit `length` is not a number to check against; a mask as wide as the cache then serves every step
        rows, columns = jnp.shape(attention_mask)
        if rows != B or not T <= columns <= S:
            raise ValueError(f"attention_mask: found shape {[rows, columns]}, wanted [{B}, {T} to {S}]")
        real = jnp.pad((jnp.asarray(attention_mask) != 0).astype(jnp.int32), ((0, 0), (0, S - columns)))

    old = jnp.where(slots < past, real * before, 0)
    new = lax.dynamic_slice_in_dim(real, past, T, axis=1)
    current = jnp.maximum(old.max(axis=1, keepdims=True), 1)
    if position_ids is None:
        numbers = new * current
        seen = (old == current).sum(axis=1, keepdims=True, dtype=jnp.int32)
        positions = (seen + new.cumsum(axis=1, dtype=jnp.int32)) * new - 1
    else:
        positions = jnp.broadcast_to(jnp.asarray(position_ids, jnp.int32), (B, T))
        fell = (positions[:, 1:] <= positions[:, :-1]) & (new[:, 1:] & new[:, :-1]).astype(bool)
        starts = (positions == 0).at[:, 1:].max(fell)
        numbers = new * (current + starts.cumsum(axis=1, dtype=jnp.int32))
    if isinstance(positions, Tracer):
        # a full cache cannot raise here, and the new tokens would slide back over the past: let them find no position
        positions = jnp.where(past + T <= S, positions, config.max_position_embeddings)
    else:
        name = "input_ids" if position_ids is None else "position_ids"
        known = np.asarray(positions)  # numpy: under jit, what jax computes from a number is traced
        check_positions(config, int(known.max()), name, int(known.min()))
    return positions, lax.dynamic_update_slice_in_dim(old, numbers, past, axis=1)
