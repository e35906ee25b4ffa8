"""The arguments of a call: checked, and where its tokens stand, their positions and the document each belongs to.

B batch   T new tokens   S slots: past tokens and T
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opt_common.config import OPTConfig
from opt_common.inputs import (
    array,
    check_cache,
    check_call,
    check_dtype,
    check_positions,
    check_tokens,
)

from .cache import KVCache, past_length

# Arguments of transformers' models that have no effect on an OPT's, there and here.
_NO_EFFECT = {"token_type_ids", "head_mask", "cache_position"}
_OF_THE_LOSS = ("ignore_index", "num_items_in_batch", "shift_labels")

# The types that go on as they are, of each argument that is a tensor
_INDICES, _FLOATS = {torch.int64, torch.int32}, {torch.float32, torch.float16, torch.bfloat16, torch.float64}
_AS_THEY_ARE: dict[str, set[torch.dtype]] = {
    "input_ids": _INDICES,
    "position_ids": _INDICES,
    "attention_mask": {*_INDICES, *_FLOATS, torch.bool, torch.int8, torch.uint8},
    "inputs_embeds": set(),  # of the model's type alone
    "labels": {*_FLOATS, torch.int64, torch.bool},
    "start_positions": {torch.int64},
    "end_positions": {torch.int64},
}


def takes_arrays(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the tensors of a call be numpy's arrays, or lists, of every type that `opt_common.inputs.KINDS` says. A call
    that fails leaves its cache as it was, and names a tensor that lies on another device than the model."""
    names = [*inspect.signature(forward).parameters][1:]

    @wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name, x in chain(zip(names, args, strict=False), kwargs.items()):
            if name in _AS_THEY_ARE and not (x is None or (isinstance(x, Tensor) and x.dtype in _AS_THEY_ARE[name])):
                given = [_tensor(self, name, x) for name, x in zip(names, args, strict=False)]
                args = (*given, *args[len(given) :])
                kwargs = {name: _tensor(self, name, x) for name, x in kwargs.items()}
                break
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        cache = kwargs["past_key_values"] if "past_key_values" in kwargs else args[2] if len(args) > 2 else None
        before = (cache.length, cache.segments) if isinstance(cache, KVCache) else None
        try:
            return forward(self, *args, **kwargs)
        except BaseException as error:
            if before is not None:
                cache.length, cache.segments = before  # type: ignore[union-attr]
            if isinstance(error, RuntimeError) and "device" in str(error):
                _check_devices(self, dict(zip(names, args, strict=False)) | kwargs, error)
            raise

    return call


def _tensor(model: Any, name: str, x: Any) -> Any:
    """An argument of a call, of a type that goes on."""
    if name not in _AS_THEY_ARE or x is None:
        return x
    weight = next(model.parameters())
    if not isinstance(x, Tensor):
        found = array(name, x)
        found = found.copy() if found.dtype.kind in "biufc" else found.astype(np.float32)  # PyTorch reads no bfloat16
        x = torch.from_numpy(found).to("cpu" if weight.is_meta else weight.device)
    if name != "labels":
        check_dtype(model.config, name, x.dtype)
    if name == "inputs_embeds":
        own = weight.is_floating_point() and not torch.is_autocast_enabled(x.device.type)
        return x.to(weight.dtype) if own else x
    if name == "input_ids" and x.dtype == torch.uint64 and x.device.type == "cpu":
        # int64 shows the largest as negative
        check_tokens(model.config, 0, int(x.numpy().max(initial=0)))
    return x if x.dtype in _AS_THEY_ARE[name] or x.is_complex() else x.long()


def _check_devices(model: Any, given: dict[str, Any], error: RuntimeError) -> None:
    """Raise ValueError for a tensor that is not where the model is, which is why the call failed."""
    home = next(model.parameters()).device
    for name in _AS_THEY_ARE:
        x = given.get(name)
        if isinstance(x, Tensor) and x.device != home:
            raise ValueError(f"{name}: found on {x.device}, wanted on {home}, as the model") from error


class Wanted(NamedTuple):
    """What a call returns besides its result."""

    cache: bool
    attentions: bool
    hidden_states: bool


def wanted(decoder: Any, use_cache: bool | None, kwargs: dict[str, Any]) -> Wanted:
    """The settings of a call, the config's where it gives none. Raises TypeError for unknown arguments."""
    config = decoder.config
    names = ("output_attentions", "output_hidden_states")
    if unknown := kwargs.keys() - _NO_EFFECT - {*names, *_OF_THE_LOSS}:
        raise TypeError(f"found unknown arguments {', '.join(sorted(unknown))}")
    attentions, hidden_states = (getattr(config, name) if kwargs.get(name) is None else kwargs[name] for name in names)
    if decoder.gradient_checkpointing and decoder.training:
        use_cache = False  # a recomputation would write a second time
    if use_cache is None:
        use_cache = config.use_cache and can_cache(decoder)
    return Wanted(bool(use_cache), attentions, hidden_states)


def can_cache(decoder: Any) -> bool:
    """Whether each layer has a place of its own in a cache: a copied layer has its original's, until it is numbered."""
    attentions = [getattr(layer, "self_attn", None) for layer in decoder.layers]
    numbers = [getattr(attention, "layer_idx", None) for attention in attentions]
    return len({*numbers}) == len(numbers) or None in numbers


def loss_options(config: OPTConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model's loss_function takes by keyword: the size of the vocabulary, and what is in a call for it alone."""
    return {"vocab_size": config.vocab_size, **{name: kwargs[name] for name in _OF_THE_LOSS if name in kwargs}}


def check(
    config: OPTConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: Any,
    inputs_embeds: Tensor | None,
    position_ids: Tensor | None,
) -> tuple[Tensor | None, int, int]:
    """Check the arguments of a call and return input_ids as [B, T], B and T. As in transformers, ids may come as [T] or
    with more dimensions than two. Raises ValueError that names the argument."""
    if not (cache is None or hasattr(cache, "get_seq_length")):
        raise ValueError(f"past_key_values: found {type(cache).__name__}, wanted a KVCache")
    if isinstance(cache, KVCache) and cache.fixed:  # one that grows is as wide as the layers, which may be pruned
        _, heads, _, width = cache.k[0].shape
        fewer = heads < config.num_attention_heads  # of one of several devices
        check_cache(config, len(cache), None if fewer else heads, width)
    past, whole = past_length(cache), attention_mask is not None and attention_mask.ndim == 4
    if input_ids is not None and input_ids.ndim not in (0, 2) and input_ids.numel() > 0:
        input_ids = input_ids.reshape(-1, input_ids.shape[-1])
    B, T = check_call(
        config,
        None if input_ids is None else input_ids.shape,
        None if inputs_embeds is None else inputs_embeds.shape,
        None if attention_mask is None or whole else attention_mask.shape,
        None if position_ids is None else position_ids.view(-1, position_ids.shape[-1]).shape,
        past,
        slots=getattr(cache, "slots", None),
        rows=getattr(cache, "rows", None),
    )
    if whole:
        rows, heads, *rest = attention_mask.shape  # type: ignore[union-attr]
        if rows not in (1, B) or heads not in (1, config.num_attention_heads) or rest != [T, past + T]:
            found = f"attention_mask: found shape {[rows, heads, *rest]}"
            raise ValueError(f"{found}, wanted [{B}, {past + T}] or [{B}, 1, {T}, {past + T}]")
        if position_ids is None:
            raise ValueError("position_ids: found None, wanted the tokens' positions beside a 4-D attention_mask")
    # on a GPU, looking would wait for it
    if input_ids is not None and input_ids.device.type == "cpu" and not recording(input_ids.device):
        check_tokens(config, int(input_ids.min()), int(input_ids.max()))
    return input_ids, B, T


def columns(logits_to_keep: int | Tensor, labels: Tensor | None) -> slice | Tensor:
    """The columns whose logits are computed: the last so many, or those in a tensor; 0 for all."""
    if isinstance(logits_to_keep, Tensor):
        keep: slice | Tensor = logits_to_keep
    else:
        keep = slice(-int(logits_to_keep), None)
    if labels is not None and (isinstance(keep, Tensor) or keep != slice(0, None)):
        raise ValueError("labels, logits_to_keep: found both; the loss needs the logits of every token")
    return keep


def recording(device: torch.device) -> bool:
    """Whether a call is being recorded, by a compiler, a tracer or as a CUDA graph, or transformed (torch.func): no
    value may be looked at, or other values would be answered as these."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def place(
    config: OPTConfig,
    B: int,
    T: int,
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
) -> tuple[Tensor, Tensor | None]:
    """Positions [B or 1, T] of the new tokens (padding is -1), and the segments [B, S]: the document of each slot,
    counted from 1, and 0 for padding; as booleans where there is one document (None: and nothing padding).

    With `position_ids`, a document begins at each position 0 and wherever the position does not grow. In place of the
    segments, a 4-D attention_mask stays as it is: it says what each token sees.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        assert position_ids is not None
        if not recording(device):
            check_positions(config, int(position_ids.max()), smallest=int(position_ids.min()))
        return position_ids.long(), attention_mask
    past, before = past_length(cache), getattr(cache, "segments", None)
    if before is not None and before.shape[1] != past:
        before = None  # somebody took slots out of the cache, or put some in
    tracing = recording(device)
    if attention_mask is not None and before is None and not tracing and bool(attention_mask.all()):
        attention_mask = None  # a mask of ones is what tokenizers give when nothing is padded

    slots = torch.arange(past + T, device=device)
    if attention_mask is None and position_ids is None and before is None:
        check_positions(config, past + T - 1, "input_ids")
        return slots[None, past:].expand(B, -1), None
    real = slots.new_ones((B, past + T)) if attention_mask is None else (attention_mask != 0).long()
    old = real[:, :past] if before is None else real[:, :past] * before
    new = real[:, past:]
    current = old.amax(dim=1, keepdim=True).clamp(min=1) if past else slots.new_ones((B, 1))
    if position_ids is None:
        segments = torch.cat([old, new * current], dim=1)
        same = (segments == current).long()
        positions = (same.cumsum(dim=1) * same - 1)[:, past:]
        largest_known = past + T <= config.max_position_embeddings
        if before is None or before.dtype == torch.bool:
            segments = segments.bool()
    else:
        positions = position_ids.long().view(-1, T)
        starts = positions == 0
        fell = (positions[:, 1:] <= positions[:, :-1]) & (new[:, 1:] & new[:, :-1]).bool()
        starts = torch.cat([starts[:, :1].expand(B, 1), starts[:, 1:] | fell], dim=1)
        segments = torch.cat([old, new * (current + starts.long().cumsum(dim=1))], dim=1)
        largest_known = False
    if not largest_known and not tracing:
        name = "input_ids" if position_ids is None else "position_ids"
        check_positions(config, int(positions.max()), name, int(positions.min()))
    return positions, segments
