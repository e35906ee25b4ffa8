"""The ways to attend, with one signature.

q [B, T, N, D], already scaled; k, v [B, S, N, D]; mask [B or 1, 1, T, S], boolean, what each query may see, or None for
all earlier slots and its own. Result [B, T, N, D], and the weights [B, N, T, S] from those that have them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Written out, for those who want the weights [B, N, T, S]. The softmax is float32 in half precision too."""
    T, S = q.shape[1], k.shape[1]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = torch.einsum("btnd,bsnd->bnts", q, k).masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = scores.softmax(dim=-1, dtype=max(q.dtype, torch.float32, key=lambda t: t.itemsize)).to(q.dtype)
    return torch.einsum("bnts,bsnd->btnd", F.dropout(weights, dropout), v), weights


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, None]:
    """PyTorch's own fused attention."""
    causal = mask is None and q.shape[1] > 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=1.0)
    return out.transpose(1, 2), None


IMPLEMENTATIONS = {"eager": eager, "sdpa": sdpa}
