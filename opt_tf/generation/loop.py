"""The model's passes, and one text a row: prefill, choose, then {step, choose} with the cache.

B prompts   R rows: the prompts, each so often as it has texts   T columns of the prompts   C columns of the texts
V vocabulary   S slots
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from ..cache import KVCache
from .callbacks import Stops
from .choosing import Numbers, Plan, Seen, among, choose, process


class Start(NamedTuple):
    """What a program begins with; None stands for what is not there.

    text: [B, C], the prompts, their padding in front, with room behind; width: of the prompts. padding: [B], how many
    columns of the masks are padding.
    ids: [B, T] or embeds: [B, T, E], what the first pass reads; mask: [B, T], or with a past cache that of its columns
    too. away, away_mask: [B, N], what guidance moves away from.
    """

    text: Tensor
    padding: Tensor
    width: Tensor
    ids: Tensor | None
    embeds: Tensor | None
    mask: Tensor
    past: KVCache | None
    away: Tensor | None
    away_mask: Tensor | None


class Pass(NamedTuple):
    """What a pass of the model gives: the logits [R, V] of the last column, the cache, and the same for guidance. What
    is not there is ()."""

    logits: Tensor
    cache: Any
    guide: Any
    guide_cache: Any
    attentions: Any
    hidden_states: Any


def first(model: Any, start: Start, room: int, copies: int, use_cache: bool, **wanted: bool) -> Pass:
    """The pass over the prompts, once each; what it gives is then repeated."""
    cache = start.past
    if use_cache and cache is None:
        cache = _empty(model, start.embeds if start.ids is None else start.ids, room)
    given = {"past_key_values": cache, "inputs_embeds": start.embeds, "logits_to_keep": 1} | wanted
    out = model(start.ids, attention_mask=start.mask, **given)
    guide, guide_cache = (), ()
    if start.away is not None:
        cache = _empty(model, start.away, room)
        away = model(start.away, attention_mask=start.away_mask, past_key_values=cache, logits_to_keep=1)
        guide, guide_cache = tf.repeat(away.logits[:, -1], copies, axis=0), repeated(away.past_key_values, copies)
    return Pass(
        tf.repeat(out.logits[:, -1], copies, axis=0),
        repeated(out.past_key_values, copies) if use_cache else (),
        guide,
        guide_cache,
        tuple(tf.repeat(x, copies, axis=0) for x in out.attentions or ()),
        tuple(tf.repeat(x, copies, axis=0) for x in out.hidden_states or ()),
    )


def further(
    model: Any, text: Tensor, padding: Tensor, end: Tensor, cache: Any, guide_cache: Any, **wanted: bool
) -> Pass:
    """The pass over the last token of the texts [R, C], of which `end` columns are taken; without a cache, over all of
    each text but its `padding` [R]."""
    token = tf.gather(text, end - 1, axis=1)[:, None]
    if cache:
        out = model(token, past_key_values=cache, **wanted)
    else:
        columns = tf.range(ops.shape(text)[1])
        mask = tf.cast((columns >= padding[:, None]) & (columns < end), tf.int32)
        out = model(text, attention_mask=mask, logits_to_keep=end[None] - 1, **wanted)
    guide, guide_after = (), ()
    if guide_cache:
        away = model(token, past_key_values=guide_cache)
        guide, guide_after = away.logits[:, -1], away.past_key_values
    cache = out.past_key_values if cache else ()
    return Pass(out.logits[:, -1], cache, guide, guide_after, out.attentions or (), out.hidden_states or ())


def _empty(model: Any, tokens: Tensor, room: int) -> KVCache:
    B, T = ops.shape(tokens)[:2]
    return KVCache.empty(model.config, B, T + room, model.compute_dtype)


def repeated(cache: KVCache, n: int) -> KVCache:
    """Each row n times."""
    if n == 1:
        return cache
    B = ops.shape(cache.segments)[0]

    def rows(x: Tensor) -> Tensor:
        N, S, D = ops.shape(x)[0] // B, *ops.shape(x)[1:]
        return ops.reshape(tf.repeat(ops.reshape(x, (B, N, S, D)), n, axis=0), (B * n * N, S, D))

    k, v = (tuple(map(rows, tensors)) for tensors in (cache.k, cache.v))
    return KVCache(k, v, cache.length, tf.repeat(cache.segments, n, axis=0))


class State(NamedTuple):
    """What the loop carries: the texts [R, C], of which `step` new tokens are chosen, which rows are done [R], and the
    cache of all but the last; scores and logits [room, R, V], if they are recorded."""

    step: Tensor
    text: Tensor
    done: Tensor
    cache: Any
    guide_cache: Any
    scores: Any
    logits: Any


class Result(NamedTuple):
    """What a program returns: the texts, how many new tokens the longest has, and how many steps are recorded."""

    text: Tensor
    length: Tensor
    steps: Tensor
    cache: Any
    scores: Any
    logits: Any
    beam_indices: Any = ()
    sequences_scores: Any = ()


class Rows:
    """One text a row: its likeliest tokens, or drawn ones."""

    def __init__(self, start: Start, numbers: Numbers, plan: Plan, stops: Stops | None = None) -> None:
        self.start, self.numbers, self.plan, self.stops = start, numbers, plan, stops
        self.padding = tf.repeat(start.padding, plan.copies)

    def begin(self, out: Pass) -> State:
        """The state after the first pass, with one new token."""
        text, (R, V) = tf.repeat(self.start.text, self.plan.copies, axis=0), ops.shape(out.logits)
        scores, logits = records(self.plan, R, V)
        state = State(tf.constant(0), text, tf.zeros(R, tf.bool), (), (), scores, logits)
        return self.write(out, state)

    def write(self, out: Pass, state: State) -> State:
        """The state with one more token, chosen from the logits of a pass."""
        seen = Seen(state.text, self.padding, self.start.width, state.step, out.guide, self.numbers, self.plan)
        scores = process(out.logits, seen)
        token = tf.where(state.done, self.numbers.pad_token_id, choose(scores, seen))
        text = written(state.text, token, seen.end)
        recorded = record(state.scores, scores, state.step), record(state.logits, out.logits, state.step)
        done = state.done | among(token, self.numbers.eos_token_ids)
        if self.stops is not None:
            done |= self.stops(text[:, : seen.end + 1], listed(recorded[0], state.step + 1))
        return State(state.step + 1, text, done, out.cache, out.guide_cache, *recorded)

    def unfinished(self, state: State) -> Tensor:
        return (state.step < self.numbers.max_new_tokens) & ~tf.reduce_all(state.done)

    def result(self, state: State) -> Result:
        cache = state.cache if self.plan.keep_cache else ()
        return Result(state.text, state.step, state.step, cache, state.scores, state.logits)


def written(text: Tensor, token: Tensor, column: Tensor) -> Tensor:
    """The texts [..., C] with a token [...] each in a column."""
    columns = tf.range(ops.shape(text)[-1])
    return tf.where(columns == column, token[..., None], text)


def records(plan: Plan, R: Any, V: Any) -> tuple[Any, Any]:
    """Room for the scores and logits of each step, if they are wanted."""
    return tuple(tf.zeros((plan.room, R, V)) if on else () for on in (plan.output_scores, plan.output_logits))  # type: ignore[return-value]


def record(kept: Any, now: Tensor, step: Tensor) -> Any:
    if isinstance(kept, tuple):
        return ()
    return ops.slice_update(kept, (step, 0, 0), tf.cast(now, tf.float32)[None])


def listed(kept: Any, steps: Any) -> tuple[Tensor, ...] | None:
    """What is recorded of so many steps, one [R, V] each."""
    return None if isinstance(kept, tuple) else tuple(tf.unstack(kept[:steps]))
