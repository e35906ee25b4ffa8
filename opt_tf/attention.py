"""How to attend, and what each token may see.

B batch   T new tokens   S slots: all of a cache, or T without one   t, s of a block of them
N heads   D head width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from .layers import wide

# A long call is computed in blocks of tokens, each with the slots up to its last one: of 4 blocks, 3/8 of the scores
# are never computed; of 8, 7/16, in a larger program. A block has at least FEWEST tokens.
BLOCKS, FEWEST = 4, 64


@dataclass(frozen=True, eq=False)
class Blocks:
    """What the tokens of a call may see. masks: for every t of the T tokens, a boolean one [B or 1, 1, t, s] of the
    first s slots; none of the t sees more."""

    masks: tuple[Tensor, ...]


# A mask [B or 1, 1, T, S], boolean (true: attends) or additive (0: attends); None: all earlier slots and its own
View = Tensor | Blocks | None


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: View,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend with the scaling and dropout of `module`, an attention: of q [B, N, T, D] and k, v [B, N, S, D] or
    [B·N, S, D], return the result [B, T, N·D] and, if wanted, the weights [B, N, T, S], each head's times its factor in
    head_mask [N].

    The query is scaled, not the scores, as OPT was trained: in half precision that differs. The factor stays float32:
    rounded to bfloat16, the 80^-½ of 2.7b would be off, for every query alike. The softmax is float32 too.
    """
    (B, N, T, D), S = ops.shape(q), ops.shape(k)[-2]
    scaled = ops.cast(wide(q) * module.scaling, q.dtype)
    # XLA's products read these without a copy; of four dimensions they make one if B is 1
    query, keys, values = (ops.reshape(x, (B * N, n, D)) for x, n in ((scaled, T), (k, S), (v, S)))
    first, outs, attentions = 0, [], []
    for part in _masks(mask, T, S):
        t, s = ops.shape(part)[2:]
        scores = tf.matmul(query[:, first : first + t], keys[:, :s], transpose_b=True)
        scores = wide(ops.reshape(scores, (B, N, t, s)))
        lowest = scores.dtype.min
        if part.dtype == tf.bool:
            scores = ops.where(part, scores, lowest)
        else:
            scores = ops.maximum(scores + ops.cast(part, scores.dtype), lowest)
        weights = ops.cast(tf.nn.softmax(scores), q.dtype)  # [B, N, t, s]
        if head_mask is not None:
            weights *= ops.cast(head_mask, q.dtype)[:, None, None]
        outs.append(tf.matmul(ops.reshape(module.dropout(weights), (B * N, t, s)), values[:, :s]))
        if output_attentions:
            attentions.append(tf.pad(weights, ((0, 0), (0, 0), (0, 0), (0, S - s))))
        first += t
    out = ops.transpose(ops.reshape(ops.concatenate(outs, axis=1), (B, N, T, D)), (0, 2, 1, 3))
    return ops.reshape(out, (B, T, N * D)), ops.concatenate(attentions, axis=2) if output_attentions else None


def split_heads(x: Tensor, width: int) -> Tensor:
    """[B, T, N·D] as [B, N, T, D], of heads D = `width` wide."""
    B, T, H = ops.shape(x)
    return ops.transpose(ops.reshape(x, (B, T, H // width, width)), (0, 2, 1, 3))


def choose(segments: Tensor | None, past: Any, T: Any) -> Blocks:
    """What each of the T new tokens behind `past` others may see: the earlier slots of its own document.

    segments: [B, S], the document of each slot, counted from 1; 0 is padding, which nothing real attends to. As in
    transformers, padding attends to the real tokens before it (here: of the latest document); where there are none, in
    left padding, to padding, so that no row of a mask is empty. None: all are one document.
    """
    known = past if isinstance(past, int) else tf.get_static_value(past)
    if segments is None:
        return Blocks(_blocks(causal(T, past + T), known))
    # `past` may be a tensor, so the mask is as wide as the cache; causality hides the free slots
    earlier = past + ops.arange(T)[:, None] >= ops.arange(ops.shape(segments)[1])
    documents = ops.max(ops.where(earlier, segments[:, None], 0), axis=2, keepdims=True)  # they grow to the right
    mask = earlier & (documents == segments[:, None])
    return Blocks(_blocks(mask[:, None], known))


def causal(T: Any, S: Any) -> Tensor:
    """The mask [1, 1, T, S] of the last T of S tokens, each of which sees those before it and itself."""
    return (ops.arange(T)[:, None] + (S - T) >= ops.arange(S))[None, None]


def _masks(mask: View, T: Any, S: Any) -> tuple[Tensor, ...]:
    if isinstance(mask, Blocks):
        return mask.masks
    if mask is None:
        return (causal(T, S),)
    if len(mask.shape) != 4:
        raise ValueError(f"attention_mask: found shape {list(mask.shape)}, wanted [batch or 1, 1, tokens, slots]")
    return (mask,)


def _blocks(mask: Tensor, past: int | None) -> tuple[Tensor, ...]:
    """The mask [B or 1, 1, T, S] in at most BLOCKS parts of the T, each without the slots behind its last token; whole
    where T or the number of past tokens is not known yet."""
    T = mask.shape[2]
    if T is None or past is None:
        return (mask,)
    t = max(-(-T // BLOCKS), FEWEST)
    return tuple(mask[:, :, first : first + t, : past + min(first + t, T)] for first in range(0, T, t))
