"""The one question every faster route asks: would the modules, called one by one, compute what it computes?

A user can hook, patch, subclass, parametrize, quantize, offload or replace any module, and what they see must be what
runs. So a route is taken only around modules of exactly the types below, with their own `forward` and parameters that
are plain tensors in memory, while nothing watches or rewrites PyTorch's calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from opt_common.weights import table

_CALL = nn.Module.__call__
# exact types, each with the forward it had when this package was imported; `register` adds the model's own
_FORWARDS: dict[type, Callable[..., Any]] = {
    cls: cls.forward for cls in (nn.Embedding, nn.GELU, nn.LayerNorm, nn.Linear, nn.ReLU, nn.SiLU, nn.Tanh)
}


def register(*classes: type[nn.Module]) -> None:
    """Vouch for module classes: a faster route may stand in for their `forward` as it is now."""
    _FORWARDS.update({cls: cls.forward for cls in classes})


def untouched(module: nn.Module) -> bool:
    """Whether calling this one module is calling its class's own forward on plain parameters."""
    cls, d = type(module), module.__dict__
    if _FORWARDS.get(cls) is not cls.forward or "forward" in d:
        return False
    if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
        return False
    for p in d["_parameters"].values():
        if p is not None and (type(p) is not Parameter or p.is_meta):
            return False
    return True


def unwatched(x: Tensor) -> bool:
    """Whether nothing looks at, changes or records PyTorch's calls: no global hooks, autocast, compiler, tracer,
    function transform or dispatch mode (a FLOP counter, a fake tensor), and `x` is a plain tensor."""
    return not (
        type(x) not in (Tensor, Parameter)
        or x.is_meta
        or torch.compiler.is_compiling()
        or hooks._has_any_global_hook()
        or nn.Module.__call__ is not _CALL
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _only_default_devices())
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def plain(module: Any, cls: type[nn.Module]) -> bool:
    """Whether a module is exactly a `cls`, nn.Linear or nn.LayerNorm, and untouched, and its weight and bias are
    parameters (or None)."""
    return type(module) is cls and untouched(module) and "weight" in module._parameters and "bias" in module._parameters


def _only_default_devices() -> bool:
    """Whether the modes around PyTorch's functions only say where new tensors go (`with torch.device(...)`)."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def plain_layer(layer: nn.Module, linears: type[nn.Module] = nn.Linear) -> bool:
    """Whether a decoder layer, its attention and all their parts are untouched and of the usual types, its Linears
    exactly `linears`."""
    m = layer._modules
    attention = m.get("self_attn")
    if attention is None or not (untouched(layer) and untouched(attention)):
        return False
    a = attention._modules
    for linear in (a.get("q_proj"), a.get("k_proj"), a.get("v_proj"), a.get("out_proj"), m.get("fc1"), m.get("fc2")):
        if linear is None or type(linear) is not linears or not untouched(linear):
            return False
        if linears is nn.Linear and not plain(linear, linears):
            return False
    if not (plain(m.get("self_attn_layer_norm"), nn.LayerNorm) and plain(m.get("final_layer_norm"), nn.LayerNorm)):
        return False
    activation = m.get("activation_fn")
    return activation is not None and untouched(activation)


def standard(model: Any, linears: type[nn.Module] = nn.Linear) -> bool:
    """Whether a language model is in eval mode, all of its modules are plain, the Linears of its layers exactly
    `linears`, and its numbers are its config's: what the decoding engines take as given."""
    config, decoder = model.config, getattr(model.model, "decoder", None)
    if "prepare_inputs_for_generation" in model.__dict__:  # peft's prompt tuning wraps it
        return False
    if decoder is None or len(decoder.layers) != config.num_hidden_layers:
        return False
    outer = (model, model.model, decoder, decoder.embed_tokens, decoder.embed_positions, model.lm_head)
    optional = (decoder.project_in, decoder.project_out, decoder.final_layer_norm)
    present = (config.projects_embeddings, config.projects_embeddings, config.has_final_layer_norm)
    if any(m.training for m in model.modules()) or [m is not None for m in optional] != list(present):
        return False
    if not all(untouched(m) for m in (*outer, *(m for m in optional if m is not None))):
        return False
    if decoder.layers._forward_hooks or not all(plain_layer(layer, linears) for layer in decoder.layers):
        return False
    for i, layer in enumerate(decoder.layers):
        a, D = layer.self_attn, config.head_dim
        if (a.layer_idx, a.head_dim, a.scaling) != (i, D, D**-0.5):
            return False
        if layer.do_layer_norm_before != config.do_layer_norm_before:
            return False
    shapes = {spec.name: spec.shape for spec in table(config)}
    norms = [m for m in model.modules() if type(m) is nn.LayerNorm]
    return all(norm.eps == 1e-5 for norm in norms) and all(
        tuple(p.shape) == shapes.get(name) for name, p in model.named_parameters()
    )
