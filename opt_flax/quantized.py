"""Linears of 8 and 4 bits. `opt_common.quantization` describes the format."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from opt_common.quantization import Packing
from opt_common.weights import table

from .products import product, rows


class Packed(nnx.Variable):
    """Numbers of few bits, or their scales. They do not learn: it is no nnx.Param."""


class QuantizedLinear(nnx.Module):
    """An nnx.Linear whose weight [out, in] has 8 or 4 bits. Each call makes floats of it, in x's dtype, and drops them.

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
    packed, x = lax.optimization_barrier((packed, x))  # or XLA makes the floats before a loop, and keeps them
    return product(x, _floats(packed, scale, bits, x.dtype), rows(x))


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
