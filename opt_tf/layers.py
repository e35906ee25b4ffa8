"""What the network is built of: Keras's layers as PyTorch calls them, with their shapes. Each takes its dtype policy,
and the initializer of its matrix, from the layer or model that it is part of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops
from tensorflow import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import check_classes, check_kind

from .inputs import arguments, as_raised, integers

PARTS = 16  # of a matrix, for a product of few rows


def wide(x: Tensor) -> Tensor:
    """float32 in place of half precision; float64 stays."""
    return ops.cast(x, keras.backend.result_type(x.dtype, "float32"))


def _gelu(x: Tensor) -> Tensor:
    y = wide(x)  # ops.gelu has constants in float32, which are too coarse for float64, and rounds in half precision
    return ops.cast(0.5 * y * (1 + ops.erf(y * 0.5**0.5)), x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    y = wide(x)
    return ops.cast(0.5 * y * (1 + ops.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3))), x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Any]] = {
    "relu": ops.relu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": ops.silu,
    "swish": ops.silu,
    "tanh": ops.tanh,
}


class Block(keras.layers.Layer):
    """A layer made of layers."""

    initializer: Any = None

    def build(self, input_shape: Any = None) -> None:
        """Make the weights of every part. Their shapes come from the config, so no input_shape is needed."""
        build_parts(self)

    def __setattr__(self, name: str, value: Any) -> None:
        old = self.__dict__.get(name)
        super().__setattr__(name, value)
        if isinstance(old, keras.layers.Layer) and old is not value:  # Keras would keep the weights of what is replaced
            self._tracker.untrack(old)

    def _lock_state(self) -> None:
        pass  # or no part could be replaced

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        # tf.train.Checkpoint would leave out what is in a list of Keras's
        return super()._trackable_children(save_type, **kwargs) | dict(_parts(self))


class Network(Block):
    """A block that is called on tokens. As `fit` and its like pass them, the arguments may come in one dictionary or
    list."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(**arguments([*inspect.signature(self.call).parameters], args, kwargs))


def build_parts(whole: Any) -> None:
    """Build the layers of a layer or model, each named after its attribute, so that the variables' paths are the
    checkpoint's names."""
    for name, part in _parts(whole):
        if not part.built:
            part.name, part.dtype_policy, part.initializer = name, whole.dtype_policy, whole.initializer
            part.build()


def _parts(whole: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(whole).items():
        if isinstance(value, keras.layers.Layer):
            yield name, value
        elif name == "layers":
            yield from ((f"layers.{i}", layer) for i, layer in enumerate(value))


def replaced(layer: keras.layers.Layer, old: keras.Variable, values: Tensor) -> keras.Variable:
    """A variable of these values in place of an old one of a layer, which may have another shape."""
    trainable = old.trainable
    layer._untrack_variable(old)
    layer._tracker.unlock()
    new = layer.add_weight(shape=values.shape, initializer=lambda *_, **__: values, name=old.name, trainable=trainable)
    layer._tracker.lock()
    return new


class Linear(keras.layers.Dense):
    """A matrix product. XLA gives that of one row, which takes as long as reading the kernel, to a single core: there
    it is computed in parts."""

    initializer: Any = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(out_features, use_bias=bias)
        self.in_features = in_features

    def build(self, input_shape: Any = None) -> None:
        self.kernel_initializer = self.initializer or self.kernel_initializer
        super().build((None, self.in_features))

    def resize(self, kernel: Tensor) -> None:
        """Take another kernel [in, out], also one of another shape."""
        self._kernel = replaced(self, self._kernel, kernel)
        self.in_features, self.units = kernel.shape

    def quantize(self, mode: Any = None, type_check: bool = True, config: Any = None) -> None:
        """Keras's `Model.quantize` asks for this, and leaves out subclasses unless told that they are known."""
        super().quantize(mode, type_check=False, config=config)

    def call(self, x: Tensor, training: bool | None = None) -> Tensor:
        one = math.prod(n or 0 for n in x.shape[:-1]) == 1
        # XLA gives a batch of products to all cores. In half precision, each part's product would be rounded.
        if not one or x.shape[-1] % PARTS or x.dtype != tf.float32 or tf.executing_eagerly():
            return super().call(x, training=training)
        y = tf.matmul(ops.reshape(x, (PARTS, 1, -1)), ops.reshape(self.kernel, (PARTS, -1, self.units)))
        y = ops.reshape(ops.sum(y, axis=0), (*x.shape[:-1], self.units))
        return y if self.bias is None else y + self.bias


class LayerNorm(keras.layers.LayerNormalization):
    def __init__(self, features: int, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
        super().__init__(epsilon=eps, center=elementwise_affine, scale=elementwise_affine)
        self.features = features

    def build(self, input_shape: Any = None) -> None:
        super().build((None, None, self.features))


class Embedding(keras.layers.Embedding):
    """A table with a dense gradient, none of it for the row `padding_idx`, which starts as 0. From a sparse gradient,
    TensorFlow's default, Keras's optimizers square each occurrence of a token for itself, not their sum."""

    initializer: Any = None

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.padding_idx = padding_idx

    def build(self, input_shape: Any = None) -> None:
        self.embeddings_initializer = self.initializer or self.embeddings_initializer
        super().build()
        if self.padding_idx is not None:
            for table in tf.distribute.get_strategy().experimental_local_results(self.embeddings.value):
                table[self.padding_idx].assign(tf.zeros(self.output_dim, self.variable_dtype))

    def resize(self, table: Tensor) -> None:
        """Take another table [rows, width], also one of another shape."""
        self._embeddings = replaced(self, self._embeddings, table)
        self.input_dim, self.output_dim = table.shape

    # transformers' names

    @property
    def weight(self) -> Any:
        return self.embeddings

    @property
    def vocab_size(self) -> int:
        return self.input_dim

    @property
    def hidden_size(self) -> int:
        return self.output_dim

    def call(self, ids: Tensor) -> Tensor:
        padding = -1 if self.padding_idx is None else self.padding_idx
        return ops.cast(_look_up(tf.identity(self.embeddings), ids, padding), self.compute_dtype)

    def attend(self, x: Tensor) -> Tensor:
        """The product [B, T, rows] of x [B, T, width] and each row of the table: the logits of a tied head."""
        B, T, E = ops.shape(x)
        V, rows = self.input_dim, ops.reshape(x, (-1, E))
        n, table = ops.shape(rows)[0], ops.convert_to_tensor(self.embeddings)
        few = isinstance(n, int) and 1 < n < 64 and not V % PARTS
        if few and not tf.executing_eagerly():
            # a third faster in XLA
            rows = tf.broadcast_to(rows, (PARTS, n, E))
            y = tf.matmul(ops.reshape(table, (PARTS, -1, E)), rows, transpose_b=True)
            y = ops.transpose(ops.reshape(y, (V, n)))
        else:
            # ops.matmul would transpose, and copy, the table
            y = tf.matmul(rows, table, transpose_b=True)
        return ops.reshape(y, (B, T, V))


def _look_up(table: Tensor, ids: Tensor, padding: int) -> Tensor:
    @tf.custom_gradient
    def look_up(table: Tensor) -> Any:
        def gradient(upstream: Tensor) -> Tensor:
            learnt = ops.where(ops.equal(ids, padding), -1, ids)  # the sum leaves -1 out
            return ops.cast(tf.math.unsorted_segment_sum(wide(upstream), learnt, table.shape[0]), table.dtype)

        return tf.gather(table, ids), gradient

    return look_up(table)


class PositionalEmbedding(Embedding):
    """The position table. Position p is row p + 2: OPT's table starts two rows in, and padding, at -1, is row 1."""

    offset = 2

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings + self.offset, embedding_dim)

    def __call__(self, attention_mask: Tensor | None, past_key_values_length: int = 0, **kwargs: Any) -> Any:
        # by name: Keras takes only tensors by position
        return super().__call__(attention_mask, past_key_values_length=past_key_values_length, **kwargs)

    def call(
        self, attention_mask: Tensor | None, past_key_values_length: int = 0, position_ids: Tensor | None = None
    ) -> Tensor:
        """Look up position_ids [B, T]; by default the count of real tokens before each in attention_mask [B, S]."""
        if position_ids is None:
            if attention_mask is None:
                raise ValueError("attention_mask, position_ids: found neither, wanted one to count positions by")
            real = ops.cast(attention_mask, "int32")
            position_ids = (ops.cumsum(real, axis=1) * real - 1)[:, past_key_values_length:]
        return super().call(position_ids + self.offset)


class Dropout(keras.layers.Dropout):
    """A Dropout whose random state is saved with the model, so that training resumes exactly; Keras's starts anew."""

    def build(self, input_shape: Any = None) -> None:
        pass

    def save_own_variables(self, store: Any) -> None:
        if self.rate:
            store["seed"] = self.seed_generator.state.numpy()

    def load_own_variables(self, store: Any) -> None:
        if self.rate and "seed" in store:
            self.seed_generator.state.assign(store["seed"][...])


class LayerDrop(Dropout):
    """Skips a layer, in training, with probability `rate`. A tensor is drawn, which compiling does not freeze."""

    def call(self, before: Tensor, after: Tensor, training: bool = False) -> Tensor:
        if not training or not self.rate:
            return after
        return ops.where(keras.random.uniform((), seed=self.seed_generator) < self.rate, before, after)


def runner(layer: Any, checkpointing: bool) -> Callable[..., Any]:
    """What to call for a layer: with `checkpointing`, a call in training that keeps only its input for the backward
    pass, which computes the rest again, with the same random numbers."""
    if not checkpointing:
        return layer
    states = [part.seed_generator.state for part in (layer.self_attn.dropout, layer.dropout) if part.rate]

    def run(hidden_states: Tensor, **how: Any) -> tuple[Tensor, None, None]:
        @tf.recompute_grad
        def again(x: Tensor, *seeds: Tensor) -> tuple[Tensor, ...]:
            with keras.StatelessScope(state_mapping=list(zip(states, seeds, strict=True))) as scope:
                x, *_ = layer(x, training=True, **how)
            return x, *(scope.get_current_value(state) for state in states)

        hidden_states, *seeds = again(hidden_states, *(tf.convert_to_tensor(state.value) for state in states))
        for state, seed in zip(states, seeds, strict=True):
            state.assign(seed)
        return hidden_states, None, None

    return run


@as_raised
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of logits [B, T, V] against the next token's label [B, T], -100 left out."""
    if not labels.shape.is_compatible_with(logits.shape[:2]):
        raise ValueError(f"labels: found shape {list(labels.shape)}, wanted {list(logits.shape[:2])}")
    targets = classes("labels", labels[:, 1:], logits.shape[-1])
    return mean_cross_entropy(logits, tf.pad(targets, ((0, 0), (0, 1)), constant_values=-100))


@as_raised
def classes(name: str, labels: Tensor, number: int) -> Tensor:
    """Labels, of a type that holds -100. Raises ValueError, naming the argument, for other kinds of numbers, and for
    one that is neither a class nor -100; a tf.function has no values to look at."""
    check_kind(name, labels.dtype)
    labels = integers(labels)
    if tf.executing_eagerly():
        known = np.asarray(labels)
        check_classes(name, known[known != -100], number)
    return labels


def mean_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean, in float32, over the targets that are not -100."""
    wanted = ops.not_equal(targets, -100)
    losses = ops.sparse_categorical_crossentropy(ops.where(wanted, targets, 0), wide(scores), from_logits=True)
    return ops.sum(ops.where(wanted, losses, 0)) / ops.sum(ops.cast(wanted, losses.dtype))


def normal(config: OPTConfig) -> keras.initializers.Initializer:
    """N(0, init_std²). Its seed is a generator: with a number, or none, all matrices of one shape would be equal."""
    return keras.initializers.RandomNormal(stddev=config.init_std, seed=keras.random.SeedGenerator())
