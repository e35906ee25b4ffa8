"""What the model is built of besides Flax's own layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from opt_common.config import OPTConfig
from opt_common.inputs import array, check_classes, check_kind

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),  # JAX defaults to the tanh approximation
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def embedding(
    config: OPTConfig, rows: int, width: int, padding_idx: int | None, *, rngs: nnx.Rngs, **dtypes: Any
) -> nnx.Embed:
    """An nnx.Embed drawn from N(0, init_std²), whose padding row is 0."""

    def init(*args: Any) -> Array:
        table = nnx.initializers.normal(config.init_std)(*args)
        return table if padding_idx is None else table.at[padding_idx].set(0)

    return nnx.Embed(rows, width, embedding_init=init, rngs=rngs, **dtypes)


def embed(table: nnx.Embed, input_ids: Array, padding_idx: int | None) -> Array:
    """Look up input_ids [B, T]; the padding row takes no gradient."""
    found = table(input_ids)
    if padding_idx is None:
        return found
    return jnp.where((input_ids == padding_idx)[:, :, None], lax.stop_gradient(found), found)


class PositionalEmbedding(nnx.Embed):
    """The position table. Position p is row p + 2: OPT's table starts two rows in, and padding, at -1, is row 1."""

    offset = 2

    def __init__(self, config: OPTConfig, num_embeddings: int, features: int, *, rngs: nnx.Rngs, **dtypes: Any) -> None:
        rows, init = num_embeddings + self.offset, nnx.initializers.normal(config.init_std)
        super().__init__(rows, features, embedding_init=init, rngs=rngs, **dtypes)

    def __call__(
        self,
        attention_mask: ArrayLike | None,
        past_key_values_length: int | Array = 0,
        position_ids: ArrayLike | None = None,
    ) -> Array:
        """Look up position_ids [B, T]; by default the count of real tokens before each in attention_mask [B, S]."""
        if position_ids is None:
            if attention_mask is None:
                raise ValueError("attention_mask, position_ids: found neither, wanted one to count positions by")
            real = (jnp.asarray(attention_mask) != 0).astype(jnp.int32)
            position_ids = (real.cumsum(1) * real - 1)[:, past_key_values_length:]
        return super().__call__(jnp.asarray(position_ids) + self.offset)


def norm(config: OPTConfig, *, rngs: nnx.Rngs, **dtypes: Any) -> nnx.LayerNorm:
    """An nnx.LayerNorm as OPT has it."""
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=1e-5,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,  # E[x²] - E[x]² loses the digits of a small variance
        rngs=rngs,
        **dtypes,
    )


def dropout(x: Array, rate: float, rngs: nnx.Rngs | None) -> Array:
    """Drop elements with probability `rate` and scale up the others, if rngs are given."""
    if rngs is None or rate == 0:
        return x
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def runner(decoder: Any, layer: Callable[..., Array], how: dict[str, Any]) -> Callable[..., Array]:
    """What to call for a layer, with the arguments `how`: itself or, if gradient checkpointing is on and nothing but
    its result is wanted, a call that keeps only its input for the backward pass, which recomputes the rest."""
    if not decoder.gradient_checkpointing or how["past_key_values"] is not None or "attentions" in how:
        return layer

    def run(hidden_states: Array, *, rngs: nnx.Rngs | None, **how: Any) -> Array:
        return nnx.remat(lambda layer, x, rngs: layer(x, rngs=rngs, **how))(layer, hidden_states, rngs)

    return run


def layerdrop(rate: float, before: Array, after: Array, rngs: nnx.Rngs | None) -> Array:
    """Skip a layer with probability `rate`, if rngs are given. The draw is an array, so that compiling does not freeze
    it."""
    if rngs is None or rate == 0:
        return after
    return jnp.where(jax.random.bernoulli(rngs.dropout(), rate), before, after)


def cross_entropy(logits: Array, labels: Any) -> Array:
    """The mean loss of logits [B, T, V] against the next token's label [B, T], -100 left out."""
    if jnp.shape(labels) != logits.shape[:2]:
        raise ValueError(f"labels: found shape {list(jnp.shape(labels))}, wanted {list(logits.shape[:2])}")
    # the labels are shifted, not the logits: part of the logits would be copied, and its gradient once more
    labels = labels if hasattr(labels, "dtype") else array("labels", labels)
    targets = jnp.pad(classes("labels", labels[:, 1:], logits.shape[-1]), ((0, 0), (0, 1)), constant_values=-100)
    return mean_loss(logits, targets, targets != -100)


def classes(name: str, labels: Any, number: int | None) -> Array:
    """Labels as int32. Raises ValueError, naming the argument, for other kinds of numbers, and for one that is neither
    a class of this number of them nor -100; where values are traced, the loss is then NaN."""
    labels = labels if hasattr(labels, "dtype") else array(name, labels)
    check_kind(name, labels.dtype)
    if number is not None and not isinstance(labels, Tracer):
        known = np.asarray(labels)
        check_classes(name, known[known != -100], number)
    return jnp.asarray(labels, jnp.int32)


def mean_loss(logits: Array, targets: Array, wanted: Array) -> Array:
    """The mean cross-entropy of the wanted targets; NaN if one of them is not a class."""
    scores = wide(logits)
    scores = scores - lax.stop_gradient(scores.max(-1, keepdims=True))
    # a sum, where an index would have its gradient scattered over zeros as large as the logits
    there = jnp.arange(scores.shape[-1]) == targets[..., None]
    losses = jnp.log(jnp.exp(scores).sum(-1)) - jnp.where(there, scores, 0).sum(-1)
    losses = jnp.where((targets >= 0) & (targets < scores.shape[-1]), losses, jnp.nan)
    return losses.sum(where=wanted) / wanted.sum()


def wide(x: Array) -> Array:
    """float32 in place of half precision; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
