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
from opt_common.inputs import (
    array,
    check_cache,
    check_call,
    check_dtype,
    check_positions,
    check_tokens,
)

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
) -> tuple[Array | None, int, int]:
    """Check the arguments of a call and return input_ids as [B, T], B and T. As in transformers' PyTorch, ids may come
    as [T] or with more dimensions than two. Raises ValueError that names the argument."""
    if not (cache is None or isinstance(cache, KVCache)):
        raise ValueError(f"past_key_values: found {type(cache).__name__}, wanted a KVCache")
    given = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
    }
    known: Any = {n: x if hasattr(x, "dtype") else array(n, x) for n, x in given.items() if x is not None}
    for name, x in known.items():
        check_dtype(config, name, x.dtype)
    ids = known.get("input_ids")
    if ids is not None and ids.ndim not in (0, 2) and ids.size:
        ids = known["input_ids"] = ids.reshape(-1, ids.shape[-1])
    shapes = {name: x.shape for name, x in known.items()}
    past = 0 if cache is None else cache.length
    if cache is not None and shapes.get("attention_mask") == (cache.rows, cache.slots):
        del shapes["attention_mask"]  # as wide as the cache, it fits every step
    B, T = check_call(
        config,
        **{"input_ids": None, "inputs_embeds": None} | shapes,
        past=None if isinstance(past, Tracer) else int(past),
        slots=cache.slots if cache is not None else config.max_position_embeddings if use_cache else None,
        rows=None if cache is None else cache.rows,
    )
    if cache is not None:
        rows, _, width = cache.k[0].shape
        if rows % B or rows == B < B * config.num_attention_heads:
            raise ValueError(
                f"past_key_values: found {rows} rows of keys, wanted {B} times {config.num_attention_heads} heads; in "
                "a cache of prepare_inputs_for_generation, axis 0 of each array is the row"
            )
        check_cache(config, len(cache.k), rows // B, width)
    if ids is not None and not isinstance(ids, Tracer):
        known_ids = np.asarray(ids)
        check_tokens(config, int(known_ids.min()), int(known_ids.max()))
    return None if ids is None else jnp.asarray(ids), B, T


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
        attention_mask = jnp.asarray(attention_mask)
        rows, columns = attention_mask.shape
        if rows != B or not T <= columns <= S:
            raise ValueError(f"attention_mask: found shape {[rows, columns]}, wanted [{B}, {T} to {S}]")
        real = jnp.pad((attention_mask != 0).astype(jnp.int32), ((0, 0), (0, S - columns)))

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
        # numpy: under jit, what jax computes from a number is traced; as given: jax makes int32 of int64
        known = np.asarray(positions if position_ids is None else position_ids)
        check_positions(config, int(known.max()), name, int(known.min()))
    return positions, lax.dynamic_update_slice_in_dim(old, numbers, past, axis=1)
