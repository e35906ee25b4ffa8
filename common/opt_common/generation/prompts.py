"""What `generate` continues, in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import OPTConfig
from ..inputs import check_call, check_dtype, check_tokens
from .config import GenerationConfig
from .options import Options
from .settings import Settings, check_generate, merged


@dataclass(frozen=True)
class Prompt:
    """What `generate` continues: ids [B, T], mask [B, T] (True: a real token), and the settings. With `inputs_embeds`
    ids are [B, 0]. `options` holds what was given, for those that are objects of a framework."""

    ids: np.ndarray
    mask: np.ndarray
    settings: Settings
    options: Options


def prompt(
    config: OPTConfig,
    input_ids: Any,
    attention_mask: Any,
    options: Mapping[str, Any],
    held: GenerationConfig | None = None,
) -> Prompt:
    """The checked arguments of a `generate`, in numpy. Without a mask, everything but `pad_token_id` is real, and
    all is if that ends a text too; without ids, a text begins with `bos_token_id`. Raises ValueError that names the
    argument."""
    chosen = merged(held, options)
    embeds, masked = chosen.get("inputs_embeds"), None if attention_mask is None else np.shape(attention_mask)
    if embeds is None or input_ids is not None:
        ids = np.asarray(started(config, input_ids, chosen))
        B, T = check_call(config, ids.shape, None, masked if embeds is None else None)
        check_dtype(config, "input_ids", ids.dtype)
        check_tokens(config, int(ids.min()), int(ids.max()))
    if embeds is not None:
        check_dtype(config, "inputs_embeds", embeds.dtype)
        B, T = check_call(config, None, embeds.shape, masked)
        ids = np.zeros((B, 0), np.int32) if input_ids is None else ids
    if attention_mask is None:
        pad = _padding(config, chosen)
        mask = np.not_equal(ids, pad) if pad is not None and ids.shape == (B, T) else np.ones((B, T), bool)
    else:
        mask = np.asarray(attention_mask) != 0
    counts = mask.sum(axis=1)
    return Prompt(ids, mask, check_generate(config, T, int(counts.max()), int(counts.min()), chosen), chosen)


def _padding(config: OPTConfig, options: Options) -> int | None:
    """The token that can only be padding."""
    pad, eos = options.get("pad_token_id", config.pad_token_id), options.get("eos_token_id", config.eos_token_id)
    return None if pad in np.atleast_1d([] if eos is None else eos) else pad


def started(config: OPTConfig, input_ids: Any, options: Options) -> Any:
    """The prompt's ids: `input_ids`, or `inputs`, transformers' other name of it, or else one row with the token that
    begins a text. Raises ValueError for both, or if there is none."""
    inputs = options.get("inputs")
    if input_ids is not None and inputs is not None:
        raise ValueError("input_ids, inputs: found both, wanted one of them")
    if input_ids is None and inputs is None:
        bos = options.get("bos_token_id")
        bos = config.bos_token_id if bos is None else bos
        if bos is None:
            raise ValueError("input_ids: found None and no bos_token_id, wanted one of them")
        return [[bos]]
    return inputs if input_ids is None else input_ids
