"""Matrix products by their fastest route, and the Linears that take it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from opt_common.config import OPTConfig


def linear(
    config: OPTConfig, into: int, out: int, bias: bool = True, *, dtype: DTypeLike = "float32", rngs: nnx.Rngs
) -> nnx.Linear:
    """An nnx.Linear whose kernel is drawn from N(0, init_std²), with `product` as its matrix product."""
    init = nnx.initializers.normal(config.init_std)
    return nnx.Linear(
        into, out, use_bias=bias, dtype=dtype, param_dtype=dtype, kernel_init=init, dot_general=product, rngs=rngs
    )


# Up to so many tokens, a CPU multiplies a kernel [out, in] by the tokens, not the tokens by the kernel.
FEW = 128


def product(
    x: Array,
    kernel: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **how: Any,
) -> Array:
    """`lax.dot_general` of x [..., in] and a kernel, [in, out] or [out, in], in the form that is fastest here.

    The time of a product of few tokens is that of reading its kernel, and its form decides how fast that is:
    benchmarks/NOTES.md.
    """
    (_, (axis,)), _ = dimension_numbers
    tokens, platform = x.size // x.shape[-1], default_device().platform
    dtype = preferred_element_type or x.dtype
    # half precision is accumulated in float32; on a GPU the result of many tokens is not written to memory that wide
    wider = dtype if platform == "gpu" and tokens != 1 else jnp.promote_types(dtype, jnp.float32)
    if platform == "gpu" and tokens == 1:  # XLA makes one program of it and of what comes before and after
        column = jnp.expand_dims(x.reshape(-1).astype(wider), 1 - axis)
        return (kernel.astype(wider) * column).sum(axis).astype(dtype).reshape(*x.shape[:-1], -1)
    # an exported program's number of tokens may be a symbol, which cannot be compared with a number
    if platform == "cpu" and axis == 1 and isinstance(tokens, int) and tokens <= FEW:
        y = lax.dot_general(
            kernel, x.reshape(tokens, -1), (((1,), (1,)), ((), ())), precision, preferred_element_type=wider
        )
        # the barrier keeps XLA from swapping the operands back, which would copy the kernel
        return lax.optimization_barrier(y).T.astype(dtype).reshape(*x.shape[:-1], -1)
    y = lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type=wider, **how)
    return y.astype(dtype)


def head(model: Any, x: Array) -> Array:
    """The logits [..., V] of hidden states [..., E]: by `lm_head`, or by the token embedding if it is tied."""
    if model.lm_head is not None:
        return model.lm_head(x)
    table = model.model.decoder.embed_tokens.embedding[...]  # [V, E]
    return product(x, table, (((x.ndim - 1,), (1,)), ((), ())))


def default_device() -> Any:
    """The device that JAX computes on, of arrays that are not bound to one; traced arrays are not."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen or jax.devices()[0]
