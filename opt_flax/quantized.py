"""Linears of 8 and 4 bits. `opt_common.quantization` describes the format."""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from opt_common.quantization import LEAST, MANY, MOST, ONES, PLACES, WIDEST, Packing
from opt_common.weights import table

from .products import default_device, product, rows


class Packed(nnx.Variable):
    """Numbers of few bits, or their scales. They do not learn: it is no nnx.Param."""


class QuantizedLinear(nnx.Module):
    """An nnx.Linear whose weight [out, in] has 8 or 4 bits. Each call makes floats of it, in x's dtype, and drops them;
    on a CPU in float32, 8 bits with a scale a row are multiplied as whole numbers, as exactly.

    The variables have the checkpoint's names and shapes: `weight_packed` and `weight_scale`, which do not learn, and
    `bias`. Gradients flow to x; adapters around it learn.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packing: Packing,
        bias: bool = True,
        std: float = 0.02,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = "float32",
    ) -> None:
        """The weight is drawn evenly spread, with the standard deviation `std`; the bias is 0."""
        self.in_features, self.out_features, self.packing, self.dtype = in_features, out_features, packing, dtype
        shape, groups = (out_features, packing.columns(in_features)), packing.groups(in_features)
        self.weight_packed = Packed(lax.bitcast_convert_type(jax.random.bits(rngs.params(), shape), jnp.int32))
        self.weight_scale = Packed(jnp.full((out_features, groups), std * 12**0.5 / 2**packing.bits, param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if bias else None

    def dequantize(self, dtype: DTypeLike | None = None) -> Array:
        """The weight in floats [out, in], in `dtype`, by default that of the scales."""
        return _floats(self.weight_packed[...], self.weight_scale[...], self.packing.bits, dtype)

    def __call__(self, x: Array) -> Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        y = _product(x, self.weight_packed[...], self.weight_scale[...], self.packing.bits)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


@partial(jax.checkpoint, static_argnums=3)  # or the floats would be kept for the backward pass
def _product(x: Array, packed: Array, scale: Array, bits: int) -> Array:
    if can_count(x, bits, scale):
        return _counted(x, packed, scale)
    return _by_floats(x, packed, scale, bits)


def _by_floats(x: Array, packed: Array, scale: Array, bits: int) -> Array:
    packed, x = lax.optimization_barrier((packed, x))  # or XLA makes the floats before a loop, and keeps them
    return product(x, _floats(packed, scale, bits, x.dtype), rows(x))


def can_count(x: Array, bits: int, scale: Array) -> bool:
    """Whether x [..., in] times a weight of `bits` bits with scales [out, groups] is a product of whole numbers."""
    fits = x.dtype == jnp.float32 and x.shape[-1] <= WIDEST and math.prod(x.shape[:-1]) < MANY
    return default_device().platform == "cpu" and bits == 8 and scale.shape[1] == 1 and fits


@jax.custom_jvp
def _counted(x: Array, packed: Array, scale: Array) -> Array:
    """x · wᵀ of 8 bits in whole numbers: `opt_common.quantization` says how."""
    largest = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), LEAST)
    whole = jnp.round(x * (MOST / largest)).astype(jnp.int32)
    digits = jnp.moveaxis(lax.bitcast_convert_type((whole + ONES) ^ ONES, jnp.int8), -1, 0)  # the lowest first
    numbers = lax.bitcast_convert_type(packed ^ ONES, jnp.int8).reshape(len(packed), -1)  # [out, in], less 128
    y = lax.dot_general(numbers, digits, (((1,), (x.ndim,)), ((), ())), preferred_element_type=jnp.int32)
    places = jnp.array(PLACES, jnp.float32) / MOST
    y = jnp.einsum("od...,d->...o", y.astype(jnp.float32), places, precision="highest")
    finite = jnp.isfinite(x).all(-1, keepdims=True)  # XLA's maximum may pass over NaN
    return jnp.where(finite, y * largest * scale[:, 0], jnp.nan)


@_counted.defjvp
def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    by_floats = partial(_by_floats, bits=8)
    return _counted(*primals), jax.jvp(by_floats, primals, tangents)[1]


def _floats(packed: Array, scale: Array, bits: int, dtype: DTypeLike | None) -> Array:
    numbers = lax.bitcast_convert_type(packed, jnp.uint8)  # [out, in·bits/32, 4], the lowest first
    if bits == 4:
        numbers = jnp.stack([numbers & 15, numbers >> 4], axis=-1)
    weight = numbers.reshape(*scale.shape, -1).astype(scale.dtype) - 2 ** (bits - 1)  # exact in every dtype
    return (weight * scale[:, :, None]).reshape(len(packed), -1).astype(dtype or scale.dtype)


def quantized(decoder: Any, *, rngs: nnx.Rngs, **dtypes: Any) -> Any:
    """A new decoder, with the Linears replaced that its config says are quantized."""
    config = decoder.config
    for spec in table(config, "OPTModel"):
        if spec.kind == "packed" and spec.packing is not None:
            *parents, name = spec.path.split(".")[1:]
            module: Any = reduce(lambda m, p: m[int(p)] if p.isdigit() else getattr(m, p), parents, decoder)
            bias, (out, into) = getattr(module, name).bias is not None, spec.matrix
            linear = QuantizedLinear(into, out, spec.packing, bias, config.init_std, rngs=rngs, **dtypes)
            setattr(module, name, linear)
    return decoder
