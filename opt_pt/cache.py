"""The key-value cache.

B batch   T new tokens   S slots   N heads   D head width
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from opt_common.config import OPTConfig
from opt_common.kin import Kin

from .attention import Packing, View


class CachedLayer:
    """What a cache holds of one layer: `keys` and `values`, [B, N, length, D] each; it unpacks as the two. Set both, to
    equal lengths, to replace them, for example by fewer."""

    def __init__(self, cache: KVCache, layer_idx: int) -> None:
        self._cache, self._layer_idx = cache, layer_idx

    @property
    def keys(self) -> Tensor:
        return self._cache.k[self._layer_idx][:, :, : self.get_seq_length()]

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._set(self._cache.k, keys)

    @property
    def values(self) -> Tensor:
        return self._cache.v[self._layer_idx][:, :, : self.get_seq_length()]

    @values.setter
    def values(self, values: Tensor) -> None:
        self._set(self._cache.v, values)

    def _set(self, tensors: list[Tensor], new: Tensor) -> None:
        cache, i = self._cache, self._layer_idx
        tensors[i] = new
        if cache.k[i].shape[2] == cache.v[i].shape[2]:  # until then the other still has its old length
            cache.taken[i] = new.shape[2]

    def get_seq_length(self) -> int:
        """How many slots are taken."""
        return self._cache.taken[self._layer_idx]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.keys, self.values))

    def __getitem__(self, i: int) -> Tensor:
        return (self.keys, self.values)[i]

    def __len__(self) -> int:
        return 2


class KVCache(Kin):
    """Keys and values of past tokens.

    `KVCache()` grows: the first call's keys and values are kept as they are, without a copy, and later ones written
    behind them into memory that is allocated with some room to spare. With arguments all `slots` are allocated at once,
    and nothing moves after that.

    k, v: a [B, N, S, D] tensor a layer: what one head reads lies in one piece. The first `length` slots are taken, of
    every row the same ones.
    segments: [B, length], the document each slot belongs to, counted from 1, or booleans where there is one; 0 is
    padding. None: all are 1.
    """

    def __init__(
        self,
        config: OPTConfig | None = None,
        batch: int | None = None,
        slots: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        heads: int | None = None,
    ) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        self.taken: list[int] = []  # slots of each layer
        self.fixed = slots is not None
        self.segments: Tensor | None = None
        if config is None or batch is None or slots is None:
            if (config, batch, slots, device, dtype) != (None, None, None, None, None):
                raise ValueError("KVCache: found some of config, batch and slots, wanted all of them, or none to grow")
            return
        heads, layers = heads or config.num_attention_heads, config.num_hidden_layers
        shape = (batch, heads, slots, config.head_dim)
        # zeros: a slot that is padding may never be written, and a weight of 0 times what is there must be 0
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.taken = [0] * layers

    @property
    def rows(self) -> int | None:
        """The number of rows, B; None while it is unknown."""
        return self.k[0].shape[0] if self.k and (self.fixed or self.taken[0]) else None

    @property
    def slots(self) -> int | None:
        """The number of slots, S; None if the cache grows."""
        return self.k[0].shape[2] if self.fixed else None

    @property
    def length(self) -> int:
        """How many slots are taken."""
        return self.get_seq_length()

    @length.setter
    def length(self, length: int) -> None:
        self.taken = [length] * len(self.taken)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, view: View = None) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [B, N, T, D] of a layer behind its past ones and return all of them,
        [B, N, length + T, D]. With a compacted Packing they come as [1, N, rows, D] and return as [1, N, keys, D].
        Raises ValueError if they do not fit."""
        while len(self.k) <= layer_idx and not self.fixed:
            self.k.append(k[:, :, :0])
            self.v.append(v[:, :, :0])
            self.taken.append(0)
        compacted = isinstance(view, Packing) and view.columns is not None
        B, T = view.shape if compacted else (k.shape[0], k.shape[2])  # type: ignore[union-attr]
        past = self.taken[layer_idx]
        end = self.taken[layer_idx] = past + T
        if self.fixed and end > self.k[layer_idx].shape[2]:
            self.taken[layer_idx] = past
            raise ValueError(f"past_key_values: {self.slots} slots, {past} used; {T} new tokens do not fit")
        for tensors, new in ((self.k, k), (self.v, v)):
            old = tensors[layer_idx]
            if not self.fixed and not compacted and (past == 0 or _watched(new, old)):
                tensors[layer_idx] = new if past == 0 else torch.cat([old[:, :, :past], new], dim=2)
                continue
            if old.shape[2] < end:
                room = end if past == 0 else end + max(64, end // 4)
                tensors[layer_idx] = new.new_zeros(B, new.shape[1], room, new.shape[3])
                tensors[layer_idx][:, :, :past] = old[:, :, :past]
            if compacted:
                rows, slots = view.slots  # type: ignore[union-attr]
                tensors[layer_idx][rows, :, slots] = new[0, :, : len(rows)].transpose(0, 1)
            else:
                tensors[layer_idx][:, :, past:end] = new
        if past == 0:
            return k, v
        k, v = self.k[layer_idx], self.v[layer_idx]
        if compacted:
            rows, slots = view.keys  # type: ignore[union-attr]
            return k[rows, :, slots].transpose(0, 1)[None], v[rows, :, slots].transpose(0, 1)[None]
        return k[:, :, :end], v[:, :, :end]

    # What transformers' caches do, by the same names

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many slots of a layer are taken."""
        return self.taken[layer_idx] if layer_idx < len(self.taken) else 0

    def get_max_cache_shape(self) -> int:
        """The number of slots, S; -1 if the cache grows."""
        return self.slots or -1

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.k)

    def __getitem__(self, layer_idx: int) -> CachedLayer:
        """The keys and values of a layer."""
        return CachedLayer(self, range(len(self))[layer_idx])

    def __iter__(self) -> Iterator[CachedLayer]:
        return (self[i] for i in range(len(self)))

    @property
    def layers(self) -> list[CachedLayer]:
        """The keys and values of every layer."""
        return list(self)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; if it is negative, drop that many from the end."""
        length = max_length if max_length >= 0 else max(0, self.length + max_length)
        if length < self.length:
            self.length = length
            self.segments = None if self.segments is None else self.segments[:, :length]

    def reset(self) -> None:
        """Forget all tokens; memory is kept."""
        self.length, self.segments = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self._rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def _rows(self, change: Any) -> None:
        self.k, self.v = [change(k) for k in self.k], [change(v) for v in self.v]
        self.segments = None if self.segments is None else change(self.segments)


def _watched(new: Tensor, old: Tensor) -> bool:
    """Whether a write in place would break a gradient, or a compiled graph."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and (new.requires_grad or old.requires_grad))


def remember(cache: Any, k: Tensor, v: Tensor, layer_idx: int | None, view: View) -> tuple[Tensor, Tensor]:
    """`cache.update`, of a KVCache or of one of transformers' caches."""
    if layer_idx is None:
        raise ValueError("layer_idx: found None, wanted the layer's number in the cache; give it when you make one")
    if isinstance(cache, KVCache):
        return cache.update(k, v, layer_idx, view)
    end = past_length(cache, layer_idx) + k.shape[2]
    k, v = cache.update(k, v, layer_idx)
    return k[:, :, :end], v[:, :, :end]  # a StaticCache returns its free slots too


def past_length(cache: Any, layer_idx: int = 0) -> int:
    """How many tokens a cache holds; 0 if there is none."""
    return 0 if cache is None else int(cache.get_seq_length(layer_idx))


def _flatten(cache: KVCache) -> tuple[list[Any], tuple[int, tuple[int, ...], bool]]:
    return [*cache.k, *cache.v, cache.segments], (len(cache.k), tuple(cache.taken), cache.fixed)


def _unflatten(tensors: Any, context: tuple[int, tuple[int, ...], bool]) -> KVCache:
    cache, (layers, taken, fixed) = KVCache(), context
    *kv, cache.segments = tensors
    cache.k, cache.v, cache.taken, cache.fixed = list(kv[:layers]), list(kv[layers:]), list(taken), fixed
    return cache


# torch.export, FSDP and others take a call's result apart and put it together again
_pytree.register_pytree_node(
    KVCache, _flatten, _unflatten, serialized_type_name="opt_pt.KVCache", to_dumpable_context=list,
    from_dumpable_context=lambda c: (c[0], tuple(c[1]), c[2]),
)  # fmt: skip
