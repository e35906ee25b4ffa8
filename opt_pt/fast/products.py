"""x · wᵀ + b in inference.

On a GPU a relu becomes part of the product. On a CPU oneDNN computes it, through the operator that PyTorch's own
compiler uses: nn.Linear takes MKL in float32, at half the speed on some CPUs. Several rows, and bfloat16, are faster
still with the weights reordered for oneDNN, and so are whole numbers of 8 bits: `pack` keeps such copies
(benchmarks/NOTES.md has numbers).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_common.quantization import Packing

from ..quantized import QuantizedLinear
from . import digits
from .packed import Packed, onednn, packed
from .plain import LINEARS, Linears, plain, plain_layer, untouched, unwatched


def linears_of(layer: nn.Module) -> Linears:
    """The classes that `plain_layer` is to find."""
    quantized = type(layer._modules.get("fc1")) is QuantizedLinear
    return (QuantizedLinear, QuantizedLinear) if quantized else LINEARS


def linear(f: nn.Module, x: Tensor) -> Tensor:
    """f(x): [..., out] of x [..., in]."""
    if torch.is_grad_enabled() or not (plain(f, nn.Linear) and unwatched(x)):
        return f(x)
    return plain_linear(f, x)


def plain_linear(f: nn.Module, x: Tensor, relu: bool = False) -> Tensor:
    """f(x), and relu of that if asked for, of a Linear that is known to be plain."""
    if type(f) is QuantizedLinear:
        return torch.relu(f(x)) if relu else f(x)
    w, b = f._parameters["weight"], f._parameters["bias"]
    if x.is_cpu and not torch.is_grad_enabled():
        copy = packed(f, x)
        return product(x, w if copy is None else copy.weight, b, relu)
    if relu and x.is_cuda and b is not None and x.dtype == b.dtype and not torch.is_grad_enabled():
        y = torch._addmm_activation(b, x.flatten(0, -2), w.t())  # pyright: ignore
        return y.view(*x.shape[:-1], y.shape[-1])
    y = F.linear(x, w, b)  # type: ignore[arg-type]
    return torch.relu(y) if relu else y


def joined(copy: Packed, x: Tensor) -> list[Tensor]:
    """The products of x with each of the weights in a copy."""
    if copy.scale is not None:
        y = digits.product(x, copy.weight, copy.scale, copy.bias)
    else:
        y = product(x, copy.weight, copy.bias)
    return list(y.split(copy.widths, dim=-1))


def product(x: Tensor, w: Any, b: Tensor | None, relu: bool = False) -> Tensor:
    """x [..., in] · w [out, in]ᵀ + b on a CPU, and relu of that if asked for. w may be in oneDNN's order."""
    if x.dtype == w.dtype and w.is_cpu and onednn(x.dtype):
        w = w if w.is_mkldnn else w.contiguous()
        return torch.ops.mkldnn._linear_pointwise.default(x, w, b, "relu" if relu else "none", [], "")
    y = F.linear(x, w, b)
    return torch.relu(y) if relu else y


@torch.no_grad()
def pack(model: Any) -> None:
    """Also keep the weights of the Linears, the head's included, reordered for oneDNN: for inference on a CPU in
    float32 or bfloat16, at twice the memory. Changed weights are used unpacked until you call `pack` again. Of
    quantized Linears, those of 8 bits with a scale a row are reordered, where the CPU has VNNI.

    Raises ValueError where oneDNN does not compute.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not onednn(weight.dtype):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"pack: found a model in {dtype} on {weight.device.type}; wanted float32 or bfloat16 on a CPU")
    done = []
    for module in model.modules():  # a layer before the Linears in it
        if plain_layer(module, linears_of(module)):
            a = module.self_attn
            parts = a.q_proj, a.k_proj, a.v_proj
            if all(_reorders(f) for f in parts):
                a.packed = Packed(*parts)
                done += parts
        elif module not in done and _reorders(module):
            module.packed = Packed(module)  # type: ignore[assignment]


def _reorders(f: nn.Module) -> bool:
    """Whether a module is a plain Linear that oneDNN has an order for."""
    if type(f) is QuantizedLinear:
        return untouched(f) and digits.EXACT and f.packing == Packing(8)
    return plain(f, nn.Linear)
