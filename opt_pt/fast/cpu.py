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
from ..quantized import QuantizedLinear
from . import digits
from .packed import onednn, packed
from .plain import standard, unwatched

Pair = tuple[Any, Any]  # of a norm: Tensors, or None


class Weights(NamedTuple):
    """Of a Linear, or of several side by side. scale: of whole numbers."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None


def can_step(model: Any, token: Tensor) -> bool:
    """Whether `Step` computes what this model does: standard modules on a CPU, in one dtype that oneDNN computes, their
    quantized Linears packed."""
    parameters = list(model.parameters())
    dtypes = {p.dtype for p in parameters} - {torch.int32}
    if any(p.device.type != "cpu" for p in (token, *parameters)) or len(dtypes) != 1:
        return False
    if not (onednn(*dtypes) and unwatched(token)):
        return False
    if standard(model) is not None:
        return True
    one = model.get_input_embeddings().weight[:1]
    return standard(model, (QuantizedLinear, QuantizedLinear)) is not None and all(
        None not in (*_qkv(layer.self_attn, one), *(_weights(f, one) for f in _others(layer)))
        for layer in model.model.decoder.layers
    )


class Layer(NamedTuple):
    """One layer's weights, and its cache [B, N, S, D]."""

    attention_norm: Pair
    qkv: list[Weights]  # one product, of a packed copy, or three
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
        one = self.words[:1]
        self.project_in, self.project_out = (f and _weights(f, one) for f in (decoder.project_in, decoder.project_out))
        self.layers = []
        layers: list[Any] = list(decoder.layers)
        for i, layer in enumerate(layers):
            out, fc1, fc2 = (_weights(f, one) for f in _others(layer))
            self.layers.append(
                Layer(
                    _pair(layer.self_attn_layer_norm),
                    _qkv(layer.self_attn, one),
                    out,
                    _pair(layer.final_layer_norm),
                    fc1,
                    fc2,
                    cache.k[i],
                    cache.v[i],
                )
            )
        self.activation = layers[0].activation_fn
        self.final_norm = decoder.final_layer_norm and _pair(decoder.final_layer_norm)
        self.head = _weights(model.lm_head, one)

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
    w, b, scale = weights
    if scale is not None:
        y = digits.product(x, w, scale, b)
        return y.add_(residual) if residual is not None else y.relu_() if after == "relu" else y
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, w, b, "add")
    return torch.ops.mkldnn._linear_pointwise.default(x, w, b, after, [], "")


def _copied(module: nn.Module, x: Tensor) -> Weights | None:
    copy = packed(module, x)
    return None if copy is None else Weights(copy.weight, copy.bias, copy.scale)


def _weights(f: Any, x: Tensor) -> Any:
    """Of a Linear: `Weights`; None if it is quantized and there is no packed copy that takes x."""
    if (copy := _copied(f, x)) is not None:
        return copy
    return None if type(f) is QuantizedLinear else Weights(f.weight.contiguous(), f.bias)


def _qkv(a: Any, x: Tensor) -> list[Any]:
    if (copy := _copied(a, x)) is not None:
        return [copy]
    return [_weights(f, x) for f in (a.q_proj, a.k_proj, a.v_proj)]


def _others(layer: Any) -> tuple[nn.Module, ...]:
    return layer.self_attn.out_proj, layer.fc1, layer.fc2


def _pair(norm: nn.LayerNorm) -> Pair:
    return norm.weight, norm.bias
