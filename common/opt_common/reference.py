"""OPT in numpy and float64: the reference for every framework, independent of all of them. Slow, and plain to read.

B batch   T tokens   V vocabulary   E embedding width   H hidden   N heads   D head width
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .config import OPTConfig

Array = np.ndarray

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": _silu,
    "swish": _silu,
    "tanh": np.tanh,
}


def forward(
    config: OPTConfig, weight: Callable[[str], Array | None], input_ids: Array, attention_mask: Array | None = None
) -> tuple[Array, list[Array]]:
    """Logits [B, T, V] and hidden states (the input of each layer [B, T, H], then the last [B, T, E]), float64.

    `weight` maps a checkpoint name to its tensor, or None if there is none. `input_ids` and `attention_mask` are
    [B, T]. Padding attends to the real tokens before it; where there are none, its results are meaningless.
    """
    B, T = input_ids.shape
    N, D = config.num_attention_heads, config.head_dim
    real = np.ones((B, T), bool) if attention_mask is None else attention_mask.astype(bool)

    def get(name: str) -> Array | None:
        value = weight(name)
        return None if value is None else value.astype(np.float64)

    def linear(x: Array, path: str) -> Array:
        matrix, bias = get(f"{path}.weight"), get(f"{path}.bias")
        assert matrix is not None, path
        return x @ matrix.T + (0 if bias is None else bias)

    def norm(x: Array, path: str) -> Array:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        scale, bias = get(f"{path}.weight"), get(f"{path}.bias")
        return x if scale is None or bias is None else x * scale + bias

    def attention(x: Array, path: str) -> Array:
        q, k, v = (linear(x, f"{path}.{name}_proj").reshape(B, T, N, D) for name in "qkv")
        scores = np.einsum("btnd,bsnd->bnts", q / math.sqrt(D), k)
        see = np.tril(np.ones((T, T), bool)) & real[:, None, None, :]
        see = see | (
            np.eye(T, dtype=bool) & ~see.any(-1, keepdims=True)
        )  # left padding: itself, so that no row is empty
        scores = np.where(see, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return linear(np.einsum("bnts,bsnd->btnd", weights, v).reshape(B, T, N * D), f"{path}.out_proj")

    d, activation = "model.decoder", ACTIVATIONS[config.activation_function]
    tokens, positions = get(f"{d}.embed_tokens.weight"), get(f"{d}.embed_positions.weight")
    assert tokens is not None and positions is not None
    x = tokens[input_ids]
    if config.projects_embeddings:
        x = linear(x, f"{d}.project_in")
    x = x + positions[np.cumsum(real, axis=1) * real - 1 + 2]
    hidden_states = []
    for i in range(config.num_hidden_layers):
        hidden_states.append(x)
        layer, before = f"{d}.layers.{i}", config.do_layer_norm_before
        y = norm(x, f"{layer}.self_attn_layer_norm") if before else x
        x = x + attention(y, f"{layer}.self_attn")
        x = x if before else norm(x, f"{layer}.self_attn_layer_norm")
        y = norm(x, f"{layer}.final_layer_norm") if before else x
        x = x + linear(activation(linear(y, f"{layer}.fc1")), f"{layer}.fc2")
        x = x if before else norm(x, f"{layer}.final_layer_norm")
    if config.has_final_layer_norm:
        x = norm(x, f"{d}.final_layer_norm")
    if config.projects_embeddings:
        x = linear(x, f"{d}.project_out")
    hidden_states.append(x)
    head = tokens if config.tie_word_embeddings else get("lm_head.weight")
    assert head is not None
    return x @ head.T, hidden_states
