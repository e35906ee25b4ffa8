"""A text, token by token: read it, score what may come next, choose. All of it is one compiled program, or one program
a part where the caller's functions take part or what each step computes is wanted.

B prompts   R texts: B, or several of each prompt   P, T columns of the prompt   W columns: T and those of new tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from opt_common.generation import crowded

from ..cache import KVCache
from ..products import for_one_token, head
from .beams import Beams
from .callbacks import Callbacks
from .choosing import Numbers, Plan, Proposal, Text, draw, process


class Given(NamedTuple):
    """What is continued.

    ids: [B, T] int32, the prompts with their padding moved to the left, which begin at column `start`; padding: [B],
    how many columns of each mask are padding.
    feed: [B, P] tokens or [B, P, E] embeddings, what the model reads first, from column `front` on; mask: [B, past +
    P], True for what is real, of what is in `cache` too, which has room for the new tokens.
    other: ids [B, N] and their mask, which guidance moves away from.
    """

    ids: Any
    start: Any
    padding: Any
    feed: Any
    front: Any
    mask: Any
    cache: KVCache | None = None
    other: tuple[Array, Array] | None = None

    def text(self, ids: Array, step: ArrayLike) -> Text:
        """Of texts [R, W] with so many new tokens."""
        T = self.ids.shape[1]
        return Text(ids, self.start, T, T + step, jnp.repeat(self.padding, len(ids) // len(self.padding)))


class Reading(NamedTuple):
    """What the model makes of a text: logits [R, V] of the next token, and of guidance; and, if asked for, the
    attention weights and hidden states of the pass."""

    logits: Array
    other: Array | None
    attentions: tuple[Array, ...] | None
    hidden_states: tuple[Array, ...] | None


class Rows(NamedTuple):
    """One text a row, R = B · num_return_sequences: step, how many new tokens there are; ids: [R, W]; done: [R], which
    have ended; cache: of all tokens but the last; other: that of guidance."""

    step: Array
    ids: Array
    done: Array
    cache: KVCache | None
    other: KVCache | None

    @classmethod
    def begin(cls, ids: Array, cache: KVCache | None, other: KVCache | None, plan: Plan) -> Rows:
        return cls(jnp.zeros((), jnp.int32), ids, jnp.zeros(len(ids), bool), cache, other)

    @property
    def texts(self) -> Array:
        """[R, W]."""
        return self.ids

    @staticmethod
    def scores(logits: Array) -> Array:
        """What is processed, [R, V]."""
        return logits

    def propose(self, scores: Array, numbers: Numbers, plan: Plan) -> Proposal:
        """Every text with its next token."""
        token = draw(scores, None if numbers.key is None else jax.random.fold_in(numbers.key, self.step))
        padded = (
            self.done & jnp.asarray(numbers.ends).any()
        )  # as in transformers: where no token ends a text, none pads it
        token = jnp.where(padded, numbers.pad, token)
        column = self.ids.shape[1] - plan.room + self.step
        return Proposal(lax.dynamic_update_slice_in_dim(self.ids, token[:, None], column, axis=1), token)

    def settle(self, proposal: Proposal, ended: Array, numbers: Numbers, plan: Plan) -> Rows:
        """Take the texts over. ended: [R]."""
        return self._replace(step=self.step + 1, ids=proposal.ids, done=self.done | ended)

    def unfinished(self, plan: Plan) -> Array:
        """Whether there is a further step."""
        return ~self.done.all()


State = Any  # Rows or Beams


# === The parts of a step ===


def begin(model: Any, given: Given, numbers: Numbers, plan: Plan) -> tuple[Reading, State]:
    """Read the prompts."""
    B, P = given.feed.shape[:2]
    cache = given.cache
    if cache is None and plan.use_cache:
        cache = model.init_cache(B, P + plan.room)
    reading, cache = _prefill(model, given.feed, given.mask, cache, plan)
    other = other_cache = None
    if given.other is not None:
        ids, mask = given.other
        beside, other_cache = _prefill(model, ids, mask, model.init_cache(B, ids.shape[1] + plan.room))
        other = beside.logits
    ids = jnp.concatenate([given.ids, jnp.full((B, plan.room), numbers.pad, jnp.int32)], axis=1)
    if plan.each > 1:
        rows = jnp.repeat(jnp.arange(B), plan.each)
        reading, other, ids = jax.tree.map(lambda x: x[rows], (reading, other, ids))
        cache, other_cache = (None if x is None else x.select(rows) for x in (cache, other_cache))
    kind = Beams if plan.beams else Rows
    return reading._replace(other=other), kind.begin(ids, cache, other_cache, plan)


def _prefill(
    model: Any, feed: Array, mask: Array, cache: KVCache | None, plan: Plan | None = None
) -> tuple[Reading, KVCache | None]:
    """Read the rows of a prompt, of which the rightmost real tokens have the logits."""
    (B, P), columns = feed.shape[:2], mask.shape[1]
    if cache is not None and not cache.is_empty:  # under jit, where a length is not known, as wide as the cache
        mask = jnp.pad(mask, ((0, 0), (0, cache.slots - columns)), constant_values=True)
    out = model.model(
        **{"input_ids" if feed.ndim == 2 else "inputs_embeds": feed},
        attention_mask=mask,
        past_key_values=cache,
        **_outputs(plan),
    )
    last = P - 1 - mask[:, columns - P : columns][:, ::-1].argmax(axis=1)
    logits = head(model, out.last_hidden_state[jnp.arange(B), last]).astype(jnp.float32)
    return Reading(logits, None, out.attentions, out.hidden_states), out.past_key_values


def read(model: Any, given: Given, state: State, plan: Plan) -> tuple[Reading, State]:
    """Read the last token of each text; without a cache, the whole texts."""
    texts, T = state.texts, given.ids.shape[1]
    token = lax.dynamic_slice_in_dim(texts, T + state.step - 1, 1, axis=1)  # [R, 1]
    if state.cache is not None:
        out = model(token, past_key_values=state.cache, **_outputs(plan))
        logits = out.logits[:, -1]
    else:
        prompt, mask = (jnp.repeat(x, plan.each, axis=0) for x in (given.feed, given.mask))
        there = jnp.broadcast_to(jnp.arange(plan.room) < state.step, (len(texts), plan.room))
        out = model(
            jnp.concatenate([prompt, texts[:, T:]], axis=1),
            jnp.concatenate([mask, there], axis=1),
            logits_to_keep=(prompt.shape[1] + state.step - 1)[None],
            **_outputs(plan),
        )
        logits = out.logits[:, 0]
    other, other_cache = None, state.other
    if other_cache is not None:
        beside = model(token, past_key_values=other_cache, **_outputs(None))
        other, other_cache = beside.logits[:, -1].astype(jnp.float32), beside.past_key_values
    reading = Reading(logits.astype(jnp.float32), other, out.attentions, out.hidden_states)
    return reading, state._replace(cache=out.past_key_values, other=other_cache)


def _outputs(plan: Plan | None) -> dict[str, bool]:
    """What a pass returns, whatever the config says."""
    names = ("output_attentions", "output_hidden_states")
    return {name: plan is not None and getattr(plan, name) for name in names} | {"return_dict": True}


def scored(reading: Reading, given: Given, state: State, numbers: Numbers, plan: Plan) -> Array:
    """The scores [R, V] that the next tokens are chosen from."""
    return process(*prepared(reading, given, state, numbers), plan)


def prepared(reading: Reading, given: Given, state: State, numbers: Numbers) -> tuple[Array, Text, Numbers]:
    """What processors take."""
    if reading.other is not None:
        guidance = numbers.values["guidance_scale"], reading.other
        numbers = numbers._replace(values=numbers.values | {"guidance_scale": guidance})
    return state.scores(reading.logits), given.text(state.texts, state.step), numbers


def propose(scores: Array, state: State, numbers: Numbers, plan: Plan) -> tuple[Proposal, Array]:
    """What may come next, and which texts end with it."""
    proposal = state.propose(scores, numbers, plan)
    return proposal, jnp.asarray(numbers.ends)[proposal.token] | (state.step + 1 >= numbers.limit)


# === In one program, and part by part ===


@partial(jax.jit, static_argnames="plan")
def run(model: Any, given: Given, numbers: Numbers, *, plan: Plan) -> State:
    """The texts at their end."""

    def write(reading: Reading, state: State) -> State:
        proposal, ended = propose(scored(reading, given, state, numbers, plan), state, numbers, plan)
        return state.settle(proposal, ended, numbers, plan)

    reading, state = begin(model, given, numbers, plan)
    stepper = for_one_token(model) if len(state.texts) == 1 and state.cache is not None else model
    return lax.while_loop(
        lambda state: state.unfinished(plan),
        lambda state: write(*read(stepper, given, state, plan)),
        write(reading, state),
    )


def steps(
    model: Any, given: Given, numbers: Numbers, plan: Plan, callbacks: Callbacks, traced: bool
) -> Iterator[tuple[Reading, Array, State]]:
    """Of each new token what the model read, the scores, and the state with it, which holds until the next.
    traced: the end of a text is not known, so there are as many steps as there may be."""
    start, end = given.start, given.ids.shape[1]
    reading, state = _begin(model, given, numbers, plan=plan)
    for step in range(1, numbers.limit + 1):
        if callbacks.processors:
            there = slice(start, end + step - 1)
            scores = _by_name(cut(state.texts, there), callbacks, reading, given, state, numbers, plan)
        else:
            scores = _scored(reading, given, state, numbers, plan=plan)
        proposal, ended = _propose(scores, state, numbers, plan=plan)
        for criterion in callbacks.criteria:
            ended = ended | jnp.asarray(criterion(cut(proposal.ids, slice(start, end + step)), scores))
        state = _settle(state, proposal, ended, numbers, plan)
        yield reading, scores, state
        if step == numbers.limit or not (traced or state.unfinished(plan)):
            return
        reading, state = _read(model, given, state, plan=plan)


def cut(x: Array, columns: slice) -> Array:
    """Those columns; by numpy, as for jnp each place would be one more program."""
    return x[:, columns] if isinstance(x, Tracer) else jax.device_put(np.asarray(x)[:, columns])


def _by_name(
    texts: Array, callbacks: Callbacks, reading: Reading, given: Given, state: State, numbers: Numbers, plan: Plan
) -> Array:
    """As `scored`, with one processor after the other; texts: [R, T + new]."""
    scores, text, numbers = prepared(reading, given, state, numbers)
    for name in plan.names:
        if name in callbacks.processors:
            scores = callbacks.processors[name](texts, scores)
        else:
            scores = _process(scores, text, numbers, plan=replace(plan, names=(name,)))
    return scores


# === Compiled programs ===

KEPT = 256  # each holds some 10 MB
_counted = 0  # when `forget` last looked


def forget(programs: Sequence[Any]) -> None:
    """Drop all compiled programs if there are KEPT, or new ones and no room for more; those that are called again are
    compiled again."""
    global _counted
    count = sum(program._cache_size() for program in programs)
    if count >= KEPT or (count > _counted and crowded()):
        count = 0
        for program in programs:
            program.clear_cache()
    _counted = count


@jax.jit
def from_slot(cache: KVCache, slot: Any) -> KVCache:
    """The cache without the slots before that one, of padding, which are then free ones behind the others."""
    k, v, _, segments = jax.tree.map(lambda x: jnp.roll(x, -slot, axis=1) if jnp.ndim(x) else x, cache)
    return KVCache(k, v, cache.length - slot, segments)


_begin = jax.jit(begin, static_argnames="plan")
_read = jax.jit(read, static_argnames="plan", donate_argnames="state")
_scored = jax.jit(scored, static_argnames="plan")
_process = jax.jit(process, static_argnames="plan")
_propose = jax.jit(propose, static_argnames="plan")
_settle = jax.jit(lambda state, *rest: state.settle(*rest), static_argnums=4)
PROGRAMS = (run, _begin, _read, _scored, _process, _propose, _settle, from_slot)
