"""The ways to attend, with one signature.

q [B, T, N, D]; k, v [B, S, N, D]; view: what each query may see; dropout: the chance that a weight is dropped. Result
[B, T, N, D], and the weights [B, N, T, S] from those that have them.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """A batch without its padding, as flash-attn's variable-length kernels take it: all real tokens in one row,
    document after document.

    rows: [queries], where each real new token is in the flattened batch B·T. slots: the row and slot, [queries] each,
    where its key goes in a cache; keys: those of all keys, [keys] each. starts_q, starts_k: [documents + 1], int32, the
    first query and key of each document, and the totals. longest_q, longest_k: tokens of the longest document.
    """

    rows: Tensor
    slots: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


View = Tensor | Packing | None  # a mask [B or 1, 1, T, S] for eager and sdpa; None: all earlier slots and its own


def eager(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> tuple[Tensor, Tensor]:
    """Written out, for those who want the weights [B, N, T, S]. The query is scaled, not the scores, as OPT was
    trained: in half precision it is not the same. The softmax is float32 in half precision too."""
    assert not isinstance(view, Packing)
    T, S = q.shape[1], k.shape[1]
    if view is None:
        view = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = torch.einsum("btnd,bsnd->bnts", q * q.shape[-1] ** -0.5, k).masked_fill(~view, torch.finfo(q.dtype).min)
    weights = scores.softmax(dim=-1, dtype=max(q.dtype, torch.float32, key=lambda t: t.itemsize)).to(q.dtype)
    return torch.einsum("bnts,bsnd->btnd", F.dropout(weights, dropout), v), weights


def sdpa(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> tuple[Tensor, None]:
    """PyTorch's own fused attention; it scales the scores while they are still float32."""
    assert not isinstance(view, Packing)
    causal = view is None and q.shape[1] > 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    dtype = q.dtype
    if q.device.type == "cpu":
        if q.shape[2] == 1 and dropout == 0:
            return one_query(q, k, v, view).transpose(1, 2), None
        wide = torch.promote_types(dtype, torch.float32)  # in half precision PyTorch's kernel takes twice as long
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=view, dropout_p=dropout, is_causal=causal)
    return out.to(dtype).transpose(1, 2), None


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, N, 1, D] of q [B, N, 1, D], k and v [B, N, S, D] and mask [B, 1, 1, S], on a CPU: written out in float32,
    where PyTorch's own is slow, by five times in bfloat16; but for one row in float32, where it is not."""
    if q.shape[0] == 1 and q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide) * q.shape[-1] ** -0.5, k.to(wide).mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    return torch.matmul(scores.softmax(dim=-1), v.to(wide)).to(q.dtype)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, view: View, dropout: float) -> tuple[Tensor, None]:
    """The flash-attn package's kernels (Dao 2023, arXiv:2307.08691). With a Packing, q is [queries, N, D] and k and v
    are [keys, N, D].

    Where nothing is learnt they are called without the layer that autograd needs, which takes 50 us a call and imports
    PyTorch's compiler, for seconds, at its first."""
    from flash_attn import (  # pyright: ignore[reportMissingImports]
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
    )

    if q.numel() == 0:  # every new token is padding
        return q, None
    learns = dropout > 0 or q.requires_grad or k.requires_grad or v.requires_grad
    if isinstance(view, Packing):
        starts, longest = (view.starts_q, view.starts_k), (view.longest_q, view.longest_k)
        if learns or torch.compiler.is_compiling() or q.shape[-1] % 8:
            return flash_attn_varlen_func(q, k, v, *starts, *longest, dropout, causal=True), None
        from flash_attn_2_cuda import varlen_fwd  # pyright: ignore[reportMissingImports]

        out = varlen_fwd(
            q, k, v, None, *starts, None, None, None, None, *longest,
            0.0, q.shape[-1] ** -0.5, False, True, -1, -1, 0.0, False, None,
        )  # fmt: skip
        return out[0], None
    if learns or torch.compiler.is_compiling():
        return flash_attn_func(q, k, v, dropout, causal=True), None
    return flash_attn_with_kvcache(q, k, v, causal=True), None


IMPLEMENTATIONS = {"eager": eager, "sdpa": sdpa, "flash_attention_2": flash_attention_2}


def check_implementation(name: str) -> None:
    """Raise ValueError for a name that is none, ImportError where flash-attn is asked for and not installed."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation: found {name!r}, wanted one of {', '.join(IMPLEMENTATIONS)}")
    if name == "flash_attention_2":
        try:
            importlib.import_module("flash_attn")  # here, where the model is made: it takes seconds
        except ImportError as error:
            found = "which is not installed" if isinstance(error, ModuleNotFoundError) else f"which fails: {error}"
            raise ImportError(
                f"attn_implementation: 'flash_attention_2' needs the flash-attn package, {found}; "
                "pip install 'opt-zoo[flash]', or take 'sdpa'"
            ) from error


def check_flash(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where flash-attn's kernels cannot run: they need a GPU of compute capability 8.0 or more and
    half precision. Nothing else is run in their place."""
    if device.type != "cuda":
        why = f"the model is on {device.type}; move it to a GPU"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        why = f"{torch.cuda.get_device_name(device)} has compute capability below 8.0; use a newer GPU"
    elif dtype not in (torch.float16, torch.bfloat16):
        why = f"it computes in {str(dtype).removeprefix('torch.')}; load it with dtype='float16' or 'bfloat16'"
    else:
        return
    raise ValueError(f"attn_implementation: 'flash_attention_2' cannot run: {why}, or take 'sdpa'")


def dense(segments: Tensor | None, past: int, T: int, device: torch.device) -> Tensor | None:
    """The mask [B or 1, 1, T, S] of eager and sdpa: a token attends to the earlier slots of its own segment. None where
    causality alone says it all.

    segments: [B, S], the document of each slot, 0 for padding, which so attends to padding alone: no row of the mask
    is empty, and nothing real sees it. None: all are one document.
    """
    if segments is None and (past == 0 or T == 1):
        return None
    slots = torch.arange(past + T, device=device)
    causal = slots[past:, None] >= slots
    if segments is None:
        return causal[None, None]
    return (causal & (segments[:, past:, None] == segments[:, None, :]))[:, None]


def unpad(segments: Tensor, T: int) -> Packing:
    """What flash-attn needs to know of `segments` [B, S], of whose slots the last T are new. Waits for the device: how
    much is real decides the shapes of all that follows. At least one slot is real."""
    B, S = segments.shape
    past = S - T
    keys = segments.flatten().nonzero()[:, 0]  # of the B·S slots, those that are real
    document = keys // S * (S + 1) + segments.flatten()[keys]
    # a document begins wherever the row or the segment changes
    first = F.pad(document[1:] != document[:-1], (1, 0), value=True).nonzero()[:, 0]
    new = keys % S >= past
    starts_k = F.pad(first, (0, 1), value=len(keys))
    starts_q = F.pad(new.long().cumsum(0), (1, 0))[starts_k]
    longest_q, longest_k = torch.stack([starts_q.diff().max(), starts_k.diff().max()]).tolist()
    fresh = keys[new] if past else keys
    return Packing(
        rows=fresh // S * T + fresh % S - past,
        slots=(fresh // S, fresh % S),
        keys=(keys // S, keys % S),
        starts_q=starts_q.int(),
        starts_k=starts_k.int(),
        longest_q=longest_q,
        longest_k=longest_k,
    )
