"""Text from a model: prefill, choose, then {step, choose} with the cache, all of it one compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Unpack

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.generation import Options, prompt

from .cache import KVCache

# Prompts and new tokens are padded to a multiple of so many columns, or half of it: one program serves the lengths
# between.
STEP = 64


def generate(
    self: Any,
    input_ids: Tensor | np.ndarray,
    attention_mask: Tensor | np.ndarray | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Continue each row of `input_ids` [B, T]; returns [B, T + new], the prompts included.

    attention_mask: [B, T], 0 for padding on either side. Default: everything that is not `pad_token_id`.
    options: see `opt_common.generation.Options`.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is off.
    """
    prompts = tf.convert_to_tensor(input_ids)
    given = prompt(self.config, prompts, attention_mask, options, self.generation_config)
    ids, mask, settings = given.ids, given.mask, given.settings
    # All padding goes to the left: every row then ends in its last token, and more padding changes nothing.
    order = np.argsort(mask, axis=1, kind="stable")[:, ids.shape[1] - int(mask.sum(axis=1).max()) :]
    ids, mask = (np.take_along_axis(x, order, axis=1).astype(np.int32) for x in (ids, mask))
    left = ((0, 0), (_columns(ids.shape[1]) - ids.shape[1], 0))
    tokens, length = _generate(
        self,
        [tf.convert_to_tensor(weight.value) for weight in self.weights],
        tf.constant(np.pad(ids, left)),
        tf.constant(np.pad(mask, left)),
        tf.constant(settings.seed % 2**63, tf.int64),
        Limits(
            tf.constant(settings.max_new_tokens),
            tf.constant(settings.min_new_tokens),
            tf.constant(settings.temperature),
            tf.constant(settings.top_p),
            tf.constant(settings.eos_token_ids, tf.int32),
            tf.constant(settings.pad_token_id),
        ),
        room=_columns(settings.max_new_tokens),
        do_sample=settings.do_sample,
        top_k=settings.top_k if settings.do_sample else 0,
        nucleus=settings.do_sample and settings.top_p < 1,
    )
    return tf.concat([prompts, tf.cast(tokens[:, : int(length)], prompts.dtype)], axis=1)


def _columns(n: int) -> int:
    return STEP // 2 if n <= STEP // 2 else n + -n % STEP


class Limits(NamedTuple):
    """The settings that are numbers in the compiled program; another value takes no other program."""

    max_new_tokens: Tensor
    min_new_tokens: Tensor
    temperature: Tensor
    top_p: Tensor
    eos_token_ids: Tensor
    pad_token_id: Tensor


class State(NamedTuple):
    """What the loop carries: tokens [B, room], of which `step` are chosen, which rows are done [B], and the cache of
    all but the last."""

    step: Tensor
    tokens: Tensor
    done: Tensor
    cache: KVCache


@tf.function(jit_compile=True, autograph=False)
def _generate(
    model: Any,
    weights: list[Tensor],
    input_ids: Tensor,
    mask: Tensor,
    seed: Tensor,
    limits: Limits,
    *,
    room: int,
    do_sample: bool,
    top_k: int,
    nucleus: bool,
) -> tuple[Tensor, Tensor]:
    """The new tokens [B, room] and how many of them the longest row has.

    `weights` are the model's: TensorFlow keeps every program for good, and one that took them from the model would
    keep them as well, long after the model is gone.
    """
    B, T = input_ids.shape
    choose = partial(_choose, seed=seed, limits=limits, do_sample=do_sample, top_k=top_k, nucleus=nucleus)

    def write(logits: Tensor, state: State, cache: KVCache) -> State:
        token = tf.where(state.done, limits.pad_token_id, choose(logits, state.step))
        tokens = ops.slice_update(state.tokens, (0, state.step), token[:, None])
        return State(state.step + 1, tokens, state.done | _among(token, limits.eos_token_ids), cache)

    def unfinished(state: State) -> Tensor:
        return (state.step < limits.max_new_tokens) & ~tf.reduce_all(state.done)

    def advance(state: State) -> tuple[State]:
        token = ops.slice(state.tokens, (0, state.step - 1), (B, 1))
        out = model(token, past_key_values=state.cache)
        return (write(out.logits[:, -1], state, out.past_key_values),)

    with keras.StatelessScope(state_mapping=zip(model.weights, weights, strict=True)):
        out = model(input_ids, mask, past_key_values=model.init_cache(B, T + room), logits_to_keep=1)
        blank = tf.fill((B, room), limits.pad_token_id)
        state = State(tf.constant(0), blank, tf.zeros(B, tf.bool), out.past_key_values)
        (state,) = tf.while_loop(unfinished, advance, (write(out.logits[:, -1], state, out.past_key_values),))
    return state.tokens, state.step


def _choose(
    logits: Tensor, step: Tensor, *, seed: Tensor, limits: Limits, do_sample: bool, top_k: int, nucleus: bool
) -> Tensor:
    """The next token of each row, [B], from its logits [B, V]."""
    V = logits.shape[-1]
    logits = tf.cast(logits, tf.float32)
    too_early = _among(tf.range(V), limits.eos_token_ids) & (step < limits.min_new_tokens)
    logits = tf.where(too_early, -np.inf, logits)
    if not do_sample:
        return tf.argmax(logits, axis=-1, output_type=tf.int32)
    logits = logits / limits.temperature
    order = None
    if top_k or nucleus:
        logits, order = tf.math.top_k(logits, top_k or V)  # the likeliest first
    if nucleus:
        before = tf.cumsum(tf.nn.softmax(logits), axis=-1, exclusive=True)
        logits = tf.where(before >= limits.top_p, -np.inf, logits)  # what came before is already enough
    # log p - log Exp(1) is largest where a draw from p would fall
    exponential = -tf.math.log(tf.random.stateless_uniform(tf.shape(logits), tf.stack([seed, tf.cast(step, tf.int64)])))
    token = tf.argmax(logits - tf.math.log(exponential), axis=-1, output_type=tf.int32)
    return token if order is None else tf.gather(order, token, batch_dims=1)


def _among(tokens: Tensor, some: Tensor) -> Tensor:
    return tf.reduce_any(tokens[:, None] == some, axis=1)
