"""Text from a model: prefill, choose, then {step, choose} with the cache, all of it one compiled program."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from opt_common.generation import check_generate
from opt_common.inputs import check_call, check_tokens

from .cache import KVCache

# Prompts and new tokens take up a multiple of so many columns: one program serves all the lengths between.
PROMPT_STEP, NEW_STEP = 32, 64


def generate(
    self: Any,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Array:
    """Continue each row of `input_ids` [B, T]; returns [B, T + new], the prompts included.

    attention_mask: [B, T], 0 for padding on either side. Default: everything that is not `pad_token_id`.
    max_new_tokens, or max_length, which counts the prompt too: when to stop at the latest. Default: max_length=20.
    min_new_tokens: no end of text before so many.
    do_sample: draw from the probabilities after temperature, then the top_k likeliest (0: all), then the fewest tokens
        that make up top_p; otherwise take the likeliest token. `seed` makes the draw repeatable.
    eos_token_id: the end of a row, one id or several; the rest of the row is `pad_token_id`. Default: the config's.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is off.
    """
    ids = np.asarray(input_ids)
    B, T = check_call(self.config, ids.shape, None, None if attention_mask is None else np.shape(attention_mask))
    check_tokens(self.config, int(ids.min()), int(ids.max()))
    if attention_mask is None and self.config.pad_token_id is not None:
        attention_mask = ids != self.config.pad_token_id
    mask = np.ones((B, T), bool) if attention_mask is None else np.asarray(attention_mask) != 0
    counts = mask.sum(axis=1)
    settings = check_generate(
        self.config,
        T,
        int(counts.max()),
        int(counts.min()),
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        min_new_tokens=min_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    left = ((0, 0), (-T % PROMPT_STEP, 0))
    tokens, length = _generate(
        self,
        np.pad(ids, left, constant_values=settings.pad_token_id).astype(np.int32),
        np.pad(mask, left),
        jax.random.key(secrets.randbits(32) if seed is None else seed),
        Limits(
            settings.max_new_tokens,
            settings.min_new_tokens,
            settings.temperature,
            settings.top_p,
            np.array(settings.eos_token_ids, np.int32),
            settings.pad_token_id,
        ),
        room=settings.max_new_tokens + -settings.max_new_tokens % NEW_STEP,
        do_sample=do_sample,
        top_k=settings.top_k if do_sample else 0,
        nucleus=do_sample and settings.top_p < 1,
    )
    # numpy: for jax every length would be one more program
    return jnp.asarray(np.concatenate([ids, np.asarray(tokens)[:, : int(length)].astype(ids.dtype)], axis=1))


class Limits(NamedTuple):
    """The settings that are numbers in the compiled program; another value takes no other program."""

    max_new_tokens: ArrayLike
    min_new_tokens: ArrayLike
    temperature: ArrayLike
    top_p: ArrayLike
    eos_token_ids: ArrayLike
    pad_token_id: ArrayLike


class State(NamedTuple):
    """What the loop carries: tokens [B, room], of which `step` are chosen, which rows are done [B], and the cache of
    all but the last."""

    step: Array
    tokens: Array
    done: Array
    cache: KVCache


@partial(jax.jit, static_argnames=("room", "do_sample", "top_k", "nucleus"))
def _generate(
    model: Any,
    input_ids: Array,
    mask: Array,
    key: Array,
    limits: Limits,
    *,
    room: int,
    do_sample: bool,
    top_k: int,
    nucleus: bool,
) -> tuple[Array, Array]:
    """The new tokens [B, room] and how many of them the longest row has."""
    B, T = input_ids.shape
    is_eos = jnp.zeros(model.config.vocab_size, bool).at[limits.eos_token_ids].set(True)
    choose = partial(_choose, limits=limits, is_eos=is_eos, do_sample=do_sample, top_k=top_k, nucleus=nucleus)

    def write(logits: Array, state: State, cache: KVCache) -> State:
        token = choose(logits, state.step, key=jax.random.fold_in(key, state.step))
        token = jnp.where(state.done, limits.pad_token_id, token)
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        return State(state.step + 1, tokens, state.done | is_eos[token], cache)

    def unfinished(state: State) -> Array:
        return (state.step < limits.max_new_tokens) & ~state.done.all()

    def advance(state: State) -> State:
        token = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)  # [B, 1]
        out = model(token, past_key_values=state.cache)
        return write(out.logits[:, -1], state, out.past_key_values)

    out = model.model(input_ids, mask, past_key_values=model.init_cache(B, T + room))
    last = T - 1 - mask[:, ::-1].argmax(axis=1)  # the rightmost real token of each row
    logits = model.head(out.last_hidden_state[jnp.arange(B), last])  # [B, V]
    blank = jnp.full((B, room), limits.pad_token_id, jnp.int32)
    state = State(jnp.zeros((), jnp.int32), blank, jnp.zeros(B, bool), out.past_key_values)
    state = lax.while_loop(unfinished, advance, write(logits, state, out.past_key_values))
    return state.tokens, state.step


def _choose(
    logits: Array, step: Array, *, key: Array, limits: Limits, is_eos: Array, do_sample: bool, top_k: int, nucleus: bool
) -> Array:
    """The next token of each row, [B], from its logits [B, V]."""
    logits = logits.astype(jnp.float32)
    logits = jnp.where(is_eos & (step < limits.min_new_tokens), -jnp.inf, logits)
    if not do_sample:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / limits.temperature
    if top_k:
        logits = jnp.where(logits < lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if nucleus:
        order = logits.argsort(axis=-1, descending=True)
        ordered = jnp.take_along_axis(logits, order, axis=-1)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        tail = probabilities.cumsum(axis=-1) - probabilities >= limits.top_p  # what came before is already enough
        logits = jnp.put_along_axis(logits, order, jnp.where(tail, -jnp.inf, ordered), axis=-1, inplace=False)
    return jax.random.categorical(key, logits).astype(jnp.int32)
