"""x · wᵀ + b in inference.

On a GPU a relu becomes part of the product. On a CPU oneDNN computes it, through the operator that PyTorch's own
compiler uses: nn.Linear takes MKL in float32, at half the speed on some CPUs. Several rows, and bfloat16, are faster
still with the weights reordered for oneDNN: `pack` keeps such a copy (benchmarks/NOTES.md has numbers).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import plain, plain_layer, unwatched

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Packed:
    """The weight of a Linear, or of several side by side, in oneDNN's order, and their bias."""

    def __init__(self, *linears: nn.Linear) -> None:
        self.linears = linears
        # held, not only their addresses: freed memory could be reused by another weight, unnoticed
        self.then = [(p.detach(), _version(p)) for f in linears for p in f.parameters()]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat([f.weight.detach() for f in linears]))
        biases = [f.bias for f in linears if f.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None

    def current(self) -> bool:
        """Whether no parameter has been replaced or written since."""
        now = [p for f in self.linears for p in f._parameters.values() if p is not None]
        return len(now) == len(self.then) and all(
            p.data_ptr() == was.data_ptr() and _version(p) == version
            for p, (was, version) in zip(now, self.then, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is not packed: a tensor in oneDNN's order cannot be copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # nor is a pickled one


def _version(tensor: Tensor) -> int:
    """How often it was written; 0 for one made in inference mode, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def packed(module: nn.Module, x: Tensor) -> Packed | None:
    """The packed copy of a module's weights, if there is one, it is current, and oneDNN takes it for x, which learns
    nothing."""
    copy = module.__dict__.get("packed")
    if copy is None or torch.is_grad_enabled() or not x.is_cpu:
        return None
    return copy if x.dtype == copy.weight.dtype and onednn(x.dtype) and copy.current() else None


def linear(f: nn.Module, x: Tensor) -> Tensor:
    """f(x): [..., out] of x [..., in]."""
    if torch.is_grad_enabled() or not (plain(f, nn.Linear) and unwatched(x)):
        return f(x)
    return plain_linear(f, x)


def plain_linear(f: nn.Module, x: Tensor, relu: bool = False) -> Tensor:
    """f(x), and relu of that if asked for, of a Linear that is known to be plain."""
    w, b = f._parameters["weight"], f._parameters["bias"]
    if x.is_cpu and not torch.is_grad_enabled():
        copy = packed(f, x)
        return product(x, w if copy is None else copy.weight, b, relu)
    if relu and x.is_cuda and b is not None and x.dtype == b.dtype and not torch.is_grad_enabled():
        y = torch._addmm_activation(b, x.flatten(0, -2), w.t())  # pyright: ignore
        return y.view(*x.shape[:-1], y.shape[-1])
    y = F.linear(x, w, b)  # type: ignore[arg-type]
    return torch.relu(y) if relu else y


def product(x: Tensor, w: Any, b: Tensor | None, relu: bool = False) -> Tensor:
    """x [..., in] · w [out, in]ᵀ + b on a CPU, and relu of that if asked for. w may be in oneDNN's order."""
    if x.dtype == w.dtype and w.is_cpu and onednn(x.dtype):
        w = w if w.is_mkldnn else w.contiguous()
        return torch.ops.mkldnn._linear_pointwise.default(x, w, b, "relu" if relu else "none", [], "")
    y = F.linear(x, w, b)
    return torch.relu(y) if relu else y


def onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products of this dtype here; `torch.backends.mkldnn.flags(enabled=False)` forbids it."""
    if not ONEDNN or not torch._C._get_mkldnn_enabled():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def pack(model: Any) -> None:
    """Also keep the weights of the Linears, the head's included, reordered for oneDNN: for inference on a CPU in
    float32 or bfloat16, at twice the memory. Changed weights are used unpacked until you call `pack` again.

    Raises ValueError where oneDNN does not compute.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not onednn(weight.dtype):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"pack: found a model in {dtype} on {weight.device.type}; wanted float32 or bfloat16 on a CPU")
    joined = []
    for module in model.modules():  # a layer before the Linears in it
        if plain_layer(module):
            a = module.self_attn
            parts = a.q_proj, a.k_proj, a.v_proj
            a.packed = Packed(*parts)
            joined += parts
        elif plain(module, nn.Linear) and module not in joined:
            module.packed = Packed(module)  # type: ignore[assignment]
