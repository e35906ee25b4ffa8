"""Drafts: a smaller model, or the text itself, proposes tokens, and one pass of the model judges them all.

What is written is what would be written without: each token is chosen from the model's logits as ever, and a draft only
brings it about that these are there already. In sampling both draw with the same noise, and so they often agree.

C columns of the text   V vocabulary   S slots   k tokens of a draft
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from ..cache import KVCache
from . import loop
from .choosing import Numbers, Plan, Seen, choose, process
from .loop import Pass, Result, Rows, Start, first, written


class State(NamedTuple):
    """What the loop carries: one row, the drafting model's cache, and how many passes of the model there were."""

    row: loop.State
    ahead: Any
    passes: Tensor


def draft(
    model: Any, assistant: Any, start: Start, ahead: Start | None, numbers: Numbers, plan: Plan
) -> tuple[Result, Tensor]:
    """The text of one row, from drafts by the assistant, which begins with `ahead`, or without one looked up in the
    text; and the number of passes of the model."""
    way, k = Rows(start, numbers, plan), plan.draft
    cache = () if assistant is None else first(assistant, ahead, plan.room, 1, True).cache
    state = State(way.begin(first(model, start, plan.room, 1, True)), cache, tf.constant(1))

    def advance(state: State) -> tuple[State]:
        row, end = state.row, start.width + state.row.step
        left = numbers.max_new_tokens - row.step
        if assistant is None:
            drafted, cache = _looked_up(row.text, end, k, plan.longest), ()
        else:
            drafted, cache = _drafted(assistant, way, state, k)
        tokens = tf.concat([tf.gather(row.text, end[None] - 1, axis=1), drafted], axis=1)  # [1, k + 1]
        judged = _judged(model, tokens, row.cache, left)
        away = _judged(model, tokens, row.guide_cache, left) if row.guide_cache else None

        def agrees(i: Tensor, row: loop.State) -> Tensor:
            written = tf.gather(row.text, end + i - 1, axis=1) == tf.gather(tokens, tf.minimum(i, k), axis=1)
            return (i == 0) | (way.unfinished(row) & (i <= k) & tf.reduce_all(written))

        def write(i: Tensor, row: loop.State) -> tuple[Tensor, loop.State]:
            guide = () if away is None else tf.gather(away.logits, i, axis=1)
            return i + 1, way.write(Pass(tf.gather(judged.logits, i, axis=1), (), guide, (), (), ()), row)

        n, after = tf.while_loop(agrees, write, (tf.constant(0), row._replace(cache=(), guide_cache=())))
        after = after._replace(
            cache=_cropped(judged.past_key_values, row.cache.length + n),
            guide_cache=() if away is None else _cropped(away.past_key_values, row.guide_cache.length + n),
        )
        cache = _cropped(cache, state.ahead.length + n) if cache else ()
        return (State(after, cache, state.passes + 1),)

    (state,) = tf.while_loop(lambda state: way.unfinished(state.row), advance, (state,))
    return way.result(state.row), state.passes


def _drafted(assistant: Any, way: Rows, state: State, k: int) -> tuple[Tensor, KVCache]:
    """A draft [1, k], and the drafting model's cache with all of it."""
    row, end = state.row, way.start.width + state.row.step
    plan = way.plan._replace(names=tuple(name for name in way.plan.names if name != "guidance_scale"))

    def further(i: Tensor, text: Tensor, cache: KVCache) -> tuple[Tensor, Tensor, KVCache]:
        seen = Seen(text, way.padding, way.start.width, row.step + i, (), way.numbers, plan)
        token = tf.gather(text, seen.end - 1, axis=1)[:, None]
        out = _judged(assistant, token, cache, way.numbers.max_new_tokens - seen.step)
        token = choose(process(out.logits[:, -1], seen), seen)
        return i + 1, written(text, token, seen.end), out.past_key_values

    begin = (tf.constant(0), row.text, state.ahead)
    _, text, cache = tf.while_loop(lambda i, *_: i <= k, further, begin)  # the last pass is for the cache alone
    return tf.gather(text, end + tf.range(k), axis=1), cache


def _looked_up(text: Tensor, end: Tensor, k: int, longest: int) -> Tensor:
    """What came, [1, k], behind the first of the longest sequences that the text ends in and that it has earlier."""
    columns = tf.range(ops.shape(text)[1])
    before, same = text, tf.broadcast_to(columns < end - 1, tf.shape(text))
    length = tf.zeros_like(text)
    for i in range(longest):
        same &= (before == tf.gather(text, tf.maximum(end - 1 - i, 0), axis=1)[:, None]) & (i < end)
        length += tf.cast(same, tf.int32)
        before = tf.concat([tf.fill((1, 1), -1), before[:, :-1]], axis=1)
    behind = tf.argmax(length, axis=1, output_type=tf.int32) + 1  # of equal ones the first
    return tf.gather(text, tf.minimum(behind + tf.range(k), ops.shape(text)[1] - 1), axis=1)


def _judged(model: Any, tokens: Tensor, cache: KVCache, left: Tensor) -> Any:
    """A pass over further tokens, of which only so many as are `left` to write have a position."""
    slots = tf.range(cache.slots) < cache.length + tf.minimum(ops.shape(tokens)[1], left)
    return model(tokens, attention_mask=tf.cast(slots[None], tf.int32), past_key_values=cache)


def _cropped(cache: KVCache, length: Tensor) -> KVCache:
    """The cache with its first tokens alone; the next pass overwrites the others."""
    return cache._replace(length=length, segments=tf.where(tf.range(cache.slots) < length, cache.segments, 0))
