"""Copies of weights in oneDNN's order, which `pack` makes, and when they may stand in for the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import digits

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Packed:
    """The weight of a Linear, or of several side by side, in oneDNN's order, and their bias. Of QuantizedLinears the
    weight is whole numbers, and `scale` theirs."""

    def __init__(self, *linears: Any) -> None:
        self.linears = linears
        # held, not only their addresses: freed memory could be reused by another weight, unnoticed
        self.then = [(p.detach(), _version(p)) for f in linears for p in f.parameters()]
        self.scale = None
        counted = "weight_packed" in linears[0]._parameters
        weights = [(f.weight_packed if counted else f.weight).detach() for f in linears]
        self.widths = [len(w) for w in weights]
        if counted:
            self.weight = digits.reordered(torch.cat(weights))
            self.scale = torch.cat([f.weight_scale.detach() for f in linears])
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights))
        biases = [f.bias for f in linears if f.bias is not None]
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None

    def current(self) -> bool:
        """Whether no parameter has been replaced or written since."""
        now = [p for f in self.linears for p in f._parameters.values() if p is not None]
        return len(now) == len(self.then) and all(
            p.data_ptr() == was.data_ptr() and _version(p) == version
            for p, (was, version) in zip(now, self.then, strict=True)
        )

    def takes(self, x: Tensor) -> bool:
        """Whether oneDNN multiplies x by it."""
        if self.scale is not None:
            return digits.can_count(x, 8, self.scale)
        return x.dtype == self.weight.dtype and onednn(x.dtype)

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
    return copy if copy.takes(x) and copy.current() else None


def onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products of this dtype here; `torch.backends.mkldnn.flags(enabled=False)` forbids it."""
    if not ONEDNN or not torch._C._get_mkldnn_enabled():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
