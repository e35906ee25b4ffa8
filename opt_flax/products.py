"""Matrix products by their fastest route, and the Linears that take it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from opt_common.config import OPTConfig


def linear(config: OPTConfig, into: int, out: int, bias: bool = True, *, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Linear:
    """An nnx.Linear whose kernel is drawn from N(0, init_std²), with `product` as its matrix product."""
    init = nnx.initializers.normal(config.init_std)
    return nnx.Linear(into, out, use_bias=bias, kernel_init=init, dot_general=product, rngs=rngs, **dtypes)


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
    tokens = x.size // x.shape[-1]
    # the number of tokens of an exported program may be a symbol, which cannot be compared with a number
    platform = default_device().platform if isinstance(tokens, int) else None
    dtype = preferred_element_type or x.dtype
    wide = jnp.promote_types(dtype, jnp.float32)  # half precision is accumulated in float32
    if platform == "gpu" and tokens == 1:
        y = _one_on_gpu(x.reshape(-1), kernel, axis, wide)
    elif platform == "cpu" and tokens <= FEW:
        y = _few_on_cpu(x.reshape(tokens, -1), kernel, axis, wide, precision)
    else:
        # on a GPU the result is not written to memory that wide: a forward pass of 2.7b takes 158 ms instead of 185
        wide = dtype if platform == "gpu" else wide
        return lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type=wide, **how).astype(
            dtype
        )
    return y.astype(dtype).reshape(*x.shape[:-1], -1)


def _one_on_gpu(x: Array, kernel: Array, axis: int, wide: DTypeLike) -> Array:
    if axis == 1:  # a row at a time; XLA makes one program of it and of what comes before and after
        return (kernel.astype(wide) * x.astype(wide)).sum(1)
    # of one row XLA would make a sum over columns, at half the speed; the barrier keeps it from cutting to one
    rows = jnp.broadcast_to(x, (8, len(x)))
    return lax.optimization_barrier(
        lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), preferred_element_type=wide)
    )[0]


# Up to so many tokens, a CPU multiplies a kernel [out, in] by the tokens, not the tokens by the kernel
FEW = 128


def _few_on_cpu(x: Array, kernel: Array, axis: int, wide: DTypeLike, precision: Any) -> Array:
    if axis == 1:
        y = lax.dot_general(kernel, x, (((1,), (1,)), ((), ())), precision, preferred_element_type=wide)
        return lax.optimization_barrier(y).T  # or XLA swaps the operands back, and so copies the kernel
    parts = 4 if 4 < len(x) <= 16 and len(kernel) % 4 == 0 else 1  # which the cores share
    x, kernel = x.reshape(len(x), parts, -1), kernel.reshape(parts, -1, kernel.shape[1])
    return lax.dot_general(x, kernel, (((2,), (1,)), ((1,), (0,))), precision, preferred_element_type=wide).sum(0)


def for_one_token(model: Any) -> Any:
    """A copy of the model whose kernels are [out, in], for the steps of one row on a GPU, twice as fast that way;
    the model itself elsewhere, or where the copy could fill the GPU's memory. For use within one compiled program."""
    device = default_device()
    linears = [m for _, m in nnx.iter_modules(model) if type(m) is nnx.Linear and m.dot_general is product]
    memory = device.memory_stats() if device.platform == "gpu" else None
    size = sum(linear.kernel.size * linear.kernel.dtype.itemsize for linear in linears)
    if memory is None or size > (memory["bytes_limit"] - memory["bytes_in_use"]) // 2:
        return model
    model = nnx.clone(model)
    for _, m in nnx.iter_modules(model):
        if type(m) is nnx.Linear and m.dot_general is product:
            m.kernel = nnx.Param(lax.optimization_barrier(m.kernel[...].T))
            m.dot_general = _transposed
    return model


def _transposed(x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None, **how: Any) -> Array:
    return product(x, kernel, rows(x), precision, **how)


def rows(x: Array) -> Any:
    """The dimension numbers of x [..., in] and a kernel [out, in]."""
    return (((x.ndim - 1,), (1,)), ((), ()))


def head(model: Any, x: Array) -> Array:
    """The logits [..., V] of hidden states [..., E]: by `lm_head`, or by the token embedding if it is tied."""
    if model.lm_head is not None:
        return model.lm_head(x)
    table = model.model.decoder.embed_tokens
    return product(x, table.embedding[...].astype(table.dtype), rows(x))  # [V, E]


def default_device() -> Any:
    """The device that JAX computes on, of arrays that are not bound to one; traced arrays are not."""
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen or jax.devices()[0]
