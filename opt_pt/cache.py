"""The key-value cache, and where the tokens of a call stand: their positions and which slots each may look at.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import check_positions


class KVCache:
    """Keys and values of past tokens, allocated once and written in place.

    k, v: a [B, S, N, D] tensor a layer.
    length: how many slots are taken; every row takes the same ones.
    segments: [B, length], the document each slot belongs to, counted from 1; 0 is padding. None: all are 1.
    """

    def __init__(self, config: OPTConfig, batch: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (batch, slots, config.num_attention_heads, config.head_dim)
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.segments: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.k[0].shape[1]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, T, N, D] of a layer behind the past ones; return all, [B, length + T, ...].
        `length` moves on once a call, when all layers are done."""
        end = self.length + k.shape[1]
        self.k[layer][:, self.length : end] = k
        self.v[layer][:, self.length : end] = v
        return self.k[layer][:, :end], self.v[layer][:, :end]


def place(
    config: OPTConfig,
    B: int,
    T: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: KVCache | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Positions [B or 1, T] of the new tokens (padding is -1), the boolean mask [B or 1, 1, T, S] of what each may
    attend to (None: every earlier slot and itself), and the segments [B, S] (None: all one document).

    A token attends to the earlier tokens of its own segment. Segment 0 is padding, which so attends to padding alone:
    no row of the mask is empty, and nothing real sees it. With `position_ids`, a document begins at each position 0
    and wherever the position does not grow.
    """
    past = cache.length if cache is not None else 0
    before = cache.segments if cache is not None else None
    tracing = torch.compiler.is_compiling()
    if attention_mask is not None and before is None and not tracing and bool(attention_mask.all()):
        attention_mask = None  # a mask of ones is what tokenizers give when nothing is padded

    slots = torch.arange(past + T, device=device)
    if attention_mask is None and position_ids is None and before is None:
        check_positions(config, past + T - 1, "input_ids")
        positions, segments = slots[None, past:], None
    else:
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

    if segments is not None:
        mask = (slots[past:, None] >= slots) & (segments[:, past:, None] == segments[:, None, :])
        return positions, mask[:, None], segments
    # causality alone: nothing to say for a single new token, nor for a whole sequence
    return positions, (slots[past:, None] >= slots)[None, None] if past and T > 1 else None, None
