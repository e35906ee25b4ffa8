"""The arguments of a call: checked, and where its tokens stand, their positions and the document each belongs to.

B batch   T new tokens   S slots: all of a cache, or T without one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from tensorflow import Tensor

from opt_common import inputs
from opt_common.config import OPTConfig
from opt_common.inputs import (
    KINDS,
    array,
    check_cache,
    check_call,
    check_dtype,
    check_kind,
    check_positions,
    check_tokens,
    kind,
)

from .cache import KVCache, past_length

# Arguments of transformers' models that have no effect on an OPT's, there and here.
_NO_EFFECT = {"token_type_ids", "cache_position"}
_SETTINGS = {"output_attentions", "output_hidden_states"}
_ARRAYS = (tf.Tensor, tf.Variable, np.ndarray, keras.KerasTensor, keras.Variable)


def as_raised(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the errors of a check keep their one sentence: Keras would write all arguments of the layer around it."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            error._keras_call_info_injected = True  # type: ignore[attr-defined]
            raise

    return call


check_labels, check_spans = map(as_raised, (inputs.check_labels, inputs.check_spans))


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name. As in transformers, they may come in one dictionary, or in one list in the order
    of `names`; the cache as a tuple of each layer's keys and values, also in front of the mask. Raises TypeError for
    unknown ones, and ValueError for other kinds of numbers than `opt_common.inputs.KINDS` says."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    first = given.get("input_ids")
    if isinstance(first, Mapping):
        given |= {"input_ids": None, **first}
    elif isinstance(first, (list, tuple)):
        several = all(x is None or isinstance(x, _ARRAYS) for x in first)
        given |= dict(zip(names, first, strict=False)) if several else {}
    mask, past = given.get("attention_mask"), given.get("past_key_values")
    if isinstance(mask, (KVCache, tuple)) or isinstance(past, _ARRAYS):
        given["attention_mask"], given["past_key_values"] = past, mask
    if isinstance(given.get("past_key_values"), (tuple, list)):
        given["past_key_values"] = KVCache.of(given["past_key_values"])
    if any(isinstance(x, keras.KerasTensor) for x in given.values()):
        given.setdefault("use_cache", False)  # a functional model has the same outputs in training
    _check_names(given.keys() - {*names, "head_mask", "return_dict"})
    return {name: _tensor(name, x) for name, x in given.items() if name not in _NO_EFFECT}


def _check_names(names: set[str]) -> None:
    if unknown := names - _NO_EFFECT - _SETTINGS:
        raise TypeError(f"found unknown arguments {', '.join(sorted(unknown))}")


def _tensor(name: str, x: Any) -> Any:
    """An argument of a call, of a type that goes on. Raises ValueError, naming it, for other kinds of numbers."""
    if name not in KINDS or x is None:
        return np.asarray(x) if isinstance(x, list) else x
    if isinstance(x, tf.Variable):
        x = tf.convert_to_tensor(x)
    elif not isinstance(x, _ARRAYS):
        x = array(name, x)
    letter, _ = kind(x.dtype)
    if name == "input_ids" and letter == "f" and (isinstance(x, keras.KerasTensor) or _of_keras()):
        return _whole(x)
    if name != "labels":
        check_kind(name, x.dtype)
    return x


def _of_keras() -> bool:
    """Whether Keras is calling: a layer or model around this one, or what finds out an output's shape."""
    return in_symbolic_scope() or get_global_attribute("current_call_ctx") is not None


def _whole(ids: Any) -> Any:
    """Token ids that Keras has made float32: it does so to an Input of no given dtype, and where it builds a model."""
    dtype = keras.backend.standardize_dtype(ids.dtype)
    if dtype in ("float16", "bfloat16"):
        raise ValueError(f"input_ids: found {dtype}, which does not hold every token id, wanted int32")
    there = tf.executing_eagerly() and not isinstance(ids, keras.KerasTensor)
    if there and not np.array_equal(ids, np.round(ids)):
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
    _check_names({*kwargs})
    attentions, hidden_states = (
        getattr(config, name) if kwargs.get(name) is None else kwargs[name] for name in sorted(_SETTINGS)
    )
    if use_cache is None:
        use_cache = config.use_cache and not training
    return Wanted(bool(use_cache), attentions, hidden_states)


@as_raised
def check(
    config: OPTConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: KVCache | None,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Any, Any, Any]:
    """Check the arguments of a call and return input_ids as [B, T], B and T: numbers, or scalar tensors where they are
    not known yet. As in transformers' PyTorch, ids may come as [T] or with more dimensions than two. Raises ValueError
    that names the argument."""
    if not (cache is None or isinstance(cache, KVCache)):
        raise ValueError(f"past_key_values: found {type(cache).__name__}, wanted a KVCache")
    if input_ids is not None:
        check_dtype(config, "input_ids", input_ids.dtype)
        if input_ids.dtype == "uint64" and tf.executing_eagerly():  # int64 shows the largest as negative
            check_tokens(config, 0, int(np.max(input_ids, initial=0)))
        input_ids = integers(input_ids)
        if len(input_ids.shape) not in (0, 2) and 0 not in input_ids.shape:
            input_ids = tf.reshape(input_ids, (-1, ops.shape(input_ids)[-1]))
    eager, given = tf.executing_eagerly(), (input_ids, inputs_embeds, attention_mask, position_ids)
    shapes = [None if x is None else tuple(x.shape) for x in given]
    past = past_length(cache)
    past = int(past) if eager or isinstance(past, int) else None
    rows, slots = (None, None) if cache is None else (cache.rows, cache.slots)
    if any(None in shape for shape in shapes if shape is not None):  # no numbers to check these by
        past, rows, slots, shapes[-1] = None, None, None, None
    check_call(config, *shapes, past=past, slots=slots if isinstance(slots, int) else None, rows=rows)
    if cache is not None and cache.k:
        *first, _, width = cache.k[0].shape
        heads = first[1] if len(first) == 2 else first[0] // rows if first[0] and rows else None
        check_cache(config, len(cache), heads, width)
    if input_ids is not None and eager:
        check_tokens(config, int(ops.min(input_ids)), int(ops.max(input_ids)))
    return (input_ids, *ops.shape(inputs_embeds if input_ids is None else input_ids)[:2])


def integers(x: Tensor) -> Tensor:
    """Integers of a type that TensorFlow's operations take, and that holds them all."""
    return ops.cast(x, "int64" if x.dtype in ("uint32", "int64", "uint64") else "int32")


@as_raised
def columns(hidden_states: Tensor, logits_to_keep: int | Tensor, labels: Tensor | None) -> Tensor:
    """The hidden states whose logits are computed: the last so many, or the columns in a tensor; 0 for all."""
    every = isinstance(logits_to_keep, int) and logits_to_keep == 0
    if labels is not None and not every:
        raise ValueError("labels, logits_to_keep: found both; the loss needs the logits of every token")
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    return ops.take(hidden_states, logits_to_keep, axis=1)


@as_raised
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
        position_ids = integers(position_ids)
        positions = ops.cast(position_ids, "int32")
        starts = positions == 0
        fell = (positions[:, 1:] <= positions[:, :-1]) & (new[:, 1:] * new[:, :-1] != 0)
        starts = ops.concatenate([ops.broadcast_to(starts[:, :1], (B, 1)), starts[:, 1:] | fell], axis=1)
        documents = current + ops.cumsum(ops.cast(starts, "int32"), axis=1)
    if tf.executing_eagerly():
        name = "input_ids" if position_ids is None else "position_ids"
        known = positions if position_ids is None else position_ids  # which may be int64
        check_positions(config, int(ops.max(known)), name, int(ops.min(known)))
    return positions, ops.slice_update(old, (0, past), new * documents)
