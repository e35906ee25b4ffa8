"""The ways to attend, and what each token may see.

q [N, B, T, D]; k, v [N, B, S, D]; mask: what each query may see, a View. Result [B, T, N, D], and the weights
[B, N, T, S] from the one that has them. Heads are outermost, so that what is sharded by heads over several devices
stays so in the cache too, and an axis of their own, so that what is sharded by rows does.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .layers import dropout
from .products import default_device

IMPLEMENTATIONS = ("eager", "sdpa", "cudnn")


class Alignment(NamedTuple):
    """A padded batch with the real tokens of each row first, as cuDNN takes it: padding is a length.

    order: [B, T], the column whose token comes to each place; back: [B, T], the place where each column went.
    lengths: [B] int32, the real tokens of each row.
    """

    order: Array
    back: Array
    lengths: Array


# A mask [B or 1, 1, T, S], boolean (true: attends) or additive (0: attends); None: all earlier slots and its own
View = ArrayLike | Alignment | None
Way = Callable[[Array, Array, Array, View, float, Callable[[Array], Array]], tuple[Array, Array | None]]


def attend(
    module: Any,
    q: Array,
    k: Array,
    v: Array,
    mask: View,
    output_attentions: bool = False,
    rngs: nnx.Rngs | None = None,
) -> tuple[Array, Array | None]:
    """Attend by the implementation that the config of `module`, an attention, names; by the eager formula if the
    weights are wanted."""
    name, drops = module.config._attn_implementation, rngs is not None and module.dropout > 0
    way = choose_way(
        name,
        default_device(),
        q.dtype,
        q.shape[2],
        k.shape[2],
        q.shape[3],
        masked=not (mask is None or isinstance(mask, Alignment)),
        drops=drops,
        weights=output_attentions,
    )
    out, weights = way(q, k, v, mask, module.scaling, lambda w: dropout(w, module.dropout, rngs))
    return out, weights if output_attentions or name == "eager" else None


def eager(
    q: Array, k: Array, v: Array, mask: View, scaling: float, drop: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The formula written out, which gives the weights [B, N, T, S]. Scores and softmax are float32 in half precision
    too."""
    assert not isinstance(mask, Alignment)
    (*heads_rows, T, D), S = q.shape, k.shape[2]
    mask = causal(T, S) if mask is None else jnp.asarray(mask)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # The query is scaled, not the scores, as OPT was trained: in half precision that differs. The factor stays
    # float32: rounded to bfloat16, the 80^-½ of 2.7b is off by 0.2 %, for every query alike.
    q = (q.astype(wide) * scaling).astype(q.dtype)
    if S != T:  # k and v come from a cache, which XLA would copy in any shape but its own, [N·B, S, D]
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=wide).reshape(*heads_rows, T, S)
    mask = mask.swapaxes(0, 1)
    scores = jnp.where(mask, scores, jnp.finfo(wide).min) if mask.dtype == bool else scores + mask.astype(wide)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("...ts,...sd->...td", drop(weights).reshape(*q.shape[:-1], S), v)
    return heads_last(out.reshape(*heads_rows, T, D)), weights.swapaxes(0, 1)


def cudnn(
    q: Array, k: Array, v: Array, mask: View, scaling: float, drop: Callable[[Array], Array]
) -> tuple[Array, None]:
    """cuDNN's flash attention; it scales the scores while they are still float32, and has no dropout."""
    how: dict[str, Any] = {"is_causal": True}
    if isinstance(mask, Alignment):
        how |= {"query_seq_lengths": mask.lengths, "key_value_seq_lengths": mask.lengths}
    elif mask is not None:
        mask = jnp.asarray(mask)
        how = {"mask": mask} if mask.dtype == bool else {"bias": mask.astype(q.dtype)}
    q, k, v = map(heads_last, (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, scale=scaling, implementation="cudnn", **how), None


def check_implementation(name: str) -> None:
    """Raise ValueError for a name that is none."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation: found {name!r}, wanted one of {', '.join(IMPLEMENTATIONS)}")


def choose_way(
    name: str, device: Any, dtype: DTypeLike, T: int, S: int, D: int, masked: bool, drops: bool, weights: bool
) -> Way:
    """How an implementation attends in a call: T queries to S slots, D wide, on a jax.Device.

    masked: a mask says what is seen, not causality and lengths alone. drops: attention weights are dropped. weights:
    they are returned. "sdpa" takes cuDNN wherever it can run and there is more than one query.
    Raises ValueError where "cudnn" is asked for and cannot run: nothing else is run in its place.
    """
    if name == "eager" or weights:
        return eager
    why = refusal(device, dtype, T, S, D, masked, drops)
    if name == "cudnn" and why is not None:
        raise ValueError(f"attn_implementation: 'cudnn' cannot run: {why}, or take 'sdpa'")
    return cudnn if name == "cudnn" or (why is None and T > 1) else eager


def refusal(device: Any, dtype: DTypeLike, T: int, S: int, D: int, masked: bool, drops: bool) -> str | None:
    """Why cuDNN's flash attention does not take a call, and what to do about it; None if it does."""
    if device.platform != "gpu" or not device.compute_capability[:1].isdigit():  # AMD's are called gfx90a
        return f"the model is on {device.platform}; move it to an NVIDIA GPU"
    if float(device.compute_capability) < 8:
        return f"{device.device_kind} has compute capability below 8.0; use a newer GPU"
    if dtype not in (jnp.float16, jnp.bfloat16):
        return f"it computes in {jnp.dtype(dtype).name}; load it with dtype='float16' or 'bfloat16'"
    if D % 8 or D > 128:  # gradients of wider heads need a newer GPU than the forward pass
        return f"heads are {D} wide, not a multiple of 8 up to 128"
    if masked and T > 1 and (T % 2 or S % 2):  # one query is a step of `generate`, which has no gradients
        return f"a mask of {T} x {S} is not even, which gradients need; pad by a column"
    if drops:
        return "it drops no attention weights; set attention_dropout to 0"
    return None


def choose(
    decoder: Any,
    segments: Array | None,
    past: int | Array,
    x: Array,
    output_attentions: bool,
    packed: bool,
    rngs: nnx.Rngs | None,
) -> View:
    """What each of the new tokens x [B, T, H] may see, in the form that the decoder's implementation takes.

    segments: [B, S], the document of each slot; None: all are one document. past: how many slots come before the new
    tokens; a Python 0 if there is no past, or an empty one. packed: whether a row can hold several documents.
    """
    config, T = decoder.config, x.shape[1]
    fresh = isinstance(past, int)
    S = T if segments is None or fresh else segments.shape[1]
    drops = rngs is not None and config.attention_dropout > 0
    way = choose_way(
        config._attn_implementation,
        default_device(),
        x.dtype,
        T,
        S,
        config.head_dim,
        masked=packed or not fresh,
        drops=drops,
        weights=output_attentions,
    )
    if segments is None:
        return None
    if way is cudnn and fresh and not packed:
        return align(segments[:, :T] > 0)
    return dense(segments[:, :S], past, T)


def compact(x: Array, view: View) -> Array:
    """x [B, T, H] as the layers take it: with the real tokens of each row first where the view says so."""
    return reorder(x, view.order) if isinstance(view, Alignment) else x


def restore(x: Array, view: View) -> Array:
    """The inverse of `compact`."""
    return reorder(x, view.back) if isinstance(view, Alignment) else x


def causal(T: int, S: int) -> Array:
    """[1, 1, T, S]: the last T of S tokens see every earlier one and themselves."""
    slots = jnp.arange(S)
    return (slots[S - T :, None] >= slots)[None, None]


def dense(segments: Array, past: int | Array, T: int) -> Array:
    """The mask [B, 1, T, S]: a token attends to the earlier slots of its own document.

    segments: [B, S], the document of each slot, counted from 1; 0 is padding, which nothing real attends to. As in
    transformers, padding attends to the real tokens before it (here: of the latest document); where there are none, in
    left padding, to padding, so that no row of the mask is empty. past: how many slots come before the T new tokens. It
    can be traced, so all slots are in the mask: those behind the new tokens are nobody's past.
    """
    slots = jnp.arange(segments.shape[1])
    earlier = (past + slots[:T])[:, None] >= slots
    documents = jnp.where(earlier, segments[:, None], 0).max(axis=2, keepdims=True)  # they grow to the right
    return (earlier & (documents == segments[:, None]))[:, None]


def align(real: Array) -> Alignment:
    """The alignment of a batch whose real tokens are [B, T] boolean. A row without any keeps one of its padding: a
    softmax over nothing is NaN."""
    order = jnp.argsort(~real, axis=1, stable=True)
    lengths = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)
    return Alignment(order, jnp.argsort(order, axis=1), lengths)


def heads_first(x: Array, heads: int) -> Array:
    """[B, T, N·D] as [N, B, T, D]."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(2, 0, 1, 3)


def heads_last(x: Array) -> Array:
    """[N, B, T, D] as [B, T, N, D]."""
    return x.transpose(1, 2, 0, 3)


def reorder(x: Array, columns: Array) -> Array:
    """x [B, T, ...] with the columns [B, T] of each row in that order."""
    return jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)
