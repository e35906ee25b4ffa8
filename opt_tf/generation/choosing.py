"""From logits to tokens: what the settings do to the logits, and the draw.

R rows   V vocabulary   C columns of the texts
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.generation import Sequences, Settings, allowed

# A filter that needs the likeliest tokens looks at so many of them first: to sort all takes XLA ten times as long.
FEW, MORE = 64, 1024


class Plan(NamedTuple):
    """What is fixed in a compiled program: another one takes another program.

    room: the columns for new tokens. names: of the processors, in order. least, most: how many tokens the filters keep
    at least, and how many the largest are sought among for top_k. functions: those of `logits_processor`; allowed:
    `prefix_allowed_tokens_fn`, which no program holds. draft: its length, or 0; longest: the most tokens to look for.
    """

    room: int
    names: tuple[str, ...]
    functions: tuple[Callable[..., Any], ...]
    allowed: Callable[..., Any] | None
    least: int
    most: int
    do_sample: bool
    num_beams: int
    num_return_sequences: int
    early_stopping: bool | str
    use_cache: bool
    keep_cache: bool
    output_scores: bool
    output_logits: bool
    draft: int
    longest: int

    @classmethod
    def of(cls, settings: Settings, room: int, V: int, draft: int) -> Plan:
        processors, least = settings.processors, settings.least
        k = max(processors.get("top_k", 0), least)
        return cls(
            room=room,
            names=tuple(_processors(settings)),
            functions=processors.get("logits_processor", ()),
            allowed=processors.get("prefix_allowed_tokens_fn"),
            least=min(least, V),
            most=next((n for n in (FEW, MORE) if k <= n < V), V),
            do_sample=settings.do_sample,
            num_beams=settings.num_beams,
            num_return_sequences=settings.num_return_sequences,
            early_stopping=settings.early_stopping,
            use_cache=settings.use_cache,
            keep_cache=settings.return_dict_in_generate,
            output_scores=settings.output_scores,
            output_logits=settings.output_logits,
            draft=draft,
            longest=settings.max_matching_ngram_size,
        )

    @property
    def copies(self) -> int:
        """How many rows there are for each prompt."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


class Numbers(NamedTuple):
    """The settings that are tensors in the program; another value takes no other program. Those that are not whole are
    float64, for the arithmetic among them, and become float32 where they meet the logits."""

    max_new_tokens: Tensor
    eos_token_ids: Tensor
    pad_token_id: Tensor
    length_penalty: Tensor
    seed: Tensor
    processors: dict[str, Any]

    @classmethod
    def of(cls, settings: Settings, seed: Tensor) -> Numbers:
        values = {k: v for k, v in _processors(settings).items() if not callable(v) and k != "logits_processor"}
        return cls(
            _tensor(settings.max_new_tokens),
            tf.constant(settings.eos_token_ids, tf.int32, (len(settings.eos_token_ids),)),
            _tensor(settings.pad_token_id),
            _tensor(settings.length_penalty),
            seed,
            {k: Sequences(*map(_tensor, v)) if isinstance(v, Sequences) else _tensor(v) for k, v in values.items()},
        )


def _processors(settings: Settings) -> dict[str, Any]:
    """The processors, and always those whose numbers can say nothing: another number then takes no other program."""
    always = {"min_new_tokens": 0} | ({"temperature": 1.0} if settings.do_sample else {})
    found = always | settings.processors
    return {name: found[name] for name in sorted(found, key=[*PROCESSORS].index)}


def _tensor(value: Any) -> Tensor:
    array = np.asarray(value)
    return tf.constant(array.astype(np.int32) if array.dtype.kind == "i" else array)


class Seen(NamedTuple):
    """What the processors see.

    text: [R, C] int32, a row's prompt, its padding in front, then its new tokens, then room.
    padding: [R], how many columns of the mask are padding. width: how many columns the prompts have.
    step: how many new tokens there are. guide: [R, V], the logits that guidance moves away from.
    """

    text: Tensor
    padding: Tensor
    width: Tensor
    step: Tensor
    guide: Any
    numbers: Numbers
    plan: Plan

    @property
    def end(self) -> Tensor:
        """How many columns are taken."""
        return self.width + self.step


def process(logits: Tensor, seen: Seen) -> Tensor:
    """The float32 [R, V] that tokens are chosen from."""
    scores = tf.cast(logits, tf.float32)
    for name in seen.plan.names:
        scores = PROCESSORS[name](scores, seen.numbers.processors.get(name), seen)
    return scores


def gumbel(shape: Any, seen: Seen) -> Tensor:
    """Noise: where log probabilities and it are largest, a draw from them falls; the largest n are n draws without
    replacement."""
    seed = tf.random.experimental.stateless_fold_in(seen.numbers.seed, seen.step)
    return -tf.math.log(-tf.math.log(tf.random.stateless_uniform(shape, seed)))


def choose(scores: Tensor, seen: Seen) -> Tensor:
    """The next token of each row, [R]."""
    if seen.plan.do_sample:
        scores += gumbel(tf.shape(scores), seen)
    return tf.argmax(scores, axis=-1, output_type=tf.int32)


def among(tokens: Tensor, some: Tensor) -> Tensor:
    """Which of the tokens, of any shape, are among some."""
    return tf.reduce_any(tokens[..., None] == some, axis=-1)


def _among(scores: Tensor, some: Tensor) -> Tensor:
    return among(tf.range(tf.shape(scores)[1]), some)


def _listed(tokens: Tensor, wanted: Tensor, scores: Tensor) -> Tensor:
    """[R, V]: whether a token is among the wanted ones of `tokens` [R, C]."""
    (R, C), V = ops.shape(tokens), ops.shape(scores)[1]
    at = tf.stack([tf.broadcast_to(tf.range(R)[:, None], (R, C)), tf.where(wanted, tokens, V)], axis=-1)
    return tf.scatter_nd(at, tf.ones((R, C), tf.int32), (R, V + 1))[:, :-1] > 0


def _columns(seen: Seen) -> Tensor:
    return tf.range(tf.shape(seen.text)[1])


def _guidance(scores: Tensor, scale: Tensor, seen: Seen) -> Tensor:
    away = tf.nn.log_softmax(tf.cast(seen.guide, tf.float32))
    return tf.cast(scale, tf.float32) * (tf.nn.log_softmax(scores) - away) + away


def _biases(scores: Tensor, sequences: Any, seen: Seen) -> Tensor:
    n = ops.shape(sequences.before)[1]
    at = seen.end - n + tf.range(n)
    tail = tf.where(at >= 0, tf.gather(seen.text, tf.maximum(at, 0), axis=1), -1)[:, None]  # [R, 1, n]
    there = tf.reduce_all((tail == sequences.before) | (sequences.before < 0), axis=2)  # [R, S]
    bias = tf.transpose(tf.where(there, sequences.bias, 0))
    return scores + tf.transpose(tf.math.unsorted_segment_sum(bias, sequences.last, tf.shape(scores)[1]))


def _penalized(scores: Tensor, penalty: Tensor, listed: Tensor) -> Tensor:
    penalty = tf.cast(penalty, tf.float32)
    return tf.where(listed, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def _encoder_repetition(scores: Tensor, penalty: Tensor, seen: Seen) -> Tensor:
    prompt = tf.broadcast_to(_columns(seen) < seen.width, tf.shape(seen.text))
    return _penalized(scores, 1 / penalty, _listed(seen.text, prompt, scores))


def _repetition(scores: Tensor, penalty: Tensor, seen: Seen) -> Tensor:
    columns = _columns(seen)
    real = (columns >= seen.padding[:, None]) & (columns < seen.end)
    return _penalized(scores, penalty, _listed(seen.text, real, scores))


def _no_repeat(scores: Tensor, n: Tensor, seen: Seen, prompt_only: bool = False) -> Tensor:
    """Without the tokens that would write a sequence of n tokens again."""
    columns = _columns(seen)
    within = (columns >= n - 1) & (columns < (seen.width if prompt_only else seen.end)) & (seen.end >= n)

    def further(i: Tensor, before: Tensor, matched: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = tf.concat([tf.fill((tf.shape(before)[0], 1), -1), before[:, :-1]], axis=1)  # i tokens before each
        last = tf.gather(seen.text, tf.maximum(seen.end - i, 0), axis=1)[:, None]
        return i + 1, tf.ensure_shape(before, seen.text.shape), matched & (before == last)

    start = (tf.constant(1), seen.text, tf.broadcast_to(within, tf.shape(seen.text)))
    _, _, matched = tf.while_loop(lambda i, *_: i < n, further, start)
    return tf.where(_listed(seen.text, matched, scores), -np.inf, scores)


def _min_new_tokens(scores: Tensor, n: Tensor, seen: Seen) -> Tensor:
    return tf.where(_among(scores, seen.numbers.eos_token_ids) & (seen.step < n), -np.inf, scores)


def _forced(scores: Tensor, ids: Tensor, now: Tensor) -> Tensor:
    return tf.where(now, tf.where(_among(scores, ids), 0.0, -np.inf)[None], scores)


def _finite(scores: Tensor, _: Tensor, seen: Seen) -> Tensor:
    scores = tf.where(tf.math.is_nan(scores), 0.0, scores)
    return tf.clip_by_value(scores, scores.dtype.min, scores.dtype.max)


def _decay(scores: Tensor, value: Tensor, seen: Seen) -> Tensor:
    beyond = tf.cast(seen.step, tf.float64) - value[0]
    more = tf.abs(scores) * tf.cast(value[1] ** beyond - 1, tf.float32)
    more = tf.where(tf.math.is_finite(scores) & _among(scores, seen.numbers.eos_token_ids), more, 0.0)
    return tf.where(beyond > 0, scores + more, scores)


def _suppressed(scores: Tensor, ids: Tensor, seen: Seen) -> Tensor:
    return tf.where(_among(scores, ids), -np.inf, scores)


def _suppressed_first(scores: Tensor, ids: Tensor, seen: Seen) -> Tensor:
    forced = "forced_bos_token_id" in seen.plan.names  # the first token is then the second
    first = tf.where(seen.width > 1, 0, 1) if forced else 0
    return tf.where(seen.step == first, _suppressed(scores, ids, seen), scores)


def _functions(scores: Tensor, _: None, seen: Seen) -> Tensor:
    """Those of `logits_processor`: of (ids, scores), or of (ids, scores, cur_len), as transformers' TFLogitsProcessor,
    whose ids have room behind cur_len columns."""
    for function in seen.plan.functions:
        parameters = inspect.signature(function).parameters.values()
        needed = [p for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
        if len(needed) > 2:
            scores = function(seen.text, scores, seen.end)
        else:
            scores = function(seen.text[:, : seen.end], scores)
    return scores


def _temperature(scores: Tensor, temperature: Tensor, seen: Seen) -> Tensor:
    return scores / tf.cast(temperature, tf.float32)


def _largest(scores: Tensor, n: int) -> Tensor:
    """[R, 1]: the n-th largest."""
    return tf.math.top_k(scores, n).values[:, -1:]


def _top_k(scores: Tensor, k: Tensor, seen: Seen) -> Tensor:
    largest = tf.math.top_k(scores, seen.plan.most).values
    lowest = tf.gather(largest, tf.maximum(k, seen.plan.least) - 1, axis=1)[:, None]
    return tf.where(scores < lowest, -np.inf, scores)


def _top_p(scores: Tensor, p: Tensor, seen: Seen) -> Tensor:
    V, total = scores.shape[1], tf.reduce_logsumexp(scores, axis=1, keepdims=True)

    def cut(n: int) -> tuple[Tensor, Tensor]:
        """[R, 1] each: how many of the n largest stay, and the smallest of them."""
        largest = tf.math.top_k(scores, n).values
        before = tf.cumsum(tf.exp(largest - total), axis=1, exclusive=True)
        stay = tf.reduce_sum(tf.cast(before < tf.cast(p, tf.float32), tf.int32), axis=1, keepdims=True)
        stay = tf.maximum(stay, seen.plan.least)  # else, what came before is already enough
        return stay, tf.gather(largest, stay - 1, batch_dims=1)

    few = min(MORE, V)
    stay, lowest = cut(few)
    if few < V:
        stay, lowest = tf.cond(tf.reduce_all(stay < few), lambda: (stay, lowest), lambda: cut(V))
    more, equal = scores > lowest, scores == lowest
    spare = stay - tf.reduce_sum(tf.cast(more, tf.int32), axis=1, keepdims=True)  # of equal ones, the last stay
    equal &= tf.cumsum(tf.cast(equal, tf.int32), axis=1, reverse=True) <= spare
    return tf.where(more | equal, scores, -np.inf)


def _min_p(scores: Tensor, p: Tensor, seen: Seen) -> Tensor:
    chances = tf.nn.softmax(scores)
    bound = tf.cast(p, tf.float32) * tf.reduce_max(chances, axis=1, keepdims=True)
    return tf.where(chances < tf.minimum(bound, _largest(chances, seen.plan.least)), -np.inf, scores)


def _typical_p(scores: Tensor, p: Tensor, seen: Seen) -> Tensor:
    logs, chances = tf.nn.log_softmax(scores), tf.nn.softmax(scores)
    entropy = -tf.reduce_sum(tf.math.multiply_no_nan(logs, chances), axis=1, keepdims=True)
    far = tf.abs(-logs - entropy)
    order = tf.argsort(far)
    sums = tf.cumsum(tf.gather(chances, order, batch_dims=1), axis=1)
    last = tf.reduce_sum(tf.cast(sums < tf.cast(p, tf.float32), tf.int32), axis=1, keepdims=True)
    last = tf.clip_by_value(last, seen.plan.least - 1, ops.shape(scores)[1] - 1)
    bound = tf.gather(far, tf.gather(order, last, batch_dims=1), batch_dims=1)
    return tf.where(far > bound, -np.inf, scores)


def _epsilon(scores: Tensor, epsilon: Tensor, seen: Seen) -> Tensor:
    unlikely = tf.nn.softmax(scores) < tf.cast(epsilon, tf.float32)
    return tf.where(unlikely & (scores < _largest(scores, seen.plan.least)), -np.inf, scores)


def _eta(scores: Tensor, epsilon: Tensor, seen: Seen) -> Tensor:
    logs, chances = tf.nn.log_softmax(scores), tf.nn.softmax(scores)
    entropy = -tf.reduce_sum(tf.math.multiply_no_nan(logs, chances), axis=1, keepdims=True)
    epsilon = tf.cast(epsilon, tf.float32)
    unlikely = chances < tf.minimum(epsilon, tf.sqrt(epsilon) * tf.exp(-entropy))
    return tf.where(unlikely & (scores < _largest(scores, seen.plan.least)), -np.inf, scores)


# Of (scores [R, V], the option's value, what is seen): the scores after it. In transformers' order
PROCESSORS: dict[str, Callable[..., Tensor]] = {
    "guidance_scale": _guidance,
    "sequence_bias": _biases,
    "encoder_repetition_penalty": _encoder_repetition,
    "repetition_penalty": _repetition,
    "no_repeat_ngram_size": _no_repeat,
    "encoder_no_repeat_ngram_size": lambda scores, n, seen: _no_repeat(scores, n, seen, prompt_only=True),
    "bad_words_ids": _biases,
    "min_new_tokens": _min_new_tokens,
    "prefix_allowed_tokens_fn": lambda scores, _, seen: tf.constant(
        allowed(seen.plan.allowed, seen.plan.num_beams, seen.text[:, : seen.end], scores.numpy())
    ),
    "forced_bos_token_id": lambda scores, ids, seen: _forced(scores, ids, seen.end == 1),
    "forced_eos_token_id": lambda scores, ids, seen: _forced(scores, ids, seen.step == seen.numbers.max_new_tokens - 1),
    "remove_invalid_values": _finite,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed_first,
    "logits_processor": _functions,
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical_p,
    "epsilon_cutoff": _epsilon,
    "eta_cutoff": _eta,
    "renormalize_logits": lambda scores, _, seen: tf.nn.log_softmax(scores),
}
