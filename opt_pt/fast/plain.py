"""The one question every faster route asks: would the modules, called one by one, compute what it computes?

A user can hook, patch, subclass, parametrize, quantize, offload or replace any module, and what they see must be what
runs. So a route is taken only around modules of exactly the types below, with their own `forward` and parameters that
are plain tensors in memory, while nothing watches or rewrites PyTorch's calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules import module as hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from opt_common.weights import Spec, table

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


def _plain_linear(module: nn.Module | None, cls: type[nn.Module]) -> bool:
    if cls is nn.Linear:
        return plain(module, cls)
    return module is not None and type(module) is cls and untouched(module)


def _only_default_devices() -> bool:
    """Whether the modes around PyTorch's functions only say where new tensors go (`with torch.device(...)`)."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


Linears = tuple[type[nn.Module], type[nn.Module]]  # the class of q, k, v and fc1, and that of out_proj and fc2
LINEARS: Linears = (nn.Linear, nn.Linear)


# A layer's modules, as `modules_of` returns them
_PARTS = (
    "", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
    "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm", "activation_fn",
)  # fmt: skip


def plain_layer(layer: nn.Module, linears: Linears = LINEARS) -> bool:
    """Whether a decoder layer, its attention and all their parts are untouched and of the usual types, its Linears
    exactly of the classes `linears`."""
    return modules_of(layer, linears) is not None


def modules_of(layer: nn.Module, linears: Linears = LINEARS) -> tuple[nn.Module, ...] | None:
    """The layer and its parts; None if it is no `plain_layer`."""
    m = layer._modules
    attention = m.get("self_attn")
    if attention is None or not (untouched(layer) and untouched(attention)):
        return None
    a = attention._modules
    by_outputs = q, k, v, fc1 = a.get("q_proj"), a.get("k_proj"), a.get("v_proj"), m.get("fc1")
    by_inputs = out, fc2 = a.get("out_proj"), m.get("fc2")
    norms = first, second = m.get("self_attn_layer_norm"), m.get("final_layer_norm")
    for linear in by_outputs:
        if not _plain_linear(linear, linears[0]):
            return None
    for linear in by_inputs:
        if not _plain_linear(linear, linears[1]):
            return None
    for norm in norms:
        if not plain(norm, nn.LayerNorm):
            return None
    activation = m.get("activation_fn")
    if activation is None or not untouched(activation):
        return None
    return layer, attention, q, k, v, out, first, fc1, fc2, second, activation  # type: ignore[return-value]


def standard(
    model: Any, linears: Linears = LINEARS, shape: Callable[[Spec], tuple[int, ...]] = lambda spec: spec.shape
) -> list[nn.Module] | None:
    """The modules of a language model that is in eval mode, if all of them are plain, the Linears of its layers exactly
    `linears`, and its numbers are its config's: what the decoding engines take as given. None otherwise. shape: of a
    tensor.

    Each `generate` asks, so that the modules are walked once: a modules() or named_parameters() of 24 layers takes as
    long as one of them takes on a GPU."""
    config, decoder = model.config, getattr(model.model, "decoder", None)
    if "prepare_inputs_for_generation" in model.__dict__:  # peft's prompt tuning wraps it
        return None
    if decoder is None or len(decoder.layers) != config.num_hidden_layers or decoder.layers._forward_hooks:
        return None
    outer = {
        "": model,
        "model": model.model,
        "model.decoder": decoder,
        "model.decoder.embed_tokens": decoder.embed_tokens,
        "model.decoder.embed_positions": decoder.embed_positions,
        "lm_head": model.lm_head,
    }
    optional = {
        "model.decoder.project_in": decoder.project_in,
        "model.decoder.project_out": decoder.project_out,
        "model.decoder.final_layer_norm": decoder.final_layer_norm,
    }
    present = (config.projects_embeddings, config.projects_embeddings, config.has_final_layer_norm)
    if [m is not None for m in optional.values()] != list(present):
        return None
    named = outer | {name: m for name, m in optional.items() if m is not None}
    if not all(untouched(m) for m in named.values()):
        return None

    modules = [*named.values()]
    of_first: list[Any] = []
    D, pre_norm = config.head_dim, config.do_layer_norm_before
    for i, layer in enumerate(decoder.layers):
        parts = modules_of(layer, linears)
        if parts is None:
            return None
        a: Any = parts[1]
        if (a.layer_idx, a.head_dim, a.scaling) != (i, D, D**-0.5) or layer.do_layer_norm_before != pre_norm:
            return None
        shapes = [None if p is None else p.shape for m in parts for p in m._parameters.values()]
        if shapes != (of_first := of_first or shapes):
            return None
        if i == 0:
            named |= {f"model.decoder.layers.0.{name}".rstrip("."): m for name, m in zip(_PARTS, parts, strict=True)}
        modules += parts
    if any(m.training or (type(m) is nn.LayerNorm and m.eps != 1e-5) for m in modules):
        return None
    # the first layer stands for all: they are alike
    one = dataclasses.replace(config, num_hidden_layers=min(1, config.num_hidden_layers))
    wanted, tied = {spec.name: shape(spec) for spec in table(one)}, decoder.embed_tokens.weight
    for name, module in named.items():
        for kind, p in module._parameters.items():
            if p is not None and not (module is model.lm_head and p is tied):
                if tuple(p.shape) != wanted.get(f"{name}.{kind}"):
                    return None
    return modules
