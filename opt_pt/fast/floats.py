"""Floats of packed weights on a GPU, by one kernel: a prompt of many tokens multiplies floats, and PyTorch's own
operations would write and read them once for the shift, the mask, the difference, the scale ..."""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # words a program


@triton.jit(do_not_specialize=["words"])
def _unpack(packed, scale, floats, words, SPAN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """`words` words of 32 bits, SPAN of them with one scale; see `opt_common.quantization` for their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, 32 // BITS)
    word = tl.load(packed + at, at < words, 0)
    times = tl.load(scale + at // SPAN, at < words, 0).to(tl.float32)
    number = ((word[:, None] >> (lanes * BITS)[None, :]) & (2**BITS - 1)) - 2 ** (BITS - 1)
    product = (number.to(tl.float32) * times[:, None]).to(scale.dtype.element_ty)  # rounded once, as PyTorch rounds it
    place = at[:, None] * (32 // BITS) + lanes[None, :]
    tl.store(floats + place, product.to(floats.dtype.element_ty), (at < words)[:, None])


def unpacked(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype`, of words [out, in · bits / 32] and scales [out, groups]: the bits that
    `QuantizedLinear.dequantize` gives by PyTorch's operations."""
    packed, scale = packed.contiguous(), scale.contiguous()
    floats = torch.empty(packed.shape[0], packed.shape[1] * 32 // bits, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(packed.numel(), _BLOCK),)
    span = packed.shape[1] // scale.shape[1]
    with torch.cuda.device_of(packed):
        _unpack[grid](packed, scale, floats, packed.numel(), span, bits, _BLOCK)
    return floats
