"""The ways to attend, and what each token may see.

q [B, N, T, D]; k, v [B, N, S, D]; mask: what each query may see, a View. Result [B, T, N, D], and the weights
[B, N, T, S] from those that have them.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fast.plain import plain_layer, unwatched


@dataclass(frozen=True)
class Packing:
    """A batch without its padding, as flash-attn's variable-length kernels take it: all real tokens in one row,
    document after document.

    columns: if the hidden states, too, are compacted, [B·T], where each column of the batch is among them; None if
    attention alone takes the padding out. Padding attends to nothing and nothing to it, so padding that begins the
    same stays the same, and one such column, behind the real ones, stands for all.
    shape: (B, T). rows: [queries], and if compacted those for padding, where each is in the flattened batch B·T. slots:
    the row and slot, [queries] each, where its key goes in a cache; keys: those of all keys, [keys] each. starts_q,
    starts_k: [documents + 1], int32, the first query and key of each document, and the totals. longest_q, longest_k:
    tokens of the longest document.
    """

    columns: Tensor | None
    shape: tuple[int, int]
    rows: Tensor
    slots: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


# A mask [B or 1, 1, T, S], boolean (true: attends) or additive (0: attends). None: all earlier slots and its own; for
# eager, as in transformers, all slots
View = Tensor | Packing | None


def split_heads(x: Tensor, width: int) -> Tensor:
    """[B, T, N·D] as [B, N, T, D], of heads D = `width` wide."""
    B, T, H = x.shape
    return x.view(B, T, H // width, width).transpose(1, 2)


def attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: View, output_attentions: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attend by the implementation that the config of `module`, an attention, names; by the eager formula if the
    weights are wanted."""
    name = module.config._attn_implementation
    if output_attentions and name != "eager":
        name, mask = "eager", causal(q.shape[2], k.shape[2], q.device) if mask is None else mask
    return IMPLEMENTATIONS[name](q, k, v, mask, module.scaling, module.dropout if module.training else 0.0)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: View, scaling: float, dropout: float) -> tuple[Tensor, Tensor]:
    """The formula written out, which gives the weights [B, N, T, S]. The query is scaled, not the scores, as OPT was
    trained: in half precision that differs. The softmax is float32 in half precision too."""
    assert not isinstance(mask, Packing)
    scores = torch.matmul(q * scaling, k.mT)
    if mask is not None:
        scores = scores + additive(mask, q.dtype)
    weights = scores.softmax(dim=-1, dtype=max(q.dtype, torch.float32, key=lambda t: t.itemsize)).to(q.dtype)
    return torch.matmul(F.dropout(weights, dropout), v).transpose(1, 2), weights


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: View, scaling: float, dropout: float) -> tuple[Tensor, None]:
    """PyTorch's own fused attention; it scales the scores while they are still float32."""
    assert not isinstance(mask, Packing)
    T, S, dtype = q.shape[2], k.shape[2], q.dtype
    if mask is None and 1 < T < S:
        mask = causal(T, S, q.device)
    if q.is_cpu:
        if T == 1 and dropout == 0:
            return one_query(q, k, v, mask, scaling).transpose(1, 2), None
        wide = torch.promote_types(dtype, torch.float32)  # in half precision PyTorch's kernel takes twice as long
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(wide)
    is_causal = mask is None and bool(T > 1)  # torch.jit.trace makes sizes tensors
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scaling)
    return (out if out.dtype == dtype else out.to(dtype)).transpose(1, 2), None


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """[B, N, 1, D] of q [B, N, 1, D], k and v [B, N, S, D] and mask [B, 1, 1, S], on a CPU: written out in float32,
    five times as fast as PyTorch's kernel in bfloat16; one row in float32 is faster by that kernel."""
    if q.shape[0] == 1 and q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide) * scaling, k.to(wide).mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(wide).min) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(dim=-1), v.to(wide)).to(q.dtype)


def flash_attention_2(
    q: Tensor, k: Tensor, v: Tensor, mask: View, scaling: float, dropout: float
) -> tuple[Tensor, None]:
    """The flash-attn package's kernels (Dao 2023, arXiv:2307.08691), with a Packing for what is not causal alone."""
    import flash_attn  # pyright: ignore[reportMissingImports]

    if isinstance(mask, Tensor):
        found = list(mask.shape)
        raise ValueError(f"attention_mask: found a mask {found}, which 'flash_attention_2' cannot take; use 'sdpa'")
    # Without gradients the kernels are called below autograd's wrapper, which takes 50 us a call and imports PyTorch's
    # compiler, for seconds, at its first
    learns = dropout > 0 or q.requires_grad or k.requires_grad or v.requires_grad or torch.compiler.is_compiling()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, T, N, D]
    if mask is None:
        if learns:
            return flash_attn.flash_attn_func(q, k, v, dropout, scaling, causal=True), None
        return flash_attn.flash_attn_with_kvcache(q, k, v, softmax_scale=scaling, causal=True), None

    if mask.columns is not None:
        keys = len(mask.keys[0])
        q, k, v = q[0, : len(mask.slots[0])], k[0, :keys], v[0, :keys]  # [queries, N, D], [keys, N, D]
    else:
        q, k, v = q.flatten(0, 1)[mask.rows], k[mask.keys], v[mask.keys]
    starts, longest = (mask.starts_q, mask.starts_k), (mask.longest_q, mask.longest_k)
    if q.numel() == 0:  # every new token is padding
        out = q
    elif learns or q.shape[-1] % 8:
        out = flash_attn.flash_attn_varlen_func(q, k, v, *starts, *longest, dropout, scaling, causal=True)
    else:
        from flash_attn_2_cuda import varlen_fwd  # pyright: ignore[reportMissingImports]

        out = varlen_fwd(
            q, k, v, None, *starts, None, None, None, None, *longest,
            0.0, scaling, False, True, -1, -1, 0.0, False, None,
        )[0]  # fmt: skip
    if mask.columns is not None:
        return F.pad(out, (0, 0, 0, 0, 0, len(mask.rows) - len(out)))[None], None  # to padding, as below
    B, T = mask.shape  # back to their columns; as transformers has it, attention gives 0 to padding
    return out.new_zeros(B * T, *out.shape[1:]).index_copy(0, mask.rows, out).unflatten(0, (B, T)), None


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


def choose(decoder: Any, segments: Tensor | None, past: int, x: Tensor, output_attentions: bool) -> View:
    """What each of the new tokens x [B, T, H] may see, in the form that the decoder's implementation takes."""
    T, name = x.shape[1], decoder.config._attn_implementation
    if output_attentions or name != "flash_attention_2":
        mask = dense(segments, past, T, x.device)
        if name == "eager":
            mask = causal(T, past + T, x.device)[None, None] if mask is None and T > 1 else mask
            mask = mask if mask is None else additive(mask, x.dtype).expand(len(x), -1, -1, -1)
        return mask
    check_flash(x.device, torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype)
    if segments is None or segments.ndim == 4:
        return segments
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "attention_mask, position_ids: found one while a CUDA graph is captured, and 'flash_attention_2' removes "
            "as much padding as it finds; give none, or use 'sdpa'"
        )
    # layers that somebody looks at see the batch as it was given
    return unpad(segments, T, x if unwatched(x) and all(plain_layer(layer) for layer in decoder.layers) else None)


def compact(x: Tensor, view: View) -> Tensor:
    """x [B, T, H] as the layers take it: [1, rows, H] where the view says so."""
    return x.flatten(0, 1)[view.rows][None] if isinstance(view, Packing) and view.columns is not None else x


def restore(x: Tensor, view: View) -> Tensor:
    """The inverse of `compact`."""
    return x[0, view.columns].unflatten(0, view.shape) if isinstance(view, Packing) and view.columns is not None else x


def causal(T: int, S: int, device: torch.device) -> Tensor:
    """[T, S]: the last T of S tokens see every earlier one and themselves."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers to add to the scores, as in transformers: filled in, padding would have other
    gradients."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def dense(segments: Tensor | None, past: int, T: int, device: torch.device) -> Tensor | None:
    """The mask [B or 1, 1, T, S] of eager and sdpa: a token attends to the earlier slots of its own document. None
    where causality alone says it all.

    segments: [B, S], the document of each slot, counted from 1, or booleans where there is one; 0 is padding, which
    nothing attends to. As in transformers, padding attends to the real tokens before it (here: of the latest document);
    where there are none, in left padding, sdpa gives 0 and eager the mean over all slots. None: all are one document.
    A mask that the call brought stays as it is.
    """
    if segments is not None and segments.ndim == 4:
        return segments
    if segments is None and (past == 0 or T == 1):
        return None
    slots = torch.arange(past + T, device=device)
    earlier = slots[past:, None] >= slots
    if segments is None:
        return earlier[None, None]
    if segments.dtype == torch.bool:
        return (earlier & segments[:, None])[:, None]
    documents = segments.cummax(dim=1).values[:, past:, None]  # they grow from left to right
    return (earlier & (documents == segments[:, None]) & (segments != 0)[:, None])[:, None]


def unpad(segments: Tensor, T: int, x: Tensor | None = None) -> Packing:
    """What flash-attn needs to know of `segments` [B, S], of whose slots the last T are new. x: the hidden states
    [B, T, H], if they are to be compacted. Waits for the device: how much is real decides the shapes of all that
    follows. At least one slot is real."""
    B, S = segments.shape
    past = S - T
    keys = segments.flatten().nonzero()[:, 0]  # of the B·S slots, those that are real
    document = keys // S * (S + 1) + segments.flatten()[keys]
    # a document begins wherever the row or the segment changes
    first = F.pad(document[1:] != document[:-1], (1, 0), value=True).nonzero()[:, 0]
    new = keys % S >= past
    starts_k = F.pad(first, (0, 1), value=len(keys))
    starts_q = F.pad(new.long().cumsum(0), (1, 0))[starts_k]
    fresh = keys[new] if past else keys
    rows = fresh // S * T + fresh % S - past
    found, padding, columns = [starts_q.diff().max(), starts_k.diff().max()], rows[:0], None
    if x is not None:
        padding = (segments[:, past:] == 0).flatten().nonzero()[:, 0]
        found.append((x.flatten(0, 1)[padding] == x.flatten(0, 1)[padding[:1]]).all())
    longest_q, longest_k, *alike = torch.stack(found).tolist()
    if x is not None:
        places = torch.arange(B * T, device=rows.device)
        columns = torch.empty_like(places)
        columns[torch.cat([rows, padding])] = places.clamp(max=len(rows)) if alike[0] else places
        rows = torch.cat([rows, padding[:1] if alike[0] else padding])
    return Packing(
        columns=columns,
        shape=(B, T),
        rows=rows,
        slots=(fresh // S, fresh % S),
        keys=(keys // S, keys % S),
        starts_q=starts_q.int(),
        starts_k=starts_k.int(),
        longest_q=longest_q,
        longest_k=longest_k,
    )
