"""Triton kernels of a decoding step whose weights have 8 or 4 bits, as `opt_common.quantization` packs them.

A word of 32 bits holds 4 or 8 neighbouring weights of a row, the first in its lowest bits, each plus 128 or 8. The
kernels read the packed words and make floats of them in registers, so what bounds them is first the memory and then
the arithmetic of unpacking. A weight becomes a float without a conversion: its bits are put into the mantissa of a
constant, 128 + q is 0x43000000 with q in bits 16 to 19 (float32), 1024 + q is 0x6400 with q in the lowest (float16).

B rows   K features in   M features out   S slots   GROUP weights of a row share a scale
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# (a kernel is not Python, though it is written in it)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .kernels import _finish_one, _meet, _part


@triton.jit
def _four_halves(words, dtype: tl.constexpr):
    """The four half-precision numbers of words of 64 bits, as float32."""
    a = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    b = ((words >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    c = ((words >> 32) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    d = ((words >> 48) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return a, b, c, d


@triton.jit
def _float(words, SHIFT: tl.constexpr):
    """128 + the byte at bit SHIFT, which is below 128, as float32."""
    if SHIFT < 16:
        words = words << (16 - SHIFT)
    elif SHIFT > 16:
        words = words >> (SHIFT - 16)
    return ((words & 0x00FF0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _eight(words, ASM: tl.constexpr):
    """128 + each of the eight values of words of 4 bits, as float32. ASM: an instruction a value, a permutation of
    bytes, which the compiler does not find by itself."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 even, odd, top;
            mov.b32 top, 0x00004300;
            and.b32 even, $8, 0x0F0F0F0F;
            shr.b32 odd, $8, 4;
            and.b32 odd, odd, 0x0F0F0F0F;
            prmt.b32 $0, even, top, 0x5044;
            prmt.b32 $1, odd, top, 0x5044;
            prmt.b32 $2, even, top, 0x5144;
            prmt.b32 $3, odd, top, 0x5144;
            prmt.b32 $4, even, top, 0x5244;
            prmt.b32 $5, odd, top, 0x5244;
            prmt.b32 $6, even, top, 0x5344;
            prmt.b32 $7, odd, top, 0x5344;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=r,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        even, odd = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
        return (
            _float(even, 0), _float(odd, 0), _float(even, 8), _float(odd, 8),
            _float(even, 16), _float(odd, 16), _float(even, 24), _float(odd, 24),
        )  # fmt: skip


@triton.jit
def _large(words, SHIFT: tl.constexpr):
    """The byte at bit SHIFT minus 128, as float32: 2^15 + q is 0x47000000 with q in bits 8 to 15."""
    if SHIFT < 8:
        words = words << (8 - SHIFT)
    elif SHIFT > 8:
        words = words >> (SHIFT - 8)
    return ((words & 0x0000FF00) | 0x47000000).to(tl.float32, bitcast=True) - 32896.0


@triton.jit
def _of_part(w, w_k, w_v, s, s_k, s_v, b, b_k, b_v, BLOCK_M: tl.constexpr, M, QKV: tl.constexpr):
    """`_part`, and the scales that go with it."""
    part, w, b, begin = _part(w, w_k, w_v, b, b_k, b_v, BLOCK_M, M, QKV)
    if QKV:
        if part == 1:
            s = s_k
        elif part == 2:
            s = s_v
    return part, w, s, b, begin


# With words of w aligned to 16 bytes the compiler gives a thread four neighbouring words, so that few of its rows share
# what it makes of x. Hidden, it gives it one, of all of its rows.
@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["w", "w_k", "w_v"])
def quantized_one(
    x, w, w_k, w_v, s, s_k, s_v, b, b_k, b_v, out, k_cache, v_cache, slot, residual, slots,
    K: tl.constexpr, M, H, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, QKV: tl.constexpr,
    BLOCK_M: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One row: out[M] = act(x[K] · (scale · q)[M, K]ᵀ + b) + residual[M], q packed in w [M, K · BITS / 32], scales s
    [M, K / GROUP]. QKV as in `linear_one`."""
    if PDL:
        gdc_launch_dependents()
    part, w, s, b, begin = _of_part(w, w_k, w_v, s, s_k, s_v, b, b_k, b_v, BLOCK_M, M, QKV)
    EACH: tl.constexpr = 32 // BITS
    LENGTH: tl.constexpr = K // EACH
    rows = begin + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, WORDS)
    inside = rows < M
    tile = w + rows.to(tl.int64)[:, None] * LENGTH + cols[None, :]
    scales = s + rows.to(tl.int64)[:, None] * (K // GROUP)
    mask = inside[:, None] & (cols < LENGTH)[None, :]
    ahead = tl.load(tile, mask=mask, other=0, eviction_policy="evict_first")
    scale_ahead = tl.load(scales + (cols // (GROUP // EACH))[None, :], mask=mask, other=0.0)
    bias = 0.0
    if BIAS:
        bias = tl.load(b + rows, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_M, WORDS), tl.float32)
    x_words = x.to(tl.pointer_type(tl.int64))
    for start in range(0, LENGTH, WORDS):
        now, scale = ahead, scale_ahead.to(tl.float32)
        here, following = start + cols, start + WORDS + cols
        mask = inside[:, None] & (following < LENGTH)[None, :]
        ahead = tl.load(tile + (start + WORDS), mask=mask, other=0, eviction_policy="evict_first")
        if GROUP < K:
            scale_ahead = tl.load(scales + (following // (GROUP // EACH))[None, :], mask=mask, other=0.0)
        if BITS == 8:
            x0, x1, x2, x3 = _four_halves(tl.load(x_words + here, mask=here < LENGTH, other=0), x.dtype.element_ty)
            product = _large(now, 0) * x0[None, :]
            product += _large(now, 8) * x1[None, :]
            product += _large(now, 16) * x2[None, :]
            product += _large(now, 24) * x3[None, :]
        else:
            x0, x1, x2, x3 = _four_halves(tl.load(x_words + 2 * here, mask=here < LENGTH, other=0), x.dtype.element_ty)
            x4, x5, x6, x7 = _four_halves(
                tl.load(x_words + 2 * here + 1, mask=here < LENGTH, other=0), x.dtype.element_ty
            )
            w0, w1, w2, w3, w4, w5, w6, w7 = _eight(now, ASM)
            total = x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
            product = -136.0 * total[None, :] + w0 * x0[None, :]
            product += w1 * x1[None, :]
            product += w2 * x2[None, :]
            product += w3 * x3[None, :]
            product += w4 * x4[None, :]
            product += w5 * x5[None, :]
            product += w6 * x6[None, :]
            product += w7 * x7[None, :]
        acc += product * scale
    _finish_one(
        tl.sum(acc, axis=1), bias, part, out, k_cache, v_cache, slot, residual, residual, residual, rows, slots,
        M, H, D, False, BIAS, ACTIVATION, RESIDUAL, QKV, 1,
    )  # fmt: skip


@triton.jit
def _halves(values, BITS: tl.constexpr, dtype: tl.constexpr):
    """The values of bytes, below 2^BITS, minus half of that, in x's dtype."""
    if dtype == tl.float16:  # 1024 + q
        return (values.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + (1 << (BITS - 1)))
    elif BITS == 4:  # 128 + q
        return (values.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        return _large(values.to(tl.int32), 0).to(tl.bfloat16)


@triton.jit
def _unpack(packed, BITS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """The values of packed bytes [M, n], and the second ones if there are two in a byte, in x's dtype."""
    if ASM and BITS == 4 and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, top, half;
            mov.b32 top, 0x64646464;
            mov.b32 half, 0x64086408;
            and.b32 low, $4, 0x0F0F0F0F;
            shr.b32 high, $4, 4;
            and.b32 high, high, 0x0F0F0F0F;
            prmt.b32 $0, low, top, 0x4140;
            prmt.b32 $1, low, top, 0x4342;
            prmt.b32 $2, high, top, 0x4140;
            prmt.b32 $3, high, top, 0x4342;
            sub.f16x2 $0, $0, half;
            sub.f16x2 $1, $1, half;
            sub.f16x2 $2, $2, half;
            sub.f16x2 $3, $3, half;
            }
            """,
            "=&r,=&r,=&r,=&r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif BITS == 4:
        return _halves(packed & 0xF, 4, dtype), _halves(packed >> 4, 4, dtype)
    else:
        values = _halves(packed, 8, dtype)
        return values, values


@triton.jit
def _step(acc, packed, scale, x_tile, start, x_mask, BITS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
          ASM: tl.constexpr):  # fmt: skip
    """acc[M, B] and the product of a tile of packed bytes with x[B, K] from `start` on."""
    if GROUP == K:  # the one scale of a row can wait
        product = acc
    else:
        product = tl.zeros_like(acc)
    even = tl.load(x_tile + start, mask=x_mask, other=0.0)
    first, second = _unpack(packed, BITS, even.dtype, ASM)
    product = tl.dot(first, even, product)
    if BITS == 4:  # behind the even numbers of BLOCK_K lie the odd ones: see `_lying`
        odd = tl.load(x_tile + start + packed.shape[1], mask=x_mask, other=0.0)
        product = tl.dot(second, odd, product)
    if GROUP == K:
        return product
    else:
        return acc + product * scale.to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["B", "slots"])
def quantized_many(
    x, w, w_k, w_v, s, s_k, s_v, b, b_k, b_v, out, k_cache, v_cache, slot, residual, partial, arrived, B, slots,
    K: tl.constexpr, M, H, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, QKV: tl.constexpr, TAIL: tl.constexpr,
    PAIRS: tl.constexpr, RESIDUAL_PAIRS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Several rows, on the matrix units: `linear_many` with the weights q · scale, packed in w, bytes
    [M, K · BITS / 8], scales s [M, K / GROUP]. With 4 bits each BLOCK_K of x lie as `_lying` says, and a tile has one
    scale a row: BLOCK_K divides GROUP."""
    if PDL:
        gdc_launch_dependents()
    part, w, s, b, top = _of_part(w, w_k, w_v, s, s_k, s_v, b, b_k, b_v, BLOCK_M, M, QKV)
    SPAN: tl.constexpr = BLOCK_K * BITS // 8  # bytes of a row of a tile
    batch = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    rows = top + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, SPAN)
    w_tile = w + rows.to(tl.int64)[:, None] * (K * BITS // 8) + cols[None, :]
    s_tile = s + rows.to(tl.int64) * (K // GROUP)
    x_tile = x + batch[None, :] * K + cols[:, None]
    inside = rows < M
    w_mask, x_mask = inside[:, None], (batch < B)[None, :]
    TILES: tl.constexpr = K // BLOCK_K
    PART: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    begin = tl.program_id(2) * PART
    end = tl.minimum(begin + PART, TILES)
    bound = end * SPAN
    if EARLY >= 1:
        first = tl.load(w_tile + begin * SPAN, mask=w_mask & (begin * SPAN + cols < bound)[None, :], other=0)
        first_scale = tl.load(s_tile + tl.minimum(begin, TILES - 1) * BLOCK_K // GROUP, mask=inside, other=0.0)
    if EARLY >= 2:
        then = begin + 1
        second = tl.load(w_tile + then * SPAN, mask=w_mask & (then * SPAN + cols < bound)[None, :], other=0)
        second_scale = tl.load(s_tile + tl.minimum(then, TILES - 1) * BLOCK_K // GROUP, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
    for i in tl.range(begin + EARLY, end, num_stages=STAGES):
        packed = tl.load(w_tile + i * SPAN, mask=w_mask, other=0)
        scale = tl.load(s_tile + i * BLOCK_K // GROUP, mask=inside, other=0.0)
        acc = _step(acc, packed, scale, x_tile, i * BLOCK_K, x_mask, BITS, GROUP, K, ASM)
    if EARLY >= 1:
        mask = x_mask & (begin * SPAN + cols < bound)[:, None]
        acc = _step(acc, first, first_scale, x_tile, begin * BLOCK_K, mask, BITS, GROUP, K, ASM)
    if EARLY >= 2:
        mask = x_mask & (then * SPAN + cols < bound)[:, None]
        acc = _step(acc, second, second_scale, x_tile, then * BLOCK_K, mask, BITS, GROUP, K, ASM)
    if GROUP == K:
        acc = acc * tl.load(s_tile, mask=inside, other=0.0).to(tl.float32)[:, None]
    _meet(
        acc, part, b, out, k_cache, v_cache, slot, residual, partial, arrived, batch, rows, B, slots, M, H, D,
        BIAS, ACTIVATION, RESIDUAL, QKV, TAIL, BLOCK_B, BLOCK_M, SPLITS, PAIRS, RESIDUAL_PAIRS,
    )  # fmt: skip
