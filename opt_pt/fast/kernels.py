"""Triton kernels of one decoding step: a token a row, half precision, NVIDIA GPUs.

At one token a row a step is the reading of every weight once; all else is what happens between the reads. So a layer
is five kernels (seven with several rows), each with the norm before it and the bias, activation and residual after it
inside, and each starts while the one before it still runs: it asks for its first weights, and only then waits for its
input ("programmatic dependent launch", CUDA programming guide; `gdc_wait` is that wait).

B rows   K features in   M features out   N heads   D head width   S slots   V vocabulary
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# (a kernel is not Python, though it is written in it)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # tanh(y) = 2 sigmoid(2y) - 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "tanh":
        x = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    return x


@triton.jit
def _statistics(x, K: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and reciprocal deviation of the row at x."""
    cols = tl.arange(0, BLOCK)
    row = tl.load(x + cols, mask=cols < K, other=0.0).to(tl.float32)
    mean = tl.sum(row, axis=0) / K
    centred = tl.where(cols < K, row - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=0) / K + 1e-5)


@triton.jit
def _normed(x, cols, mask, mean, rstd, gain, shift, AFFINE: tl.constexpr):
    y = (tl.load(x + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
    if AFFINE:
        y = y * tl.load(gain + cols, mask=mask, other=0.0).to(tl.float32)
        y = y + tl.load(shift + cols, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _place(r, batch, slot, slots, H, D: tl.constexpr):
    """Where number r of the key or value [H] of a new token goes in a cache [B, N, S, D]."""
    return ((batch * (H // D) + r // D) * slots + slot) * D + r % D


@triton.jit
def _lying(k, PAIRS: tl.constexpr):
    """Where number k of a row is kept: in its place, or with the even ones of PAIRS numbers before the odd ones, as
    `quantized_many` reads them."""
    if PAIRS:
        k = k // PAIRS * PAIRS + k % 2 * (PAIRS // 2) + k % PAIRS // 2
    return k


@triton.jit
def _part(w, w_k, w_v, b, b_k, b_v, BLOCK_M: tl.constexpr, M, QKV: tl.constexpr):
    """Which of q, k and v (0, 1, 2) this program computes, its weight and bias, and its first row; without QKV there
    is one product."""
    part, tile = 0, tl.program_id(0)
    if QKV:
        tiles = tl.cdiv(M, BLOCK_M)
        part, tile = tile // tiles, tile % tiles
        if part == 1:
            w, b = w_k, b_k
        elif part == 2:
            w, b = w_v, b_v
    return part, w, b, tile * BLOCK_M


@triton.jit
def _put(y, part, out, at, k_cache, v_cache, place, inside):
    """q goes to out, k and v to their caches."""
    if part == 0:
        tl.store(out + at, y, mask=inside)
    elif part == 1:
        tl.store(k_cache + place, y, mask=inside)
    else:
        tl.store(v_cache + place, y, mask=inside)


@triton.jit
def _finish_one(
    y, bias, part, out, k_cache, v_cache, slot, residual, residual_gain, residual_shift, rows, slots,
    M, H, D: tl.constexpr, AFFINE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    QKV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What follows the product y[M] of one row."""
    inside = rows < M
    if BIAS:
        y += bias
    y = _activate(y, ACTIVATION)
    if RESIDUAL == 1:
        y += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL == 2:
        mean, rstd = _statistics(residual, H, BLOCK_R)
        y += _normed(residual, rows, inside, mean, rstd, residual_gain, residual_shift, AFFINE)
    y = y.to(out.dtype.element_ty)
    if QKV:
        place = _place(rows.to(tl.int64), 0, tl.load(slot), slots, H, D)
        _put(y, part, out, rows, k_cache, v_cache, place, inside)
    else:
        tl.store(out + rows, y, mask=inside)


@triton.jit(do_not_specialize=["slots"])
def linear_one(
    x, w, w_k, w_v, b, b_k, b_v, out, k_cache, v_cache, slot,
    gain, shift, residual, residual_gain, residual_shift, slots,
    K: tl.constexpr, M, H, D: tl.constexpr,
    NORM: tl.constexpr, AFFINE: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, QKV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: out[M] = act(norm(x[K]) · w[M, K]ᵀ + b) + residual[M].

    RESIDUAL: 0 none, 1 as it is, 2 its norm. QKV: three products of M = H rows, by w, w_k and w_v: q goes to out, k and
    v to their caches [N, S, D] at `slot`.
    """
    if PDL:
        gdc_launch_dependents()
    part, w, b, begin = _part(w, w_k, w_v, b, b_k, b_v, BLOCK_M, M, QKV)
    rows = begin + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    inside = rows < M
    tile = w + rows.to(tl.int64)[:, None] * K + cols[None, :]
    EVEN: tl.constexpr = K % BLOCK_K == 0
    if EVEN:
        ahead = tl.load(tile, mask=inside[:, None], other=0.0, eviction_policy="evict_first")
    else:
        ahead = tl.load(tile, mask=inside[:, None] & (cols < K)[None, :], other=0.0)
    bias = 0.0
    if BIAS:
        bias = tl.load(b + rows, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    mean, rstd = 0.0, 1.0
    if NORM:
        mean, rstd = _statistics(x, K, BLOCK_X)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        now = ahead
        here, following = start + cols, start + BLOCK_K + cols
        ahead = tl.load(
            tile + (start + BLOCK_K), mask=inside[:, None] & (following < K)[None, :], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if NORM:
            piece = _normed(x, here, here < K, mean, rstd, gain, shift, AFFINE)
        else:
            piece = tl.load(x + here, mask=here < K, other=0.0).to(tl.float32)
        acc += now.to(tl.float32) * piece[None, :]
    _finish_one(
        tl.sum(acc, axis=1), bias, part, out, k_cache, v_cache, slot, residual, residual_gain, residual_shift, rows,
        slots, M, H, D, AFFINE, BIAS, ACTIVATION, RESIDUAL, QKV, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _finish_many(
    acc, part, b, out, k_cache, v_cache, slot, residual, batch, rows, B, slots, M, H, D: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, QKV: tl.constexpr, TAIL: tl.constexpr,
    PAIRS: tl.constexpr, RESIDUAL_PAIRS: tl.constexpr,
):  # fmt: skip
    """What follows the product acc[M, B]; residual, and out without QKV, lie as `_lying` says."""
    inside = (rows < M)[:, None] & (batch < B)[None, :]
    if BIAS:
        acc += tl.load(b + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    acc = _activate(acc, ACTIVATION)
    if RESIDUAL:
        there = batch.to(tl.int64)[None, :] * M + _lying(rows, RESIDUAL_PAIRS)[:, None]
        acc += tl.load(residual + there, mask=inside, other=0.0).to(tl.float32)
    y = acc.to(out.dtype.element_ty)
    if QKV:
        here = tl.load(slot + batch, mask=batch < B, other=0)
        place = _place(rows[:, None], (batch // TAIL).to(tl.int64)[None, :], here[None, :], slots, H, D)
        at = batch.to(tl.int64)[None, :] * M + rows[:, None]
        _put(y, part, out, at, k_cache, v_cache, place, inside)
    else:
        tl.store(out + batch.to(tl.int64)[None, :] * M + _lying(rows, PAIRS)[:, None], y, mask=inside)


@triton.jit
def _meet(
    acc, part, b, out, k_cache, v_cache, slot, residual, partial, arrived, batch, rows, B, slots, M, H, D: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, QKV: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
    PAIRS: tl.constexpr, RESIDUAL_PAIRS: tl.constexpr,
):  # fmt: skip
    """What follows acc[M, B], a product or one of SPLITS parts of it: the last to arrive sums up, always in the same
    order, from partial [tiles, SPLITS, BLOCK_M, BLOCK_B] float32. `arrived` [tiles] counts, and is 0 again
    afterwards."""
    last = True
    if SPLITS > 1:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        at = tl.arange(0, BLOCK_M)[:, None] * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
        parts = partial + tile * (SPLITS * BLOCK_M * BLOCK_B) + at
        tl.store(parts + tl.program_id(2) * (BLOCK_M * BLOCK_B), acc)
        tl.debug_barrier()  # every thread's part is written before the count says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
    if last:
        if SPLITS > 1:
            tl.debug_barrier()
            tl.store(arrived + tile, 0)
            acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
            for i in tl.static_range(SPLITS):
                acc += tl.load(parts + i * (BLOCK_M * BLOCK_B), cache_modifier=".cg")
        _finish_many(
            acc, part, b, out, k_cache, v_cache, slot, residual, batch, rows, B, slots, M, H, D,
            BIAS, ACTIVATION, RESIDUAL, QKV, TAIL, PAIRS, RESIDUAL_PAIRS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "slots"])
def linear_many(
    x, w, w_k, w_v, b, b_k, b_v, out, k_cache, v_cache, slot, residual, partial, arrived, B, slots,
    K: tl.constexpr, M, H, D: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, QKV: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Several rows, on the matrix units: out[B, M] = act(x[B, K] · w[M, K]ᵀ + b) + residual[B, M]; QKV as above, the
    caches [B / TAIL, N, S, D], each row at its own slot. It is computed as w · xᵀ: the weights are the many, and the
    side of the units that wants many.

    EARLY (0 to 2) tiles of w are asked for before the wait, kept in registers, and used last. Where M alone makes too
    few programs, SPLITS of them share K: see `_meet`.
    """
    if PDL:
        gdc_launch_dependents()
    batch = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    part, w, b, top = _part(w, w_k, w_v, b, b_k, b_v, BLOCK_M, M, QKV)
    rows = top + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    PART: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    begin = tl.program_id(2) * PART
    end = tl.minimum(begin + PART, K)
    w_tile = w + rows.to(tl.int64)[:, None] * K + cols[None, :]  # [M, K]
    x_tile = x + batch[None, :] * K + cols[:, None]  # [K, B]
    w_mask, x_mask = (rows < M)[:, None], (batch < B)[None, :]
    if EARLY >= 1:
        first = tl.load(w_tile + begin, mask=w_mask & (begin + cols < end)[None, :], other=0.0)
    if EARLY >= 2:
        second = tl.load(w_tile + begin + BLOCK_K, mask=w_mask & (begin + BLOCK_K + cols < end)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
    for start in tl.range(begin + EARLY * BLOCK_K, end, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            left = tl.load(w_tile + start, mask=w_mask, other=0.0)
            right = tl.load(x_tile + start, mask=x_mask, other=0.0)
        else:
            left = tl.load(w_tile + start, mask=w_mask & (start + cols < K)[None, :], other=0.0)
            right = tl.load(x_tile + start, mask=x_mask & (start + cols < K)[:, None], other=0.0)
        acc = tl.dot(left, right, acc)
    if EARLY >= 1:
        right = tl.load(x_tile + begin, mask=x_mask & (begin + cols < end)[:, None], other=0.0)
        acc = tl.dot(first, right, acc)
    if EARLY >= 2:
        right = tl.load(x_tile + begin + BLOCK_K, mask=x_mask & (begin + BLOCK_K + cols < end)[:, None], other=0.0)
        acc = tl.dot(second, right, acc)
    _meet(
        acc, part, b, out, k_cache, v_cache, slot, residual, partial, arrived, batch, rows, B, slots, M, H, D,
        BIAS, ACTIVATION, RESIDUAL, QKV, TAIL, BLOCK_B, BLOCK_M, SPLITS, 0, 0,
    )  # fmt: skip


@triton.jit
def norm(
    x, gain, shift, out, K: tl.constexpr, AFFINE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """out[B, K] = the norm of each row of x[B, K], lying as `_lying` says; a program a row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) * K
    mean, rstd = _statistics(x + row, K, BLOCK)
    cols = tl.arange(0, BLOCK)
    y = _normed(x + row, cols, cols < K, mean, rstd, gain, shift, AFFINE)
    tl.store(out + row + _lying(cols, PAIRS), y.to(out.dtype.element_ty), mask=cols < K)


@triton.jit
def _entries(first, start, table, batch, head, at, inside, slots, dims, N, D: tl.constexpr, TABLE: tl.constexpr):
    """Where [slots `at`, dims] of a head are in a cache [B, N, S, D]: if a row sees its own, `start` behind `first`."""
    if TABLE:
        row = tl.load(table + batch * slots + at, mask=inside, other=0).to(tl.int64)
        return ((row * N + head) * slots + at)[:, None] * D + dims[None, :]
    else:
        return first + start * D


@triton.jit
def _seen(keys, values, seen, query, largest, total, acc):
    """A softmax a lane, with one more slot each."""
    scores = tl.where(seen, tl.sum(keys.to(tl.float32) * query[None, :], axis=1), -1e30)
    higher = tl.maximum(largest, scores)
    weights = tl.where(seen, tl.exp(scores - higher), 0.0)
    shrink = tl.exp(largest - higher)
    return higher, total * shrink + weights, acc * shrink[:, None] + weights[:, None] * values.to(tl.float32)


@triton.jit(do_not_specialize=["slots"])
def attend(
    q, k_cache, v_cache, visible, slot, table, out, partial, arrived, slots, scale,
    N: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TAIL: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """out[B, N, D] = softmax(scale · q · kᵀ) · v over the slots up to `slot` where visible[B / TAIL, S] is not 0.

    TAIL rows after one another are tokens of one text, which stand in neighbouring slots and see those before them.
    TABLE: what a row sees in a slot is what row table[B, S] has there, as beams share their beginnings.
    A program takes every SPLITS-th block of slots of one head of one row; the last to arrive sums up, from partial
    [B, N, SPLITS, 2 + BLOCK_D] float32: largest score, denominator, numerator. `arrived` [B, N] counts, and is 0 again
    afterwards.
    """
    if PDL:
        gdc_launch_dependents()
    head, batch, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    dims, steps = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    real = dims < D
    # What earlier steps wrote may be read before the wait; the new token's key and value are this step's
    text = batch // TAIL
    old = tl.load(slot + text * TAIL)
    start = split * BLOCK_S
    at = start + steps
    first = (text * N + head) * slots * D + steps[:, None] * D + dims[None, :]
    entries = _entries(first, start, table, batch, head, at, at < old, slots, dims, N, D, TABLE)
    mask = (at < old)[:, None] & real[None, :]
    keys = tl.load(k_cache + entries, mask=mask, other=0.0)
    values = tl.load(v_cache + entries, mask=mask, other=0.0)
    seen = tl.load(visible + text * slots + at, mask=at < old, other=0) != 0
    if PDL:
        gdc_wait()
    query = tl.load(q + (batch * N + head) * D + dims, mask=real, other=0.0).to(tl.float32) * scale
    last = old + batch % TAIL
    newest = ((text * N + head) * slots + last) * D + dims
    key = tl.load(k_cache + newest, mask=real, other=0.0).to(tl.float32)
    value = tl.load(v_cache + newest, mask=real, other=0.0).to(tl.float32)
    # Each of the BLOCK_S lanes keeps a softmax of its own; they meet at the end. The new token goes to the first.
    mine = (steps == 0) & (split == 0)
    largest = tl.where(mine, tl.sum(key * query, axis=0), -1e30)
    total = tl.where(mine, 1.0, 0.0)
    acc = tl.where(mine[:, None], value[None, :], 0.0)
    while start < old:
        largest, total, acc = _seen(keys, values, seen, query, largest, total, acc)
        start += SPLITS * BLOCK_S
        at = start + steps
        entries = _entries(first, start, table, batch, head, at, at < old, slots, dims, N, D, TABLE)
        mask = (at < old)[:, None] & real[None, :]
        keys = tl.load(k_cache + entries, mask=mask, other=0.0)
        values = tl.load(v_cache + entries, mask=mask, other=0.0)
        seen = tl.load(visible + text * slots + at, mask=at < old, other=0) != 0
    if TAIL > 1:  # those of this step before its own: at most BLOCK_S
        at = old + steps
        seen = at < tl.where(split == 0, last, old)
        mask = seen[:, None] & real[None, :]
        keys = tl.load(k_cache + first + old * D, mask=mask, other=0.0)
        values = tl.load(v_cache + first + old * D, mask=mask, other=0.0)
        largest, total, acc = _seen(keys, values, seen, query, largest, total, acc)
    highest = tl.max(largest, axis=0)
    share = tl.exp(largest - highest)
    denominator = tl.sum(total * share, axis=0)
    numerator = tl.sum(acc * share[:, None], axis=0)
    place = batch * N * D + _lying(head * D + dims, PAIRS)
    if SPLITS > 1:
        part = partial + ((batch * N + head) * SPLITS + split) * (2 + BLOCK_D)
        tl.store(part, highest)
        tl.store(part + 1, denominator)
        tl.store(part + 2 + dims, numerator)
        tl.debug_barrier()  # every thread's part is written before the count says so
        before = tl.atomic_add(arrived + batch * N + head, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.debug_barrier()
            pieces = partial + (batch * N + head) * SPLITS * (2 + BLOCK_D)
            each = tl.arange(0, SPLITS) * (2 + BLOCK_D)
            tops = tl.load(pieces + each, cache_modifier=".cg")
            shares = tl.exp(tops - tl.max(tops, axis=0))
            below = tl.sum(tl.load(pieces + each + 1, cache_modifier=".cg") * shares, axis=0)
            above = tl.load(pieces + each[:, None] + 2 + dims[None, :], cache_modifier=".cg")
            result = tl.sum(above * shares[:, None], axis=0) / below
            tl.store(arrived + batch * N + head, 0)
            tl.store(out + place, result.to(out.dtype.element_ty), mask=real)
    else:
        tl.store(out + place, (numerator / denominator).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["room", "pad"])
def keep(
    logits, chosen, is_eos, best, where, arrived, token, tokens, done, step, position, slot, room, pad,
    V: tl.constexpr, GREEDY: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Keep the next token of each row: the likeliest of logits[B, V] if GREEDY, else chosen[B]; `pad` once the row is
    done. It goes to token[B] and tokens[B, room] at step[B]; step, position and slot, all [B], go on by one.

    If GREEDY, CHUNKS programs a row; the last to arrive decides, from best and where [B, CHUNKS]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    last = True
    word = 0
    if GREEDY:
        chunk = tl.program_id(1)
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        scores = tl.load(logits + row * V + at, mask=at < V, other=-float("inf")).to(tl.float32)
        top, first = tl.max(scores, axis=0, return_indices=True)
        tl.store(best + row * CHUNKS + chunk, top)
        tl.store(where + row * CHUNKS + chunk, first + chunk * BLOCK)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + row, 1, sem="acq_rel") == CHUNKS - 1
        tl.debug_barrier()
    if last:
        if GREEDY:
            each = tl.arange(0, CHUNKS)
            tops = tl.load(best + row * CHUNKS + each, cache_modifier=".cg")
            top, winner = tl.max(tops, axis=0, return_indices=True)
            word = tl.load(where + row * CHUNKS + winner, cache_modifier=".cg")
            word = tl.minimum(word, V - 1)  # a row of nothing but NaN has no likeliest
            tl.store(arrived + row, 0)
        else:
            word = tl.load(chosen + row).to(tl.int32)
        over = tl.load(done + row)
        word = tl.where(over != 0, pad, word)
        at_step = tl.load(step + row)
        tl.store(token + row, word.to(tl.int64))
        tl.store(tokens + row * room + at_step, word.to(tl.int64))
        tl.store(done + row, over | tl.load(is_eos + word))
        tl.store(step + row, at_step + 1)
        tl.store(position + row, tl.load(position + row) + 1)
        tl.store(slot + row, tl.load(slot + row) + 1)


@triton.jit(do_not_specialize=["slots"])
def embed(
    token, position, slot, words, places, x, place, visible, slots,
    E: tl.constexpr, H: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x[B, E] = the words' rows, and the positions' rows added to them where E = H, else in place[B, H]; the new slot
    becomes visible. A program a row."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    word = tl.load(words + tl.load(token + row) * E + cols, mask=cols < E, other=0.0)
    at = tl.load(places + (tl.load(position + row) + 2) * H + cols, mask=cols < H, other=0.0)
    if E == H:
        word = (word.to(tl.float32) + at.to(tl.float32)).to(x.dtype.element_ty)
    else:
        tl.store(place + row * H + cols, at, mask=cols < H)
    tl.store(x + row * E + cols, word, mask=cols < E)
    tl.store(visible + row // TAIL * slots + tl.load(slot + row), 1)
