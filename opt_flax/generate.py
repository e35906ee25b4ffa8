"""Text from a model: prefill, choose, then {step, choose} with the cache, all in one compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from opt_common.generation import Options, prompt

from .cache import KVCache
from .products import for_one_token, head

# Prompts and new tokens are padded to a multiple of so many columns, so that one program serves all lengths between.
PROMPT_STEP, NEW_STEP = 32, 64


def generate(
    self: Any, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **options: Unpack[Options]
) -> Array:
    """Continue each row of `input_ids` [B, T]; returns [B, T + new], the prompts included.

    attention_mask: [B, T], 0 for padding on either side. Default: everything that is not the config's `pad_token_id`.
    options: see `opt_common.generation.Options`.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is off.
    """
    given = prompt(self.config, input_ids, attention_mask, options, self.generation_config)
    ids, settings = given.ids, given.settings
    left = ((0, 0), (-ids.shape[1] % PROMPT_STEP, 0))
    tokens, length = _generate(
        self,
        np.pad(ids, left, constant_values=settings.pad_token_id).astype(np.int32),
        np.pad(given.mask, left),
        jax.random.key(settings.seed),
        Limits(
            settings.max_new_tokens,
            settings.min_new_tokens,
            settings.temperature,
            settings.top_p,
            np.array(settings.eos_token_ids, np.int32),
            settings.pad_token_id,
        ),
        room=settings.max_new_tokens + -settings.max_new_tokens % NEW_STEP,
        do_sample=settings.do_sample,
        top_k=settings.top_k if settings.do_sample else 0,
        nucleus=settings.do_sample and settings.top_p < 1,
    )
    # numpy: for jax every length would be one more program
    return jnp.asarray(np.concatenate([ids, np.asarray(tokens)[:, : int(length)].astype(ids.dtype)], axis=1))


class Limits(NamedTuple):
    """The settings that are arguments of the compiled program: another value needs no other program."""

    max_new_tokens: ArrayLike
    min_new_tokens: ArrayLike
    temperature: ArrayLike
    top_p: ArrayLike
    eos_token_ids: ArrayLike
    pad_token_id: ArrayLike


class State(NamedTuple):
    """What the loop carries: tokens [B, room], of which `step` are chosen; which rows are done [B]; and the cache of
    all tokens but the last."""

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

    stepper = for_one_token(model) if B == 1 else model

    def write(logits: Array, state: State, cache: KVCache) -> State:
        token = choose(logits, state.step, key=jax.random.fold_in(key, state.step))
        token = jnp.where(state.done, limits.pad_token_id, token)
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1)
        return State(state.step + 1, tokens, state.done | is_eos[token], cache)

    def unfinished(state: State) -> Array:
        return (state.step < limits.max_new_tokens) & ~state.done.all()

    def advance(state: State) -> State:
        token = lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1)  # [B, 1]
        out = stepper(token, past_key_values=state.cache)
        return write(out.logits[:, -1], state, out.past_key_values)

    out = model.model(input_ids, mask, past_key_values=model.init_cache(B, T + room))
    last = T - 1 - mask[:, ::-1].argmax(axis=1)  # the rightmost real token of each row
    logits = head(model, out.last_hidden_state[jnp.arange(B), last])  # [B, V]
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
