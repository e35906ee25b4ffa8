"""A decoder layer without the calls of its modules; in inference its products take their fastest route (`products`).

Small calls are bound by Python, so modules and parameters are read from their dictionaries: `plain_layer` vouches that
they are there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import View, attend, split_heads
from ..cache import remember
from .packed import packed
from .plain import plain_layer, unwatched
from .products import joined, linears_of, plain_linear

_NO_EFFECT = frozenset({"position_ids", "use_cache"})


def layer_forward(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: View = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    """What `layer(hidden_states, ...)` returns: by the layer itself wherever this could not be the same."""
    x, view = hidden_states, attention_mask
    if not (kwargs.keys() <= _NO_EFFECT and unwatched(x) and plain_layer(layer, linears_of(layer))):
        return layer(x, attention_mask=view, past_key_values=past_key_values, **kwargs)

    m, pre_norm, a = layer._modules, layer.do_layer_norm_before, layer._modules["self_attn"]
    attention_norm, final_norm, activation = m["self_attn_layer_norm"], m["final_layer_norm"], m["activation_fn"]
    projections = a._modules["q_proj"], a._modules["k_proj"], a._modules["v_proj"]
    y = _norm(attention_norm, x) if pre_norm else x
    copy = packed(a, y)  # one product, in place of three
    parts = [plain_linear(f, y) for f in projections] if copy is None else joined(copy, y)
    q, k, v = [split_heads(z, a.head_dim) for z in parts]
    if past_key_values is not None:
        k, v = remember(past_key_values, k, v, a.layer_idx, view)
    y = plain_linear(a._modules["out_proj"], attend(a, q, k, v, view)[0].flatten(2))
    x = x + (F.dropout(y, layer.dropout) if layer.training else y)
    x = x if pre_norm else _norm(attention_norm, x)

    y = _norm(final_norm, x) if pre_norm else x
    relu = type(activation) is nn.ReLU
    y = plain_linear(m["fc1"], y, relu)
    y = plain_linear(m["fc2"], y if relu else activation(y))
    x = x + (F.dropout(y, layer.dropout) if layer.training else y)
    return x if pre_norm else _norm(final_norm, x)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    p = norm._parameters
    return torch.layer_norm(x, norm.normalized_shape, p["weight"], p["bias"], norm.eps)
