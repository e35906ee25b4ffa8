"""The arguments of a call: checked, and where its tokens stand, their positions and the document each belongs to.

B batch   T new tokens   S slots: all of a cache, or T without one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import check_call, check_positions, check_tokens

from .cache import KVCache, past_length

# Arguments of transformers' models that have no effect on an OPT's, there and here.
_NO_EFFECT = {"token_type_ids", "cache_position"}
_ARRAYS = (tf.Tensor, tf.Variable, np.ndarray, keras.KerasTensor, keras.Variable)


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. As in transformers, they may come in one dictionary, or in one list in the order
    of `names`; the cache as a tuple of each layer's keys and values, also in front of the mask."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    first = given.get("input_ids")
    if isinstance(first, Mapping):
        given |= {"input_ids": None, **first}
    elif isinstance(first, (list, tuple)):
        several = all(x is None or isinstance(x, _ARRAYS) for x in first)
        given |= dict(zip(names, first, strict=False)) if several else {"input_ids": np.asarray(first)}
    mask, past = given.get("attention_mask"), given.get("past_key_values")
    if isinstance(mask, (KVCache, tuple)) or isinstance(past, _ARRAYS):
        given["attention_mask"], given["past_key_values"] = past, mask
    if isinstance(given.get("past_key_values"), (tuple, list)):
        given["past_key_values"] = KVCache.of(given["past_key_values"])
    if given.get("input_ids") is not None:
        given["input_ids"] = whole(given["input_ids"])
    if any(isinstance(x, keras.KerasTensor) for x in given.values()):
        given.setdefault("use_cache", False)  # a functional model has the same outputs in training
    return {name: np.asarray(x) if isinstance(x, list) else x for name, x in given.items()}


def whole(ids: Any) -> Any:
    """Token ids as int32 or int64: an Input of no given dtype, and Keras where it builds a model, give float32."""
    ids = tf.convert_to_tensor(ids) if isinstance(ids, tf.Variable) else ids
    dtype = keras.backend.standardize_dtype(ids.dtype)
    if dtype in ("int32", "int64"):
        return ids
    if dtype in ("float16", "bfloat16"):
        raise ValueError(f"input_ids: found {dtype}, which does not hold every token id, wanted int32")
    there = tf.executing_eagerly() and not isinstance(ids, keras.KerasTensor)
    if "float" in dtype and there and not np.array_equal(ids, np.round(ids)):
        raise ValueError("input_ids: found fractions, wanted whole numbers")
    return ops.cast(ids, "int32")


class Wanted(NamedTuple):
    """What a call returns besides its result."""

    cache: bool
    attentions: bool
    hidden_states: bool


def wanted(decoder: Any, use_cache: bool | None, training: bool | None, kwargs: dict[str, Any]) -> Wanted:
    """The settings of a call, the config's where it gives none. Raises TypeError for unknown arguments."""
    config = decoder.config
    names = ("output_attentions", "output_hidden_states")
    if unknown := kwargs.keys() - _NO_EFFECT - {*names}:
        raise TypeError(f"found unknown arguments {', '.join(sorted(unknown))}")
    attentions, hidden_states = (getattr(config, name) if kwargs.get(name) is None else kwargs[name] for name in names)
    if use_cache is None:
        use_cache = config.use_cache and not training
    return Wanted(bool(use_cache), attentions, hidden_states)


def check(
    config: OPTConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Any, Any]:
    """Check the arguments of a call and return (B, T), numbers, or scalar tensors where they are not known yet. Raises
    ValueError that names the argument."""
    eager, given = tf.executing_eagerly(), (input_ids, inputs_embeds, attention_mask, position_ids)
    shapes = [None if x is None else tuple(x.shape) for x in given]
    past = past_length(cache)
    past = int(past) if eager or isinstance(past, int) else None
    rows, slots = (None, None) if cache is None else (cache.rows, cache.slots)
    if any(None in shape for shape in shapes if shape is not None):  # no numbers to check these by
        past, rows, slots, shapes[-1] = None, None, None, None
    check_call(config, *shapes, past=past, slots=slots if isinstance(slots, int) else None, rows=rows)
    if cache is not None and len(cache) not in (0, config.num_hidden_layers):
        raise ValueError(f"past_key_values: found {len(cache)} layers, wanted {config.num_hidden_layers}")
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
    past, before = past_length(cache), None if cache is None else cache.segments
    if attention_mask is None and position_ids is None and before is None:
        if isinstance(past, int) and isinstance(T, int):
            check_positions(config, past + T - 1, "input_ids")
        return past + ops.arange(T)[None], None

    if cache is None or cache.length is None:
        S = past + T
        before = ops.ones((B, past), "int32") if before is None else before
        before = ops.concatenate([before, ops.zeros((B, T), "int32")], axis=1)
    else:
        S = cache.slots
    real = ops.ones((B, S), "int32")
    if attention_mask is not None:
        real = ops.cast(ops.cast(attention_mask, "bool"), "int32")
        real = ops.slice_update(ops.zeros((B, S), "int32"), (0, 0), real)
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
