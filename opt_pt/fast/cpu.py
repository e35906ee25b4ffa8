"""One token a row on a CPU: the model's step as a row of plain calls.

At one token a row what the modules do in Python takes a tenth (float32) to a third (bfloat16) of the time (opt-125m,
2 cores). So a step goes by what was looked up once.

B rows   E embedding width   H hidden   N heads   D head width   S slots   V vocabulary
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import one_query
from ..cache import KVCache
from .plain import standard, unwatched
from .products import onednn, packed

Pair = tuple[Any, Any]  # of a norm: Tensors, or None
Weights = tuple[Tensor, Tensor | None]


def can_step(model: Any, token: Tensor) -> bool:
    """Whether `Step` computes what this model does: standard modules on a CPU, in one dtype that oneDNN computes."""
    parameters = list(model.parameters())
    if any(p.device.type != "cpu" for p in (token, *parameters)) or len({p.dtype for p in parameters}) != 1:
        return False
    return onednn(parameters[0].dtype) and unwatched(token) and standard(model)


class Layer(NamedTuple):
    """One layer's weights, and its cache [B, N, S, D]."""

    attention_norm: Pair
    qkv: list[Weights]  # one product, of `pack`'s copy, or three
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

    def __init__(self, model: Any, cache: KVCache, mask: Tensor, position: Tensor, token: Tensor) -> None:
        decoder, config = model.model.decoder, model.config
        self.config, self.cache, self.token = config, cache, token
        self.position = position + 2  # the table starts two rows in
        self.visible = None
        if not mask.all():
            self.visible = torch.ones(len(mask), 1, 1, cache.k[0].shape[2], dtype=torch.bool)
            self.visible[..., : cache.length] = (mask != 0)[:, None, None]
        self.words, self.places = decoder.embed_tokens.weight, decoder.embed_positions.weight
        self.project_in, self.project_out = (f and _weights(f) for f in (decoder.project_in, decoder.project_out))
        self.layers = []
        layers: list[Any] = list(decoder.layers)
        for i, layer in enumerate(layers):
            a = layer.self_attn
            joined = packed(a, a.q_proj.weight)
            parts = [_weights(f) for f in (a.q_proj, a.k_proj, a.v_proj)]
            self.layers.append(
                Layer(
                    _pair(layer.self_attn_layer_norm),
                    parts if joined is None else [(joined.weight, joined.bias)],
                    _weights(a.out_proj),
                    _pair(layer.final_layer_norm),
                    _weights(layer.fc1),
                    _weights(layer.fc2),
                    cache.k[i],
                    cache.v[i],
                )
            )
        self.activation = layers[0].activation_fn
        self.final_norm = decoder.final_layer_norm and _pair(decoder.final_layer_norm)
        self.head = _weights(model.lm_head)

    def __call__(self) -> Tensor:
        """The logits [B, V] of `token`."""
        config, cache, shape, D = self.config, self.cache, (self.config.hidden_size,), self.config.head_dim
        pre_norm, relu = config.do_layer_norm_before, type(self.activation) is nn.ReLU
        slot, end = cache.length, cache.length + 1
        visible = None if self.visible is None else self.visible[..., :end]
        x = self.words[self.token]  # [B, E]
        if self.project_in is not None:
            x = _linear(x, self.project_in)
        x = x + self.places[self.position]  # [B, H]
        for layer in self.layers:
            y = torch.layer_norm(x, shape, *layer.attention_norm) if pre_norm else x
            parts = [_linear(y, weights) for weights in layer.qkv]
            parts = parts if len(parts) == 3 else parts[0].chunk(3, dim=-1)
            q, k, v = (z.view(len(x), -1, 1, D) for z in parts)
            layer.k.narrow(2, slot, 1).copy_(k)
            layer.v.narrow(2, slot, 1).copy_(v)
            y = one_query(q, layer.k.narrow(2, 0, end), layer.v.narrow(2, 0, end), visible, D**-0.5)
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
    copy = packed(f, f.weight)
    return (f.weight.contiguous() if copy is None else copy.weight), f.bias


def _pair(norm: nn.LayerNorm) -> Pair:
    return norm.weight, norm.bias
