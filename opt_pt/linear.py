"""x · wᵀ + b where nothing is learnt.

On a GPU a relu behind it is part of the product. On a CPU oneDNN computes it, through the operator that PyTorch's own
compiler uses: PyTorch's Linear takes MKL in float32, at half the speed on some CPUs. Several rows, and bfloat16, are
faster still with the weights in an order of oneDNN's own: `pack` keeps such a copy (benchmarks/NOTES.md has numbers).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Packed:
    """The weight of some Linears in oneDNN's order."""

    def __init__(self, weight: Tensor, *linears: nn.Linear) -> None:
        self.weight, self.linears = torch.ops.mkldnn._reorder_linear_weight(weight.detach()), linears
        # held, not only their addresses: what is freed could be followed there by another weight, unnoticed
        self.then = [(f.weight.detach(), _version(f.weight)) for f in linears]

    def current(self) -> Tensor | None:
        """The weight; None if a parameter it was made of has been replaced or written since."""
        for f, (was, version) in zip(self.linears, self.then, strict=True):
            if f.weight.data_ptr() != was.data_ptr() or _version(f.weight) != version:
                return None
        return self.weight

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model is not packed: what is in an order of oneDNN's own cannot be copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # nor is a pickled one


def _version(tensor: Tensor) -> int:
    """How often it was written; 0 for one made in inference mode, where that is not counted."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def packed_or(packed: Packed | None, w: Tensor) -> Tensor:
    """What oneDNN is to read for w: its packed copy, if there is one and it is current."""
    current = None if packed is None else packed.current()
    return w.contiguous() if current is None else current


def plain(f: nn.Module) -> bool:
    """Whether it is a Linear and nothing more: no adapter, no hooks."""
    return type(f) is nn.Linear and not f._forward_hooks and not f._forward_pre_hooks


def linear(f: nn.Module, x: Tensor, relu: bool = False) -> Tensor:
    """f(x) [..., out] of x [..., in], and relu of that if asked for."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not plain(f):
        y = f(x)
        return F.relu(y) if relu else y
    return product(x, f.weight, f.bias, f.__dict__.get("packed"), relu)  # type: ignore[arg-type]


def product(x: Tensor, w: Tensor, b: Tensor | None, packed: Packed | None, relu: bool = False) -> Tensor:
    """x [..., in] · w [out, in]ᵀ + b, and relu of that if asked for."""
    if x.dtype == w.dtype and not torch.is_autocast_enabled(x.device.type):
        if x.is_cuda and relu and b is not None:
            y = torch._addmm_activation(b, x.flatten(0, -2), w.t())  # pyright: ignore[reportPrivateImportUsage]
            return y.view(*x.shape[:-1], y.shape[-1])
        if x.device.type == "cpu" and onednn(x.dtype) and w.is_contiguous():
            w = packed_or(packed, w)
            return torch.ops.mkldnn._linear_pointwise.default(x, w, b, "relu" if relu else "none", [], "")
    y = F.linear(x, w, b)
    return F.relu(y) if relu else y


def onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products of this dtype here; `torch.backends.mkldnn.flags(enabled=False)` forbids it."""
    if not ONEDNN or not torch._C._get_mkldnn_enabled():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def pack(model: Any) -> None:
    """Keep the weights of the Linears, the head's included, in oneDNN's order too: for inference on a CPU in float32 or
    bfloat16, and as much memory again. A weight that is changed afterwards is used as it is; then pack again.

    Raises ValueError where oneDNN does not compute.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not onednn(weight.dtype):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"pack: found a model in {dtype} on {weight.device.type}; wanted float32 or bfloat16 on a CPU")
    joined = []
    for module in model.modules():  # an attention before the Linears in it
        if getattr(module, "whole", None) and module.qkv():
            parts = module.q_proj, module.k_proj, module.v_proj
            module.packed = Packed(module.whole[0], *parts)
            joined += parts
        elif plain(module) and module not in joined:
            module.packed = Packed(module.weight, module)
