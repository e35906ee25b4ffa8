"""The arguments of a call: checked, and where its tokens stand, their positions and the document each belongs to.

B batch   T new tokens   S slots: T, or all of a cache
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from opt_common.config import OPTConfig
from opt_common.inputs import check_call, check_positions, check_tokens

from .cache import KVCache

# Arguments of transformers' models that have no effect on an OPT's, there and here.
_NO_EFFECT = {"token_type_ids", "head_mask", "cache_position"}


class Wanted(NamedTuple):
    """What a call returns besides its result."""

    cache: bool
    attentions: bool
    hidden_states: bool


def wanted(decoder: Any, use_cache: bool | None, kwargs: dict[str, Any]) -> Wanted:
    """The settings of a call, the config's where it gives none: all but use_cache, since a new cache has all its slots
    from the start. Raises TypeError for unknown arguments."""
    config = decoder.config
    names = ("output_attentions", "output_hidden_states")
    if unknown := kwargs.keys() - _NO_EFFECT - {*names}:
        raise TypeError(f"found unknown arguments {', '.join(sorted(unknown))}")
    attentions, hidden_states = (getattr(config, name) if kwargs.get(name) is None else kwargs[name] for name in names)
    return Wanted(bool(use_cache), attentions, hidden_states)


def check(
    config: OPTConfig,
    input_ids: ArrayLike | None,
    attention_mask: ArrayLike | None,
    cache: KVCache | None,
    inputs_embeds: ArrayLike | None,
    use_cache: bool,
    position_ids: ArrayLike | None,
) -> tuple[int, int]:
    """Check the arguments of a call and return (B, T). Raises ValueError that names the argument."""
    past = 0 if cache is None else cache.length
    mask = None if attention_mask is None else jnp.shape(attention_mask)
    if cache is not None and mask == (cache.rows, cache.slots):
        mask = None  # as wide as the cache, it fits every step
    B, T = check_call(
        config,
        *(None if x is None else jnp.shape(x) for x in (input_ids, inputs_embeds)),
        attention_mask=mask,
        position_ids=None if position_ids is None else jnp.shape(position_ids),
        past=None if isinstance(past, Tracer) else int(past),
        slots=cache.slots if cache is not None else config.max_position_embeddings if use_cache else None,
        rows=None if cache is None else cache.rows,
    )
    if cache is not None and len(cache.k[0]) != B * config.num_attention_heads:
        raise ValueError(
            f"past_key_values: found {len(cache.k[0])} rows of keys, wanted {B} times {config.num_attention_heads} "
            "heads; in a cache of prepare_inputs_for_generation, axis 0 of each array is the row"
        )
    if input_ids is not None and not isinstance(input_ids, Tracer):
        ids = np.asarray(input_ids)
        check_tokens(config, int(ids.min()), int(ids.max()))
    return B, T


def columns(logits_to_keep: int | ArrayLike, labels: ArrayLike | None) -> slice | ArrayLike:
    """The columns whose logits are computed: the last so many, or those in an array; 0 for all."""
    keep = logits_to_keep if jnp.ndim(logits_to_keep) else slice(-int(logits_to_keep), None)  # type: ignore[arg-type]
    if labels is not None and not (isinstance(keep, slice) and keep == slice(0, None)):
        raise ValueError("labels, logits_to_keep: found both; the loss needs the logits of every token")
    return keep


def place(
    config: OPTConfig,
    B: int,
    T: int,
    attention_mask: ArrayLike | None,
    position_ids: ArrayLike | None,
    cache: KVCache | None,
) -> tuple[Array, Array | None]:
    """Positions [B or 1, T] of the new tokens (padding is -1), and the segments [B, S]: the document of each slot,
    counted from 1, and 0 for padding, or for a slot not taken yet (None: all is one document, nothing padding or past).

    With `position_ids`, a document begins at each position 0 and wherever the position does not grow.
    """
    past, S = (0, T) if cache is None else (cache.length, cache.slots)
    slots = jnp.arange(S, dtype=jnp.int32)
    if attention_mask is None and position_ids is None and (cache is None or cache.is_empty):
        check_positions(config, T - 1, "input_ids")
        return slots[None, :T], None

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
