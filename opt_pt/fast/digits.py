"""x · wᵀ of a weight of 8 bits on a CPU, in whole numbers: `opt_common.quantization` says how."""

from __future__ import annotations

import torch
from torch import Tensor

from opt_common.quantization import LEAST, MOST, ONES, PLACES, WIDEST

from .plain import unwatched

# Without VNNI, oneDNN adds pairs of products in 16 bits, where they overflow
EXACT = torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_vnni_supported", bool)()
# Half precision has fast products of its own; of few tokens, a product's time is that of reading the weight
_FEW = 64
_PLACES = torch.tensor(PLACES, dtype=torch.float32, device="cpu").div_(MOST)  # of a row's largest
_NO_POINT = torch.zeros(1, dtype=torch.int64, device="cpu")


def can_count(x: Tensor, bits: int, scale: Tensor) -> bool:
    """Whether `product` computes x [..., in] times a weight of `bits` bits with scales [out, groups]."""
    if not (EXACT and x.is_cpu and bits == 8 and scale.shape[1] == 1 and x.numel() and torch._C._get_mkldnn_enabled()):
        return False
    half = x.dtype in (torch.float16, torch.bfloat16) and x.numel() <= _FEW * x.shape[-1]
    return (x.dtype == torch.float32 or half) and x.shape[-1] <= WIDEST and unwatched(x)


def numbers(packed: Tensor) -> Tensor:
    """`weight_packed` as int8 [out, in]."""
    return (packed ^ ONES).view(torch.int8)  # less 128


def reordered(packed: Tensor) -> Tensor:
    """`numbers` in oneDNN's order."""
    return torch.ops.onednn.qlinear_prepack(numbers(packed).contiguous(), None)


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] · wᵀ + bias, in x's dtype. weight: `numbers`, or `reordered`; scale: [out, 1]."""
    rows, scales = x.reshape(-1, x.shape[-1]).float(), scale.flatten().float()
    largest = rows.abs().amax(-1, keepdim=True).clamp_(min=LEAST)
    whole = (rows * (MOST / largest)).round_().to(torch.int32).add_(ONES)  # its bytes are digits and 128
    if weight.is_mkldnn:  # 128 as the zero point: oneDNN's products of int8 by int8 are slow where there is no AMX
        how = (scales, _NO_POINT, None, 1.0, 0, torch.float32, "none", [], "")
        y = torch.ops.onednn.qlinear_pointwise(_apart(whole, torch.uint8), 1.0, 128, weight, *how)
    else:
        digits = _apart(whole.bitwise_xor_(ONES), torch.int8)
        y = torch._int_mm(digits, weight.t()) * scales  # pyright: ignore[reportPrivateImportUsage]
    places = largest * _PLACES  # [B, 4]
    bias = None if bias is None else bias.float()
    if len(rows) == 1:  # a step's, where 10 us count
        y = places @ y if bias is None else torch.addmm(bias, places, y)
    else:
        added = y.new_zeros(1) if bias is None else bias
        y = y.view(4, len(rows), -1).movedim(0, 1)  # [B, 4, out]
        y = torch.baddbmm(added.expand(len(rows), 1, y.shape[-1]), places[:, None], y)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def _apart(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of int32 [B, in] as [4·B, in], the lowest of all rows first."""
    return whole.view(dtype).view(*whole.shape, 4).movedim(-1, 0).contiguous().flatten(0, 1)
