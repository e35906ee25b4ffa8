"""From logits to tokens: what happens to the logits before a token is chosen, and the choice.

R rows   V vocabulary   W columns: the longest prompt and the new tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from opt_common.generation import Settings

NEVER = -jnp.inf


class Text(NamedTuple):
    """The texts so far: prompts, with their padding moved to the left, and the new tokens behind them.

    ids: [R, W] int32. start, prompt, end: the columns where the texts begin, where their prompts end, and where they
    end now; in front and behind is nothing. padding: [R], how many columns of a mask are padding.
    """

    ids: Array
    start: Any
    prompt: Any
    end: Any
    padding: Array

    @property
    def new(self) -> Any:
        """How many new tokens there are."""
        return self.end - self.prompt

    def between(self, start: ArrayLike, end: ArrayLike) -> Array:
        """[R or 1, W]: the columns from `start`, one of each row or one of all, up to `end`."""
        columns = jnp.arange(self.ids.shape[1])
        return (jnp.reshape(jnp.asarray(start), (-1, 1)) <= columns) & (columns < end)

    def from_the_left(self, pad: ArrayLike) -> Array:
        """ids with the texts' first columns in front, and padding behind the texts."""
        return jnp.roll(jnp.where(self.between(self.start, self.end), self.ids, pad), -self.start, axis=1)

    def tokens(self, where: Array, vocabulary: int) -> Array:
        """[R, V]: the tokens in the columns [R or 1, W]."""
        ids = jnp.where(where, self.ids, vocabulary)
        blank = jnp.zeros((len(ids), vocabulary), bool)
        return blank.at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")


class Numbers(NamedTuple):
    """The settings that are arguments of a compiled program: another value needs no other program.

    values: those of the processors, as `values` prepares them. ends: [V], the tokens that end a text. limit: how many
    new tokens there are at most. key: what is drawn with, if anything is.
    """

    values: dict[str, Any]
    ends: Any
    pad: Any
    limit: Any
    length_penalty: Any
    key: Array | None


@dataclass(frozen=True)
class Plan:
    """The settings that a compiled program depends on.

    names: the processors in order. functions: those that the caller gave, traced. each: how many texts continue a
    prompt. least: how many tokens a filter keeps at least. room: how many columns there are for new tokens.
    """

    names: tuple[str, ...]
    functions: tuple[Callable[..., Array], ...]
    beams: bool
    each: int
    least: int
    early_stopping: bool | str
    room: int
    use_cache: bool
    output_attentions: bool = False
    output_hidden_states: bool = False


class Proposal(NamedTuple):
    """What may come next: texts [C, W] with a further token [C], and, of beams, their sums [B, kept] and sources [B,
    kept, room]."""

    ids: Array
    token: Array
    sums: Array | None = None
    sources: Array | None = None


# === The processors: scores [R, V] -> scores [R, V]. They take the text, the option's value as `values` prepares it,
# and how many tokens a filter keeps at least. ===


def guidance_scale(scores: Array, text: Text, value: Any, least: int) -> Array:
    scale, other = value  # the logits [R, V] of the other prompt
    scores, other = jax.nn.log_softmax(scores), jax.nn.log_softmax(other)
    return scale * (scores - other) + other


def sequence_bias(scores: Array, text: Text, value: Any, least: int) -> Array:
    before, last, bias, _ = value
    columns = text.end - before.shape[1] + jnp.arange(before.shape[1])
    tail = jnp.where(columns >= text.start, text.ids[:, jnp.maximum(columns, 0)], -2)  # -2 is in no sequence
    complete = ((before < 0) | (tail[:, None] == before)).all(axis=-1)  # [R, sequences]
    return scores + jnp.zeros_like(scores).at[:, last].add(jnp.where(complete, bias, 0))


def encoder_repetition_penalty(scores: Array, text: Text, value: Any, least: int) -> Array:
    return _penalized(scores, text.tokens(text.between(text.start, text.prompt), scores.shape[1]), value)


def repetition_penalty(scores: Array, text: Text, value: Any, least: int) -> Array:
    real = text.between(text.start + text.padding, text.end)
    return _penalized(scores, text.tokens(real, scores.shape[1]), value)


def _penalized(scores: Array, tokens: Array, penalty: Any) -> Array:
    return jnp.where(tokens, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram_size(scores: Array, text: Text, value: Any, least: int) -> Array:
    return _without_ngrams(scores, text, value, text.end)


def encoder_no_repeat_ngram_size(scores: Array, text: Text, value: Any, least: int) -> Array:
    return _without_ngrams(scores, text, value, text.prompt)


def _without_ngrams(scores: Array, text: Text, n: Any, end: ArrayLike) -> Array:
    """Forbid what would repeat an n-gram that lies in front of column `end`."""

    def same(i: Array, found: Array) -> Array:  # the token i columns before is that i columns before the next one
        earlier = text.ids[:, jnp.maximum(jnp.arange(text.ids.shape[1]) - i, 0)]
        return found & (earlier == lax.dynamic_slice_in_dim(text.ids, text.end - i, 1, axis=1))

    whole = jnp.broadcast_to(text.between(text.start + n - 1, end), text.ids.shape)
    repeated = lax.fori_loop(1, n, same, whole)  # n is not known when this is compiled
    return jnp.where(text.tokens(repeated, scores.shape[1]), NEVER, scores)


def min_new_tokens(scores: Array, text: Text, value: Any, least: int) -> Array:
    count, ends = value
    return jnp.where(ends & (text.new < count), NEVER, scores)


def forced_bos_token_id(scores: Array, text: Text, value: Any, least: int) -> Array:
    return jnp.where(text.end - text.start == 1, jnp.where(value, 0, NEVER), scores)


def forced_eos_token_id(scores: Array, text: Text, value: Any, least: int) -> Array:
    forced, last = value
    return jnp.where(text.new == last, jnp.where(forced, 0, NEVER), scores)


def remove_invalid_values(scores: Array, text: Text, value: Any, least: int) -> Array:
    return jnp.nan_to_num(scores)


def exponential_decay_length_penalty(scores: Array, text: Text, value: Any, least: int) -> Array:
    start, factor, ends = value
    late = jnp.maximum(text.new - start, 0)
    gain = jnp.where(jnp.isfinite(scores), jnp.abs(scores) * (factor**late - 1), 0)
    return jnp.where(ends & (late > 0), scores + gain, scores)


def suppress_tokens(scores: Array, text: Text, value: Any, least: int) -> Array:
    return jnp.where(value, NEVER, scores)


def begin_suppress_tokens(scores: Array, text: Text, value: Any, least: int) -> Array:
    tokens, forced = value  # behind a first token that is forced comes the one that counts as the first
    first = jnp.where(forced & (text.prompt - text.start <= 1), 1, 0)
    return jnp.where(tokens & (text.new == first), NEVER, scores)


def temperature(scores: Array, text: Text, value: Any, least: int) -> Array:
    return scores / value


def top_k(scores: Array, text: Text, value: Any, least: int) -> Array:
    likeliest = lax.top_k(scores, min(len(value), scores.shape[1]))[0]
    smallest = jnp.where(value[: likeliest.shape[1]], likeliest, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(scores < smallest, NEVER, scores)


def top_p(scores: Array, text: Text, value: Any, least: int) -> Array:
    order = scores.argsort(axis=-1)
    ascending = jnp.take_along_axis(scores, order, axis=-1)
    rare = jax.nn.softmax(ascending).cumsum(axis=-1) <= value
    return _back(ascending, order, rare.at[:, -least:].set(False))


def min_p(scores: Array, text: Text, value: Any, least: int) -> Array:
    chances = jax.nn.softmax(scores)
    rare = chances < value * chances.max(axis=-1, keepdims=True)
    kept = lax.top_k(chances, least)[1]
    return jnp.where(rare.at[jnp.arange(len(scores))[:, None], kept].set(False), NEVER, scores)


def typical_p(scores: Array, text: Text, value: Any, least: int) -> Array:
    information = -jax.nn.log_softmax(scores)
    expected = jnp.nansum(information * jnp.exp(-information), axis=-1, keepdims=True)
    distance = jnp.abs(information - expected)
    order = distance.argsort(axis=-1)
    nearest, distance = (jnp.take_along_axis(x, order, axis=-1) for x in (scores, distance))
    before = (jax.nn.softmax(nearest).cumsum(axis=-1) < value).sum(axis=-1, keepdims=True)
    last = jnp.take_along_axis(distance, jnp.minimum(before, scores.shape[1] - 1), axis=-1)
    return _back(nearest, order, (distance > last).at[:, :least].set(False))


def _back(ordered: Array, order: Array, dropped: Array) -> Array:
    """Ordered scores without those dropped, in the vocabulary's order again."""
    return jnp.put_along_axis(ordered, order, jnp.where(dropped, NEVER, ordered), axis=-1, inplace=False)


def epsilon_cutoff(scores: Array, text: Text, value: Any, least: int) -> Array:
    return _cut(scores, value, least)


def eta_cutoff(scores: Array, text: Text, value: Any, least: int) -> Array:
    logs, chances = jax.nn.log_softmax(scores), jax.nn.softmax(scores)
    entropy = -jnp.where(chances > 0, logs * chances, 0).sum(axis=-1, keepdims=True)
    return _cut(scores, jnp.minimum(value, jnp.sqrt(value) * jnp.exp(-entropy)), least)


def _cut(scores: Array, cutoff: Any, least: int) -> Array:
    rare = (jax.nn.softmax(scores) < cutoff) & (scores < lax.top_k(scores, least)[0][:, -1:])
    return jnp.where(rare, NEVER, scores)


def renormalize_logits(scores: Array, text: Text, value: Any, least: int) -> Array:
    return jax.nn.log_softmax(scores)


PROCESSORS: dict[str, Callable[[Array, Text, Any, int], Array]] = {
    f.__name__: f
    for f in (
        guidance_scale, sequence_bias, encoder_repetition_penalty, repetition_penalty, no_repeat_ngram_size,
        encoder_no_repeat_ngram_size, min_new_tokens, forced_bos_token_id, forced_eos_token_id, remove_invalid_values,
        exponential_decay_length_penalty, suppress_tokens, begin_suppress_tokens, temperature, top_k, top_p, min_p,
        typical_p, epsilon_cutoff, eta_cutoff, renormalize_logits,
    )
} | {"bad_words_ids": sequence_bias}  # fmt: skip


def values(settings: Settings, vocabulary: int) -> dict[str, Any]:
    """The values of `settings.processors` as arguments of a compiled program: other numbers need no other program."""
    given = settings.processors
    mask = partial(chosen, vocabulary=vocabulary)
    ends = mask(settings.eos_token_ids)
    prepared: dict[str, Callable[[Any], Any]] = {
        "encoder_repetition_penalty": lambda penalty: 1 / penalty,
        "min_new_tokens": lambda count: (count, ends),
        "forced_bos_token_id": mask,
        "forced_eos_token_id": lambda ids: (mask(ids), settings.max_new_tokens - 1),
        "exponential_decay_length_penalty": lambda value: (*value, ends),
        "suppress_tokens": mask,
        "begin_suppress_tokens": lambda ids: (mask(ids), "forced_bos_token_id" in given),
        "top_k": lambda k: _first(max(k, settings.least)),
        "top_p": lambda p: 1 - p,
    }
    return {name: prepared.get(name, lambda value: value)(given[name]) for name in given if name in PROCESSORS}


def chosen(ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """[V]: which tokens are among the ids."""
    mask = np.zeros(vocabulary, bool)
    mask[list(ids)] = True
    return mask


def process(scores: Array, text: Text, numbers: Numbers, plan: Plan) -> Array:
    """The scores [R, V] that a token is chosen from."""
    for name in plan.names:
        if name == "logits_processor":
            for function in plan.functions:
                scores = function(text.from_the_left(numbers.pad), scores, text.end - text.start)
        else:
            scores = PROCESSORS[name](scores, text, numbers.values[name], plan.least)
    return scores


def _first(k: int) -> np.ndarray:
    """The first k of a power of two: a program takes every k up to it."""
    return np.arange(max(64, 1 << (k - 1).bit_length())) < k


def draw(scores: Array, key: Array | None) -> Array:
    """The next token of each row, [R]: the likeliest, or with a key drawn."""
    chosen = scores.argmax(axis=-1) if key is None else jax.random.categorical(key, scores)
    return chosen.astype(jnp.int32)
