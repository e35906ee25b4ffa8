"""Linears of 8 and 4 bits. `opt_common.quantization` describes the format."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_common.quantization import Packing
from opt_common.weights import table

from .fast import digits
from .fast.packed import packed
from .fast.plain import unwatched

_SCALES = (torch.float16, torch.bfloat16, torch.float32)


class QuantizedLinear(nn.Linear):
    """An nn.Linear whose weight [out, in] has 8 or 4 bits. Each call makes floats of it, in x's dtype, and drops them;
    on a CPU, 8 bits with a scale a row are multiplied as whole numbers, as exactly (`fast/digits.py`).

    The parameters have the checkpoint's names and shapes: `weight_packed`, `weight_scale`, which do not learn, and
    `bias`. Gradients flow to x; adapters around it learn.
    """

    def __init__(self, in_features: int, out_features: int, packing: Packing, bias: bool = True) -> None:
        nn.Module.__init__(self)  # nn.Linear's own makes a weight
        self.in_features, self.out_features, self.packing = in_features, out_features, packing
        packed = torch.empty(out_features, packing.columns(in_features), dtype=torch.int32)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        scale = torch.empty(out_features, packing.groups(in_features))
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.weight_shape: Tensor
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features]))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weight, evenly spread, with the standard deviation `std`; the bias is 0."""
        self.weight_packed.random_(-(2**31), 2**31)
        self.weight_scale.fill_(std * 12**0.5 / 2**self.packing.bits)
        self.weight_shape.copy_(torch.tensor([self.out_features, self.in_features]))
        if self.bias is not None:
            self.bias.zero_()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy of the weight in floats [out, in], which cannot be assigned to."""
        return self.dequantize().as_subclass(_Copy)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in floats [out, in], in `dtype`, by default that of the scales."""
        return _floats(self.weight_packed, self.weight_scale, self.packing.bits, dtype or self.weight_scale.dtype)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        if torch.is_grad_enabled() and input.requires_grad:
            return _Product.apply(input, self.weight_packed, self.weight_scale, bias, self.packing.bits)  # type: ignore
        copy = packed(self, input)
        if copy is not None:
            return digits.product(input, copy.weight, self.weight_scale, bias)
        if torch.is_grad_enabled():  # the bias learns
            return F.linear(input, self.dequantize(input.dtype), bias)
        return _product(input, self.weight_packed, self.weight_scale, bias, self.packing.bits)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.packing}"


class _Product(torch.autograd.Function):
    """x · wᵀ + bias, which keeps the packed weight for the backward pass: autograd would keep its floats."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
        return _product(x, packed, scale, bias, bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, packed, scale, _, ctx.bits = inputs
        ctx.dtype = x.dtype
        ctx.save_for_backward(packed, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, scale = ctx.saved_tensors
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:  # under autocast, the gradient has another dtype than x
            of_x = (grad @ _floats(packed, scale, ctx.bits, grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            of_bias = grad.flatten(0, -2).sum(0).to(ctx.dtype)
        return of_x, None, None, of_bias, None


def _product(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    if digits.can_count(x, bits, scale):
        return digits.product(x, digits.numbers(packed), scale, bias)
    return F.linear(x, _floats(packed, scale, bits, x.dtype), bias)


class _Copy(Tensor):
    """A tensor whose `data` cannot be set: peft merges an adapter so, and what it adds to a copy would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError("weight: found a copy of packed numbers, wanted floats to write: opt-zoo convert --dtype")


def _floats(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    whole_words = packed.shape[1] % scale.shape[1] == 0  # with one scale each
    if packed.is_cuda and whole_words and scale.dtype in _SCALES and unwatched(packed) and unwatched(scale):
        from .fast.floats import unpacked  # imports Triton

        return unpacked(packed, scale, bits, dtype)
    numbers = packed.view(torch.uint8)
    if bits == 4:
        numbers = torch.stack([numbers & 15, numbers >> 4], dim=-1).flatten(1)
    weight = numbers.to(scale.dtype) - 2 ** (bits - 1)  # exact in every dtype
    return (weight.unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1).to(dtype)


def quantized(decoder: Any) -> Any:
    """A new decoder, with the Linears replaced that its config says are quantized."""
    for spec in table(decoder.config, "OPTModel"):
        if spec.kind == "packed" and spec.packing is not None:
            parent, _, name = spec.path.removeprefix("decoder.").rpartition(".")
            module, (out, into) = decoder.get_submodule(parent), spec.matrix
            bias = getattr(module, name).bias is not None
            setattr(module, name, QuantizedLinear(into, out, spec.packing, bias))
    return decoder
