"""Beam search: of each prompt the likeliest texts are followed side by side, and the best that have ended are kept.

B prompts   K beams   W columns   V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..cache import KVCache
from .choosing import Numbers, Plan, Proposal

HOPELESS = -1e9  # the score of what must not be chosen


class Beams(NamedTuple):
    """step: how many new tokens there are.
    ids: [B, K, W], the texts that are followed, and sums: [B, K], the log probabilities of each. sources: [B, K, room],
    the row, of B·K, that each token's scores were in; -1 behind the last.
    best, best_scores, best_sources: the same of the best texts that have ended, best first; ended: which are there.
    improvable: [B, 1], whether a text that is followed may get better than those. stuck: whether all have ended.
    cache: of all tokens but the last, of B·K rows; other: that of guidance, which stays with its row.
    """

    step: Array
    ids: Array
    sums: Array
    sources: Array
    best: Array
    best_scores: Array
    best_sources: Array
    ended: Array
    improvable: Array
    stuck: Array
    cache: KVCache | None
    other: KVCache | None

    @classmethod
    def begin(cls, ids: Array, cache: KVCache | None, other: KVCache | None, plan: Plan) -> Beams:
        """ids: [B·K, W]; the beams of a prompt are still the same."""
        ids = ids.reshape(-1, plan.each, ids.shape[1])
        B, K, _ = ids.shape
        sources = jnp.full((B, K, plan.room), -1, jnp.int32)
        sums = jnp.full((B, K), HOPELESS).at[:, 0].set(0)  # the first beam alone is continued
        hopeless, none = jnp.full((B, K), HOPELESS), jnp.zeros((B, K), bool)
        step, improvable, stuck = jnp.zeros((), jnp.int32), jnp.ones((B, 1), bool), jnp.zeros((), bool)
        return cls(step, ids, sums, sources, ids, hopeless, sources, none, improvable, stuck, cache, other)

    @property
    def texts(self) -> Array:
        """[B·K, W]: those that are followed."""
        return self.ids.reshape(-1, self.ids.shape[2])

    @staticmethod
    def scores(logits: Array) -> Array:
        """What is processed and summed up, [B·K, V]."""
        return jax.nn.log_softmax(logits)

    def propose(self, scores: Array, numbers: Numbers, plan: Plan) -> Proposal:
        """The likeliest texts with a further token, best first, or some as they are drawn: enough that K are left if
        all tokens that end one are among them."""
        (B, K), V = self.sums.shape, scores.shape[1]
        sums = (scores.reshape(B, K, V) + self.sums[..., None]).reshape(B, K * V)
        drawn = 0.0
        if numbers.key is not None:  # the largest sums with this noise are a draw without replacement
            drawn = jax.random.gumbel(jax.random.fold_in(numbers.key, self.step), sums.shape, sums.dtype)
        chosen = lax.top_k(sums + drawn, plan.least * K)[1]
        sums = jnp.take_along_axis(sums, chosen, axis=1)
        beam, token = chosen // V, (chosen % V).astype(jnp.int32)
        row = (beam + K * jnp.arange(B)[:, None]).astype(jnp.int32)
        column = self.ids.shape[2] - plan.room + self.step
        ids = lax.dynamic_update_slice_in_dim(_take(self.ids, beam), token[..., None], column, axis=2)
        sources = lax.dynamic_update_slice_in_dim(_take(self.sources, beam), row[..., None], self.step, axis=2)
        return Proposal(ids.reshape(-1, ids.shape[2]), token.reshape(-1), sums, sources)

    def settle(self, proposal: Proposal, ended: Array, numbers: Numbers, plan: Plan) -> Beams:
        """Follow the K best texts that have not ended, and keep the best of those that have. ended: [C]."""
        sums, sources = proposal.sums, proposal.sources
        assert sums is not None and sources is not None
        (B, K), step = self.sums.shape, self.step + 1
        ids, ended = proposal.ids.reshape(B, -1, self.ids.shape[2]), ended.reshape(B, -1)

        running, kept = lax.top_k(sums + ended * HOPELESS, K)
        row = lax.dynamic_index_in_dim(_take(sources, kept), self.step, axis=2, keepdims=False)
        cache = None if self.cache is None else self.cache.select(row.reshape(-1))

        new = ended & (jnp.arange(ended.shape[1]) < K)  # those behind are there to be followed
        full = self.ended.all(axis=1, keepdims=True) & (plan.early_stopping is True)
        scores = sums / step**numbers.length_penalty
        scores = scores + full * HOPELESS + ~self.improvable * HOPELESS + ~new * HOPELESS
        best_scores, best = lax.top_k(jnp.concatenate([self.best_scores, scores], axis=1), K)

        def merged(old: Array, added: Array) -> Array:
            return _take(jnp.concatenate([old, added], axis=1), best)

        state = Beams(
            step,
            _take(ids, kept),
            running,
            _take(sources, kept),
            merged(self.best, ids),
            best_scores,
            merged(self.best_sources, sources),
            merged(self.ended, new),
            self.improvable,
            ended.all(),
            cache,
            self.other,
        )
        return state._replace(improvable=self.improvable & state._may_improve(numbers, plan))

    def _may_improve(self, numbers: Numbers, plan: Plan) -> Array:
        """[B, 1]: whether the best text that is followed may still get better than the worst that has ended."""
        length = self.step
        if plan.early_stopping == "never":
            length = jnp.where(jnp.asarray(numbers.length_penalty) > 0, numbers.limit, length)
        possible = self.sums[:, :1] / length**numbers.length_penalty
        worst = jnp.where(self.ended, self.best_scores.min(axis=1, keepdims=True), HOPELESS)
        return (possible > worst).any(axis=1, keepdims=True)

    def unfinished(self, plan: Plan) -> Array:
        """Whether there is a further step."""
        full = self.ended.all() & (plan.early_stopping is True)
        return self.improvable.any() & ~full & ~self.stuck


def _take(x: Array, index: Array) -> Array:
    """x [B, N, ...] at index [B, M] of its second axis."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
