"""One token a row on a CPU: the model's step as a row of plain calls.

At one token a row what the modules do in Python takes a tenth (float32) to a third (bfloat16) of the time (opt-125m,
2 cores). So a step goes by what was looked up once.

B rows   E embedding width   H hidden   N heads   D head width   S slots   V vocabulary
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import one_query
from .cache import KVCache
from .decode import joined, usual
from .linear import onednn, packed_or

if TYPE_CHECKING:
    from .model import OPTForCausalLM

Pair = tuple[Tensor | None, Tensor | None]  # of a norm
Weights = tuple[Tensor, Tensor | None]


def can_step(model: OPTForCausalLM, device: torch.device) -> bool:
    """Whether `Step` computes what this model does: on a CPU, in a dtype that oneDNN computes, in eval mode, with the
    usual modules."""
    dtypes = {p.dtype for p in model.parameters()}
    return device.type == "cpu" and len(dtypes) == 1 and onednn(*dtypes) and usual(model)


class Layer(NamedTuple):
    """One layer's weights, and its cache [B, N, S, D]."""

    attention_norm: Pair
    qkv: Weights
    out: Weights
    norm: Pair
    fc1: Weights
    fc2: Weights
    k: Tensor
    v: Tensor


class Step:
    """token [B] -> logits [B, V], each call one slot further in the cache.

    mask: [B, cache.length], what of the cache is not padding; position: [B], where the next token stands; token: [B],
    int64, the tensor that holds it at each call.
    """

    def __init__(self, model: OPTForCausalLM, cache: KVCache, mask: Tensor, position: Tensor, token: Tensor) -> None:
        decoder, config = model.model.decoder, model.config
        self.config, self.cache, self.token = config, cache, token
        self.position = position + 2  # the table starts two rows in
        self.visible = None
        if not mask.all():
            self.visible = torch.ones(len(mask), 1, 1, cache.slots, dtype=torch.bool)
            self.visible[..., : cache.length] = (mask != 0)[:, None, None]
        self.words, self.places = decoder.embed_tokens.weight, decoder.embed_positions.weight
        self.project_in, self.project_out = (f and _weights(f) for f in (decoder.project_in, decoder.project_out))
        self.layers = []
        layers: list[Any] = list(decoder.layers)
        for i, layer in enumerate(layers):
            attention = layer.self_attn
            w, b = attention.qkv() or joined(attention)
            self.layers.append(
                Layer(
                    _pair(layer.self_attn_layer_norm),
                    (packed_or(attention.packed, w), b),
                    _weights(attention.out_proj),
                    _pair(layer.final_layer_norm),
                    _weights(layer.fc1),
                    _weights(layer.fc2),
                    cache.k[i],
                    cache.v[i],
                )
            )
        self.activation = layers[0].activation
        self.final_norm = decoder.final_layer_norm and _pair(decoder.final_layer_norm)
        self.head = _weights(model.lm_head)

    def __call__(self) -> Tensor:
        """The logits [B, V] of `token`."""
        config, cache, shape = self.config, self.cache, (self.config.hidden_size,)
        pre_norm, relu = config.do_layer_norm_before, self.activation is F.relu
        slot, end = cache.length, cache.length + 1
        visible = None if self.visible is None else self.visible[..., :end]
        x = self.words[self.token]  # [B, E]
        if self.project_in is not None:
            x = _linear(x, self.project_in)
        x = x + self.places[self.position]  # [B, H]
        for layer in self.layers:
            y = torch.layer_norm(x, shape, *layer.attention_norm) if pre_norm else x
            q, k, v = _linear(y, layer.qkv).view(len(x), 3, config.num_attention_heads, 1, config.head_dim).unbind(1)
            layer.k.narrow(2, slot, 1).copy_(k)
            layer.v.narrow(2, slot, 1).copy_(v)
            y = one_query(q, layer.k.narrow(2, 0, end), layer.v.narrow(2, 0, end), visible)
            x = _linear(y.view(x.shape), layer.out, residual=x)
            if not pre_norm:
                x = torch.layer_norm(x, shape, *layer.attention_norm)
            y = torch.layer_norm(x, shape, *layer.norm) if pre_norm else x
            y = _linear(y, layer.fc1, "relu" if relu else "none")
            x = _linear(y if relu else self.activation(y), layer.fc2, residual=x)
            if not pre_norm:
                x = torch.layer_norm(x, shape, *layer.norm)
        if self.final_norm is not None:
            x = torch.layer_norm(x, shape, *self.final_norm)
        if self.project_out is not None:
            x = _linear(x, self.project_out)
        cache.length, self.position = end, self.position + 1
        return _linear(x, self.head)


def _linear(x: Tensor, weights: Weights, after: str = "none", residual: Tensor | None = None) -> Tensor:
    """x · wᵀ + b, and "relu" after that, or the residual added."""
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, *weights, "add")
    return torch.ops.mkldnn._linear_pointwise.default(x, *weights, after, [], "")


def _weights(f: nn.Linear) -> Weights:
    return packed_or(f.__dict__.get("packed"), f.weight), f.bias


def _pair(norm: nn.LayerNorm) -> Pair:
    return norm.weight, norm.bias
