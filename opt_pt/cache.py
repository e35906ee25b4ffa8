"""The key-value cache, and where the tokens of a call stand: their positions, and the document each belongs to.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import check_positions

from .attention import Packing, View


class KVCache:
    """Keys and values of past tokens, allocated once and written in place.

    k, v: a [B, N, S, D] tensor a layer: what one head reads lies in one piece.
    length: how many slots are taken; every row takes the same ones.
    segments: [B, length], the document each slot belongs to, counted from 1; 0 is padding. None: all are 1.
    """

    def __init__(self, config: OPTConfig, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, config.num_attention_heads, slots, config.head_dim)
        # zeros: a slot that is padding may never be written, and a weight of 0 times what is there must be 0
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.segments: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.k[0].shape[2]

    def update(self, layer: int, k: Tensor, v: Tensor, view: View) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, T, N, D] of a layer behind the past ones; return all, [B, length + T, ...].
        With a Packing they come as [queries, N, D] and all return as [keys, N, D].
        `length` moves on once a call, when all layers are done."""
        all_k, all_v = self.k[layer].transpose(1, 2), self.v[layer].transpose(1, 2)  # [B, S, N, D]
        if isinstance(view, Packing):
            all_k[view.slots], all_v[view.slots] = k, v
            return (all_k[view.keys], all_v[view.keys]) if self.length else (k, v)
        end = self.length + k.shape[1]
        all_k[:, self.length : end], all_v[:, self.length : end] = k, v
        return all_k[:, :end], all_v[:, :end]


def recording(device: torch.device) -> bool:
    """Whether a call is being recorded, by torch.compile or as a CUDA graph, so that no value can be looked at."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def place(
    config: OPTConfig,
    B: int,
    T: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> tuple[Tensor, Tensor | None]:
    """Positions [B or 1, T] of the new tokens (padding is -1), and the segments [B, S]: the document of each slot,
    counted from 1, and 0 for padding (None: all is one document, and nothing padding).

    With `position_ids`, a document begins at each position 0 and wherever the position does not grow.
    """
    past = cache.length if cache is not None else 0
    before = cache.segments if cache is not None else None
    tracing = recording(device)
    if attention_mask is not None and before is None and not tracing and bool(attention_mask.all()):
        attention_mask = None  # a mask of ones is what tokenizers give when nothing is padded

    slots = torch.arange(past + T, device=device)
    if attention_mask is None and position_ids is None and before is None:
        check_positions(config, past + T - 1, "input_ids")
        return slots[None, past:], None
    real = slots.new_ones((B, past + T)) if attention_mask is None else (attention_mask != 0).long()
    old = real[:, :past] if before is None else real[:, :past] * before
    new = real[:, past:]
    current = old.amax(dim=1, keepdim=True).clamp(min=1) if past else slots.new_ones((B, 1))
    if position_ids is None:
        segments = torch.cat([old, new * current], dim=1)
        same = (segments == current).long()
        positions = (same.cumsum(dim=1) * same - 1)[:, past:]
        largest_known = past + T <= config.max_position_embeddings
    else:
        positions = position_ids.long()
        starts = positions == 0
        fell = (positions[:, 1:] <= positions[:, :-1]) & (new[:, 1:] & new[:, :-1]).bool()
        starts = torch.cat([starts[:, :1].expand(B, 1), starts[:, 1:] | fell], dim=1)
        segments = torch.cat([old, new * (current + starts.long().cumsum(dim=1))], dim=1)
        largest_known = False
    if not largest_known and not tracing:
        name = "input_ids" if position_ids is None else "position_ids"
        check_positions(config, int(positions.max()), name, int(positions.min()))
    return positions, segments
