"""Several tokens a pass: a draft of the next ones is read at once, and what would have been chosen anyway stays. So the
text is what it is without drafts; where it is drawn, the draft is drawn with the same random numbers.

One row   T columns of the prompt   W columns: T and those of new tokens   k drafted tokens   V vocabulary
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..cache import KVCache
from .choosing import Numbers, Plan, draw, process
from .loop import Given, begin


class Drafted(NamedTuple):
    """step: how many new tokens there are; ids: [1, W]; done: whether the text has ended; cache: of all tokens but the
    last. drafts: the assistant's cache, if there is one, of at least all tokens but the last two."""

    step: Array
    ids: Array
    done: Array
    cache: KVCache
    drafts: KVCache | None

    @property
    def texts(self) -> Array:
        """[1, W]."""
        return self.ids


@partial(jax.jit, static_argnames=("plan", "k"))
def run(model: Any, assistant: Any, given: Given, numbers: Numbers, longest: Any, *, plan: Plan, k: int) -> Drafted:
    """The text at its end. assistant: a model that drafts k tokens; None: they are looked up in the text, where its
    last `longest` tokens, or fewer, were before."""
    T, plan = given.ids.shape[1], replace(plan, room=plan.room + k)  # a draft may reach beyond the end

    def choose(logits: Array, ids: Array, step: Array) -> Array:
        """The token [1] behind a text [1, W] with so many new ones, from logits [V]."""
        scores = process(logits[None].astype(jnp.float32), given.text(ids, step), numbers, plan)
        return draw(scores, None if numbers.key is None else jax.random.fold_in(numbers.key, step))

    def draft(state: Drafted) -> tuple[Array, KVCache | None]:
        """The text with k more tokens."""
        if state.drafts is None:
            return _looked_up(state.ids, given.start, T + state.step, longest, k), None

        def write(i: Array, logits: Array, ids: Array) -> tuple[Array, Array]:
            token = choose(logits, ids, state.step + i)[None]
            return token, lax.dynamic_update_slice_in_dim(ids, token, T + state.step + i, axis=1)

        def further(i: Array, carry: tuple[Array, Array, KVCache]) -> tuple[Array, Array, KVCache]:
            token, ids, cache = carry
            out = assistant(token, past_key_values=cache, return_dict=True)
            return *write(i, out.logits[0, -1], ids), out.past_key_values

        # two tokens: of a draft that was taken whole the assistant has not read the last
        last = lax.dynamic_slice_in_dim(state.ids, T + state.step - 2, 2, axis=1)
        out = assistant(last, past_key_values=state.drafts._replace(length=T + state.step - 2), return_dict=True)
        first = write(jnp.zeros((), jnp.int32), out.logits[0, -1], state.ids)
        _, ids, cache = lax.fori_loop(1, k, further, (*first, out.past_key_values))
        return ids, cache

    def advance(state: Drafted) -> Drafted:
        ids, drafts = draft(state)
        end = T + state.step
        tokens = lax.dynamic_slice_in_dim(ids, end - 1, k + 1, axis=1)  # the last one and the draft
        # behind the most new tokens there need not be positions
        real = jnp.arange(state.cache.slots)[None] <= state.cache.length + numbers.limit - state.step
        out = model(tokens, attention_mask=real, past_key_values=state.cache, return_dict=True)
        steps = state.step + jnp.arange(k + 1)
        chosen = jax.vmap(choose, (0, None, 0))(out.logits[0], ids, steps)[:, 0]
        ended = jnp.asarray(numbers.ends)[chosen] | (steps + 1 >= numbers.limit)
        goes_on = jnp.append(chosen[:-1] == tokens[0, 1:], False) & ~ended
        taken = goes_on.argmin() + 1  # what was drafted right, and the token behind it
        ids = lax.dynamic_update_slice_in_dim(ids, chosen[None], end, axis=1)
        ids = jnp.where(jnp.arange(ids.shape[1]) < end + taken, ids, numbers.pad)
        cache = out.past_key_values._replace(length=state.cache.length + taken)
        return Drafted(state.step + taken, ids, ended[taken - 1], cache, drafts)

    reading, rows = begin(model, given, numbers, plan)
    drafts = None
    if assistant is not None:
        how: dict[str, Any] = {"attention_mask": given.mask, "past_key_values": assistant.init_cache(1, T + plan.room)}
        drafts = assistant.model(given.feed, **how, return_dict=True).past_key_values
    first = choose(reading.logits[0], rows.ids, rows.step)
    ids = lax.dynamic_update_slice_in_dim(rows.ids, first[None], T, axis=1)
    done = jnp.asarray(numbers.ends)[first[0]] | (numbers.limit <= 1)
    return lax.while_loop(lambda state: ~state.done, advance, Drafted(rows.step + 1, ids, done, rows.cache, drafts))


def _looked_up(ids: Array, start: Any, end: Array, longest: Any, k: int) -> Array:
    """ids [1, W] with k more tokens: what came behind the latest of those places where most of the last tokens were
    before, and again from there on if that is not enough. Where there is no such place, any."""
    columns = jnp.arange(ids.shape[1])

    def longer(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        same, length = carry
        earlier = jnp.where(columns >= start + i, ids[0, jnp.maximum(columns - i, 0)], -1)
        same = same & (earlier == ids[0, end - 1 - i])
        return same, length + same

    same, length = columns < end - 1, jnp.zeros(len(columns), jnp.int32)
    _, length = lax.fori_loop(0, jnp.minimum(longest, end - 1 - start), longer, (same, length))
    place = (length * len(columns) + jnp.where(length > 0, columns, 0)).argmax()
    draft = ids[0, place + 1 + jnp.arange(k) % jnp.maximum(end - 1 - place, 1)]
    return lax.dynamic_update_slice_in_dim(ids, draft[None], end, axis=1)
