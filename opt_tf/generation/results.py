"""What `generate` returns.

R texts   T columns of the prompts   V vocabulary
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow import Tensor

from opt_common.outputs import GenerateOutput

from ..cache import KVCache
from .loop import Result
from .prompts import Call


def output(call: Call, found: Result, attentions: Any = (), hidden_states: Any = ()) -> Tensor | GenerateOutput:
    settings, n = call.settings, call.settings.num_return_sequences
    eager = tf.executing_eagerly()
    length, steps = (int(found.length), int(found.steps)) if eager else (settings.max_new_tokens,) * 2
    W = int(call.start.width) if eager else call.start.width
    tokens = tf.cast(found.text[:, W : W + length], call.prompts.dtype)
    sequences = tf.concat([tf.repeat(call.prompts, n, axis=0), tokens], axis=1)
    if not settings.return_dict_in_generate:
        return sequences
    beams = settings.num_beams > 1
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=found.sequences_scores if beams and settings.output_scores else None,
        scores=tuple(tf.unstack(found.scores[:steps])) if settings.output_scores else None,
        logits=tuple(tf.unstack(found.logits[:steps])) if settings.output_logits else None,
        beam_indices=found.beam_indices[:, :length] if beams else None,
        attentions=attentions if settings.output_attentions else None,
        hidden_states=hidden_states if settings.output_hidden_states else None,
        past_key_values=_without(found.cache, call.extra),
    )


def _without(cache: Any, extra: int) -> KVCache | None:
    """A cache without its first slots; None for none."""
    if not cache or not extra:
        return cache or None
    k, v = (tuple(x[:, extra:] for x in layers) for layers in (cache.k, cache.v))
    return KVCache(k, v, cache.length - extra, cache.segments[:, extra:])


def compute_transition_scores(
    self: Any,
    sequences: Tensor,
    scores: tuple[Tensor, ...],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """The score of each new token of `sequences` [R, T + new], [R, new], from the fields of a GenerateOutput: its entry
    in `scores`, or with normalize_logits its log probability. 0 behind the end of a beam search's text."""
    kept = tf.stack(scores, axis=1)  # [rows, new, V]
    if normalize_logits:
        kept = tf.nn.log_softmax(kept)
    if beam_indices is None:
        beam_indices = tf.broadcast_to(tf.range(kept.shape[0])[:, None], kept.shape[:2])
    there = beam_indices >= 0
    new = int(tf.reduce_max(tf.reduce_sum(tf.cast(there, tf.int32), axis=1)))
    there, rows = there[:, :new], tf.maximum(tf.cast(beam_indices[:, :new], tf.int32), 0)
    tokens = tf.cast(sequences[:, sequences.shape[1] - new :], tf.int32)
    steps = tf.broadcast_to(tf.range(new), rows.shape)
    return tf.where(there, tf.gather_nd(kept, tf.stack([rows, steps, tokens], axis=-1)), 0)
