"""Beam search and beam sampling: of each prompt, several texts are followed, and the best of the ended ones are kept.

B prompts   K beams   R = B·K rows   M candidates for the next step   V vocabulary   C columns of the texts
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from ..cache import KVCache
from .callbacks import Stops
from .choosing import Numbers, Plan, Seen, among, gumbel, process
from .loop import Pass, Result, Start, listed, record, records, written

WORST = -1e9


class State(NamedTuple):
    """What the loop carries.

    text: [R, C], the running texts, of each prompt the best first; sums: [B, K], of their log probabilities; rows:
        [B, K, room], the row that each new token came from.
    ended_text: [B, K, C], ended_scores, ended_rows: the same of the best ended ones; ended: [B, K], which are real.
    better: [B, 1], whether a running text may still become one of them. running: whether any is left.
    """

    step: Tensor
    text: Tensor
    sums: Tensor
    rows: Tensor
    ended_text: Tensor
    ended_scores: Tensor
    ended_rows: Tensor
    ended: Tensor
    better: Tensor
    running: Tensor
    cache: Any
    guide_cache: Any
    scores: Any
    logits: Any


class Beams:
    """Beam search, as transformers 5 does it; with `do_sample` the candidates are drawn."""

    def __init__(self, start: Start, numbers: Numbers, plan: Plan, stops: Stops | None = None) -> None:
        self.start, self.numbers, self.plan, self.stops = start, numbers, plan, stops
        self.padding = tf.repeat(start.padding, plan.num_beams)
        # enough for K running beams, whichever of the candidates end
        self.candidates = max(2, 1 + numbers.eos_token_ids.shape[0]) * plan.num_beams

    def begin(self, out: Pass) -> State:
        """The state after the first pass, with one new token."""
        K, room, text = self.plan.num_beams, self.plan.room, tf.repeat(self.start.text, self.plan.num_beams, axis=0)
        R, V = ops.shape(out.logits)
        B, C = R // K, ops.shape(text)[1]
        scores, logits = records(self.plan, R, V)
        state = State(
            step=tf.constant(0),
            text=text,
            sums=tf.broadcast_to(tf.where(tf.range(K) == 0, 0.0, WORST), (B, K)),  # the beams are all alike
            rows=tf.fill((B, K, room), -1),
            ended_text=ops.reshape(text, (B, K, C)),
            ended_scores=tf.fill((B, K), WORST),
            ended_rows=tf.fill((B, K, room), -1),
            ended=tf.zeros((B, K), tf.bool),
            better=tf.ones((B, 1), tf.bool),
            running=tf.constant(True),
            cache=(),
            guide_cache=(),
            scores=scores,
            logits=logits,
        )
        return self.write(out, state)

    def write(self, out: Pass, state: State) -> State:
        """The state after one more step, from the logits of a pass."""
        K, M, plan, numbers = self.plan.num_beams, self.candidates, self.plan, self.numbers
        (R, V), (B, C) = ops.shape(out.logits), (ops.shape(state.sums)[0], ops.shape(state.text)[1])
        seen = Seen(state.text, self.padding, self.start.width, state.step, out.guide, numbers, plan)
        scores = process(tf.nn.log_softmax(tf.cast(out.logits, tf.float32)), seen)
        sums = ops.reshape(ops.reshape(scores, (B, K, V)) + state.sums[:, :, None], (B, K * V))
        sums, beam, token = self._best(sums, seen, V)

        text = tf.gather(ops.reshape(state.text, (B, K, C)), beam, batch_dims=1)
        text = written(text, token, seen.end)
        rows = tf.gather(state.rows, beam, batch_dims=1)
        rows = written(rows, beam + K * tf.range(B)[:, None], state.step)
        recorded = record(state.scores, scores, state.step), record(state.logits, out.logits, state.step)
        hits = among(token, numbers.eos_token_ids) | (state.step + 1 >= numbers.max_new_tokens)
        if self.stops is not None:
            so_far = ops.reshape(text, (B * M, C))[:, : seen.end + 1]
            hits |= ops.reshape(self.stops(so_far, listed(recorded[0], state.step + 1)), (B, M))

        on = sums + tf.cast(hits, tf.float32) * WORST
        on, go = tf.math.top_k(on, K)
        on_text, on_rows = (tf.gather(x, go, batch_dims=1) for x in (text, rows))
        ended_text, ended_scores, ended_rows, ended = self._ended(state, sums, hits, text, rows)
        came_from = ops.reshape(tf.gather(on_rows, state.step, axis=2), (R,))
        step = state.step + 1
        better = state.better & self._better(step, on, ended_scores, ended)
        return State(
            step=step,
            text=ops.reshape(on_text, (R, C)),
            sums=on,
            rows=on_rows,
            ended_text=ended_text,
            ended_scores=ended_scores,
            ended_rows=ended_rows,
            ended=ended,
            better=better,
            running=~tf.reduce_all(hits),
            cache=reordered(out.cache, came_from, plan.room) if plan.use_cache else (),
            guide_cache=out.guide_cache,  # as it is: transformers does not reorder it
            scores=recorded[0],
            logits=recorded[1],
        )

    def _best(self, sums: Tensor, seen: Seen, V: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The candidates among [B, K·V], the best first or as they are drawn: their sums, beams and tokens, [B, M]."""
        if self.plan.do_sample:
            _, at = tf.math.top_k(sums + gumbel(tf.shape(sums), seen), self.candidates)
            best = tf.gather(sums, at, batch_dims=1)
        else:
            best, at = tf.math.top_k(sums, self.candidates)
        return best, at // V, at % V

    def _ended(self, state: State, sums: Tensor, hits: Tensor, text: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """The best K of the ended texts and the candidates that end now; of these, only the first K count."""
        now = hits & (tf.range(self.candidates) < self.plan.num_beams)
        scores = sums / self._length(state.step + 1)
        if self.plan.early_stopping is True:
            scores += tf.cast(tf.reduce_all(state.ended, axis=1, keepdims=True), tf.float32) * WORST
        scores += tf.cast(~state.better, tf.float32) * WORST
        scores += tf.cast(~now, tf.float32) * WORST
        scores, best = tf.math.top_k(tf.concat([state.ended_scores, scores], axis=1), self.plan.num_beams)
        pairs = ((state.ended_text, text), (state.ended_rows, rows), (state.ended, now))
        text, rows, ended = (tf.gather(tf.concat(pair, axis=1), best, batch_dims=1) for pair in pairs)
        return text, scores, rows, ended

    def _better(self, step: Tensor, sums: Tensor, ended_scores: Tensor, ended: Tensor) -> Tensor:
        """[B, 1]: whether the best running text may become better than the worst ended one."""
        longest = step
        if self.plan.early_stopping == "never":
            longest = tf.where(self.numbers.length_penalty > 0, self.numbers.max_new_tokens, step)
        worst = tf.where(ended, tf.reduce_min(ended_scores, axis=1, keepdims=True), WORST)
        return tf.reduce_any(sums[:, :1] / self._length(longest) > worst, axis=1, keepdims=True)

    def _length(self, tokens: Tensor) -> Tensor:
        """What a sum of so many tokens is divided by."""
        return tf.cast(tf.cast(tokens, tf.float64) ** self.numbers.length_penalty, tf.float32)

    def unfinished(self, state: State) -> Tensor:
        more = tf.reduce_any(state.better) & state.running
        return more & ~tf.reduce_all(state.ended) if self.plan.early_stopping is True else more

    def result(self, state: State) -> Result:
        B, n, C, room = ops.shape(state.sums)[0], self.plan.num_return_sequences, *_widths(state)
        rows = ops.reshape(state.ended_rows[:, :n], (B * n, room))
        return Result(
            ops.reshape(state.ended_text[:, :n], (B * n, C)),
            tf.reduce_max(tf.reduce_sum(tf.cast(rows >= 0, tf.int32), axis=1)),
            state.step,
            state.cache if self.plan.keep_cache else (),
            state.scores,
            state.logits,
            rows,
            ops.reshape(state.ended_scores[:, :n], (B * n,)),
        )


def _widths(state: State) -> tuple[Any, Any]:
    return ops.shape(state.ended_text)[2], ops.shape(state.rows)[2]


def reordered(cache: KVCache, rows: Tensor, room: int) -> KVCache:
    """The cache whose rows come from others of the same prompt: the slots before the last `room` are alike."""
    R = ops.shape(rows)[0]

    def moved(x: Tensor) -> Tensor:
        N, S, D = ops.shape(x)[0] // R, *ops.shape(x)[1:]
        new = tf.gather(ops.reshape(x[:, S - room :], (R, N, room, D)), rows)
        return ops.slice_update(x, (0, S - room, 0), ops.reshape(new, (R * N, room, D)))

    return cache._replace(k=tuple(map(moved, cache.k)), v=tuple(map(moved, cache.v)))
