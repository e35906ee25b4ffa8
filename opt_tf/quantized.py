"""Linears of 8 and 4 bits. `opt_common.quantization` describes the format."""

from __future__ import annotations

from functools import reduce
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow import Tensor
from tensorflow.python.ops import control_flow_util

from opt_common.quantization import LEAST, MANY, MOST, ONES, PLACES, WIDEST, Packing
from opt_common.weights import table


@keras.saving.register_keras_serializable(package="opt_zoo")
class QuantizedLinear(keras.layers.Layer):
    """A Linear whose weight [out, in] has 8 or 4 bits. Each call makes floats of it, in x's dtype, and drops them; by
    XLA, on a CPU in float32, 8 bits with a scale a row are multiplied as whole numbers, as exactly.

    The variables have the checkpoint's names and shapes: `weight_packed` and `weight_scale`, which do not learn, and
    `bias`. Gradients flow to x; adapters around it learn.
    """

    initializer: Any = None

    def __init__(self, in_features: int, out_features: int, packing: Packing, bias: bool, std: float = 0.02) -> None:
        """The weight is drawn evenly spread, with the standard deviation `std`; the bias is 0."""
        super().__init__()
        self.in_features, self.out_features, self.packing, self.use_bias = in_features, out_features, packing, bias
        self.std = std

    def build(self, input_shape: Any = None) -> None:
        out, packing, step = self.out_features, self.packing, self.std * 12**0.5 / 2**self.packing.bits
        shape, groups = (out, packing.columns(self.in_features)), packing.groups(self.in_features)
        self.weight_packed = self.add_weight(
            name="weight_packed", shape=shape, dtype="int32", initializer=_numbers, trainable=False
        )
        scale = keras.initializers.Constant(step)
        self.weight_scale = self.add_weight(
            name="weight_scale", shape=(out, groups), initializer=scale, trainable=False
        )
        self.bias = self.add_weight(name="bias", shape=(out,), initializer="zeros") if self.use_bias else None

    def dequantize(self, dtype: str | None = None) -> Tensor:
        """The weight in floats [out, in], in `dtype`, by default that of the scales."""
        packed, scale = self._parts()
        return _floats(packed, scale, self.packing.bits, dtype or scale.dtype)

    def call(self, x: Tensor) -> Tensor:
        y = _product(x, *self._parts(), self.packing.bits)
        return y if self.bias is None else y + ops.cast(self.bias, y.dtype)

    def _parts(self) -> tuple[Tensor, Tensor]:
        # the variables' own values: a policy would cast the scales
        return tf.convert_to_tensor(self.weight_packed.value), tf.convert_to_tensor(self.weight_scale.value)


def _product(x: Tensor, packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    @tf.custom_gradient  # TensorFlow's own would keep the floats for the backward pass
    def product(x: Tensor) -> Any:
        def gradient(upstream: Tensor) -> Tensor:
            return tf.matmul(upstream, _floats(packed, scale, bits, x.dtype))

        if can_count(x, bits, scale):
            return _counted(x, packed, scale), gradient
        return tf.matmul(x, _floats(packed, scale, bits, x.dtype), transpose_b=True), gradient

    y = product(ops.reshape(x, (-1, x.shape[-1])))
    return ops.reshape(y, (*ops.shape(x)[:-1], packed.shape[0]))


def can_count(x: Tensor, bits: int, scale: Tensor) -> bool:
    """Whether x [T, in] times a weight of `bits` bits with scales [out, groups] is a product of whole numbers. Only XLA
    has a fast one."""
    compiled = control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    fits = x.dtype == tf.float32 and x.shape[-1] <= WIDEST and (x.shape[0] or 1) < MANY
    return compiled and not tf.config.get_visible_devices("GPU") and bits == 8 and scale.shape[1] == 1 and fits


def _counted(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x · wᵀ of 8 bits in whole numbers: `opt_common.quantization` says how."""
    out, width = scale.shape[0], x.shape[-1]
    largest = tf.maximum(tf.reduce_max(tf.abs(x), axis=-1, keepdims=True), LEAST)
    whole = tf.cast(tf.round(x * (MOST / largest)), tf.int32)
    digits = tf.bitcast(tf.bitwise.bitwise_xor(whole + ONES, ONES), tf.int8)  # [T, in, 4], the lowest first
    digits = tf.reshape(tf.transpose(digits, (2, 0, 1)), (-1, width))
    numbers = tf.reshape(tf.bitcast(tf.bitwise.bitwise_xor(packed, ONES), tf.int8), (out, width))  # less 128
    y = tf.matmul(numbers, digits, transpose_b=True, output_type=tf.int32)
    places = tf.constant(PLACES) / MOST
    y = tf.reduce_sum(tf.reshape(tf.cast(y, tf.float32), (out, 4, -1)) * places[:, None], axis=1)
    finite = tf.reduce_all(tf.math.is_finite(x), axis=-1, keepdims=True)  # XLA's maximum may pass over NaN
    return tf.where(finite, tf.transpose(y) * largest * scale[:, 0], np.nan)


def _floats(packed: Tensor, scale: Tensor, bits: int, dtype: Any) -> Tensor:
    numbers = tf.bitcast(packed, tf.uint8)  # [out, in·bits/32, 4], the lowest first
    if bits == 4:
        numbers = tf.stack([numbers & 15, tf.bitwise.right_shift(numbers, 4)], axis=-1)
    out, groups = scale.shape
    weight = tf.cast(tf.reshape(numbers, (out, groups, -1)), scale.dtype) - 2 ** (bits - 1)  # exact in every dtype
    return tf.cast(tf.reshape(weight * scale[:, :, None], (out, -1)), dtype)


def _numbers(shape: tuple[int, ...], dtype: Any = None) -> Tensor:
    return tf.constant(np.random.default_rng().integers(-(2**31), 2**31, shape, np.int32))


def quantized(decoder: Any) -> Any:
    """A new decoder, with the Linears replaced that its config says are quantized."""
    config = decoder.config
    for spec in table(config, "OPTModel"):
        if spec.kind == "packed" and spec.packing is not None:
            *parents, name = spec.path.split(".")[1:]
            module: Any = reduce(lambda m, p: m[int(p)] if p.isdigit() else getattr(m, p), parents, decoder)
            bias, (out, into) = getattr(module, name).use_bias, spec.matrix
            setattr(module, name, QuantizedLinear(into, out, spec.packing, bias, config.init_std))
    return decoder
