"""A decoder layer in inference, without the calls of its modules: its products by their fastest route (`products`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import View, attend, split_heads
from ..cache import remember
from .plain import plain_layer, unwatched
from .products import packed, plain_linear, product


def layer_forward(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: View = None,
    past_key_values: Any = None,
    attentions: list[Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """What `layer(hidden_states, ...)` returns: by the layer itself wherever this could not be the same."""
    x, view = hidden_states, attention_mask
    if attentions is not None:
        kwargs["attentions"] = attentions
    a = layer._modules.get("self_attn")
    if kwargs.keys() - {"position_ids", "use_cache"} or not (
        unwatched(x) and plain_layer(layer) and not layer.training and not a.training and not torch.is_grad_enabled()
    ):
        return layer(x, attention_mask=view, past_key_values=past_key_values, **kwargs)

    pre_norm = layer.do_layer_norm_before
    y = _norm(layer.self_attn_layer_norm, x) if pre_norm else x
    joined = packed(a, y)
    if joined is not None:  # one product of `pack`'s copy, in place of three
        widths = [f.weight.shape[0] for f in (a.q_proj, a.k_proj, a.v_proj)]
        parts = product(y, joined.weight, joined.bias).split(widths, dim=-1)
    else:
        parts = (plain_linear(f, y) for f in (a.q_proj, a.k_proj, a.v_proj))
    q, k, v = (split_heads(z, a.head_dim) for z in parts)
    if past_key_values is not None:
        k, v = remember(past_key_values, k, v, a.layer_idx, view)
    x = x + plain_linear(a.out_proj, attend(a, q, k, v, view)[0].flatten(2))
    x = x if pre_norm else _norm(layer.self_attn_layer_norm, x)

    y = _norm(layer.final_layer_norm, x) if pre_norm else x
    relu = type(layer.activation_fn) is nn.ReLU
    y = plain_linear(layer.fc1, y, relu)
    x = x + plain_linear(layer.fc2, y if relu else layer.activation_fn(y))
    return x if pre_norm else _norm(layer.final_layer_norm, x)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
