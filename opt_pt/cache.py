"""The key-value cache.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

import torch
from torch import Tensor

from opt_common.config import OPTConfig

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
    def rows(self) -> int:
        return self.k[0].shape[0]

    @property
    def slots(self) -> int:
        return self.k[0].shape[2]

    def update(self, k: Tensor, v: Tensor, layer_idx: int | None, view: View = None) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, N, T, D] of a layer behind the past ones and return all of them,
        [B, N, length + T, D]. With a compacted Packing they come as [1, N, queries, D] and return as [1, N, keys, D].
        `length` moves on once a call, when all layers are done: `advance`."""
        if layer_idx is None:
            raise ValueError("layer_idx: found None, wanted the layer's number in the cache; give it when you make one")
        all_k, all_v = self.k[layer_idx], self.v[layer_idx]
        if isinstance(view, Packing) and view.compacted:
            rows, slots = view.slots
            all_k[rows, :, slots], all_v[rows, :, slots] = k[0].transpose(0, 1), v[0].transpose(0, 1)
            if self.length == 0:
                return k, v
            rows, slots = view.keys
            return all_k[rows, :, slots].transpose(0, 1)[None], all_v[rows, :, slots].transpose(0, 1)[None]
        end = self.length + k.shape[2]
        all_k[:, :, self.length : end], all_v[:, :, self.length : end] = k, v
        if self.length == 0:
            return k, v
        return all_k[:, :, :end], all_v[:, :, :end]

    def advance(self, tokens: int, segments: Tensor | None) -> None:
        """Count the new tokens of a call as past, and keep the documents [B, length] of all slots."""
        self.length, self.segments = self.length + tokens, segments
