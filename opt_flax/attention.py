"""The ways to attend, with one signature, and the rule that chooses between them.

q [B, T, N, D]; k, v [N·B, S, D]; view: what each query may see; drop: drops some of the weights. Result [B, T, N, D],
and the weights [B, N, T, S] from the one that has them. Heads are outermost in k and v, so that what is split by heads
over several devices stays so: an axis that holds rows and heads, rows first, could only be gathered.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

IMPLEMENTATIONS = ("eager", "sdpa", "cudnn")


class Alignment(NamedTuple):
    """The columns of a padded batch in another order: the real tokens of each row first, for cuDNN, which takes padding
    as a length.

    order: [B, T], the column that comes to stand at each place; back: [B, T], the place that each column went to.
    lengths: [B] int32, the real tokens of each row.
    """

    order: Array
    back: Array
    lengths: Array


View = Array | Alignment | None  # a mask [B or 1, 1, T, S]; None: all earlier tokens of the call and its own
Drop = Callable[[Array], Array]
Attend = Callable[[Array, Array, Array, View, Drop], tuple[Array, Array | None]]


def eager(q: Array, k: Array, v: Array, view: View, drop: Drop) -> tuple[Array, Array]:
    """Written out, for XLA and for those who want the weights [B, N, T, S]. Scores and softmax are float32 in half
    precision too."""
    assert not isinstance(view, Alignment)
    B, T, N, D = q.shape
    if view is None:
        slots = jnp.arange(T)
        view = (slots[:, None] >= slots)[None, None]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # The query is scaled, not the scores, as OPT was trained: in half precision it is not the same. The factor stays
    # float32: rounded to bfloat16, the 80^-½ of 2.7b is off by 0.2 %, for every query alike.
    q = heads_first((q.astype(wide) * D**-0.5).astype(q.dtype))
    scores = jnp.einsum("xtd,xsd->xts", q, k, preferred_element_type=wide).reshape(N, B, T, -1)
    weights = jax.nn.softmax(jnp.where(view.swapaxes(0, 1), scores, jnp.finfo(wide).min), axis=-1).astype(q.dtype)
    out = jnp.einsum("xts,xsd->xtd", drop(weights).reshape(N * B, T, -1), v)
    return out.reshape(N, B, T, D).transpose(1, 2, 0, 3), weights.swapaxes(0, 1)


def cudnn(q: Array, k: Array, v: Array, view: View, drop: Drop) -> tuple[Array, None]:
    """cuDNN's flash attention; it scales the scores while they are still float32, and drops nothing."""
    how: dict[str, Any] = {"is_causal": True}
    if isinstance(view, Alignment):
        how |= {"query_seq_lengths": view.lengths, "key_value_seq_lengths": view.lengths}
    elif view is not None:
        how = {"mask": view}
    B, _, N, D = q.shape
    k, v = (y.reshape(N, B, -1, D).transpose(1, 2, 0, 3) for y in (k, v))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **how), None


def check_implementation(name: str) -> None:
    """Raise ValueError for a name that is none."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation: found {name!r}, wanted one of {', '.join(IMPLEMENTATIONS)}")


def choose(
    name: str, device: Any, dtype: DTypeLike, T: int, S: int, D: int, masked: bool, drops: bool, weights: bool
) -> Attend:
    """The way that an implementation attends in a call: T queries to S slots, D wide, on a jax.Device.

    masked: a mask says what is seen, not causality and lengths alone. drops: attention weights are dropped.
    weights: somebody wants them. "sdpa" takes cuDNN wherever it can run and there is more than one query.
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
        return f"a mask of {T} x {S} is not even, as gradients want it; pad by a column"
    if drops:
        return "it drops no attention weights; set attention_dropout to 0"
    return None


def default_device() -> Any:
    """Where jax computes what is not bound to a device; what is traced is not."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen or jax.devices()[0]


def dense(segments: Array, past: int | Array, T: int) -> Array:
    """The mask [B, 1, T, S]: a token attends to the earlier slots of its own segment.

    segments: [B, S], the document of each slot, 0 for padding, which so attends to padding alone: no row of the mask
    is empty, and nothing real sees it. past: how many slots come before the T new tokens. It can be traced, so all
    slots are in the mask: those behind the new tokens are nobody's past.
    """
    slots = jnp.arange(segments.shape[1])
    new = lax.dynamic_slice_in_dim(segments, past, T, axis=1)
    causal = (past + slots[:T])[:, None] >= slots
    return (causal & (new[:, :, None] == segments[:, None, :]))[:, None]


def align(real: Array) -> Alignment:
    """Where the real tokens of a batch, [B, T] boolean, go and come from. A row without any keeps one of its padding:
    a softmax over nothing is NaN."""
    order = jnp.argsort(~real, axis=1, stable=True)
    lengths = jnp.maximum(real.sum(axis=1, dtype=jnp.int32), 1)
    return Alignment(order, jnp.argsort(order, axis=1), lengths)


def heads_first(x: Array) -> Array:
    """[B, T, N, D] as [N·B, T, D]."""
    return x.transpose(2, 0, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def reorder(x: Array, columns: Array) -> Array:
    """x [B, T, ...] with the columns [B, T] of each row in that order."""
    return jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)
