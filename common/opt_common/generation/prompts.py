"""What `generate` continues, in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import OPTConfig
from ..inputs import Shape, array, check_call, check_dtype, check_tokens
from .config import GenerationConfig
from .options import Options
from .settings import Settings, check_generate, merged


@dataclass(frozen=True)
class Prompt:
    """What `generate` continues: ids [B, T], mask [B, held + T] (True: a real token), and the settings. With
    `inputs_embeds` ids are [B, 0]. `options` holds what was given, for those that are objects of a framework.
    held: how many columns in front `past_key_values` has and the ids have not."""

    ids: np.ndarray
    mask: np.ndarray
    settings: Settings
    options: Options
    held: int = 0

    def unread(self, past: int) -> int:
        """From which column of the ids or embeddings on a model reads that has a cache of `past` tokens. Raises
        ValueError if the cache does not fit the prompt."""
        T = self.mask.shape[1]
        if self.held and past != self.held:
            raise ValueError(
                f"attention_mask: found {T} columns, wanted {past} of past_key_values and {T - self.held} new"
            )
        if past >= T:
            hint = f"; or with new ids alone, an attention_mask of all {past + T} columns"
            raise ValueError(f"past_key_values: found {past} tokens, wanted fewer than the prompt's {T}{hint}")
        if isinstance(self.mask, np.ndarray) and not self.mask[:, past:].any(axis=1).all():
            raise ValueError(f"attention_mask: found a row without tokens after the {past} of past_key_values")
        return past - self.held


def prompt(
    config: OPTConfig,
    input_ids: Any,
    attention_mask: Any,
    options: Mapping[str, Any],
    kept: GenerationConfig | None = None,
) -> Prompt:
    """The checked arguments of a `generate`, in numpy. Without a mask, everything but `pad_token_id` is real, and
    all is if that ends a text too; without ids, a text begins with `bos_token_id`. Raises ValueError that names the
    argument."""
    chosen, held = merged(kept, options), 0
    embeds, masked = chosen.get("inputs_embeds"), None if attention_mask is None else np.shape(attention_mask)
    if embeds is None or input_ids is not None:
        ids = array("input_ids", started(config, input_ids, chosen))
        held = held_alone(ids.shape, masked, chosen)
        B, T = check_call(config, ids.shape, None, masked if embeds is None else None, past=held)
        check_dtype(config, "input_ids", ids.dtype)
        check_tokens(config, int(ids.min()), int(ids.max()))
    if embeds is not None:
        check_dtype(config, "inputs_embeds", embeds.dtype)
        unequal = embeds != embeds
        if bool(unequal.any() if hasattr(unequal, "any") else np.any(unequal)):  # TensorFlow's tensors have none
            raise ValueError("inputs_embeds: found NaN, wanted numbers")
        B, T = check_call(config, None, embeds.shape, masked)
        ids = np.zeros((B, 0), np.int32) if input_ids is None else ids
    if attention_mask is None:
        pad = padding(config, chosen)
        mask = np.not_equal(ids, pad) if pad is not None and ids.shape == (B, T) else np.ones((B, T), bool)
    else:
        mask = array("attention_mask", attention_mask)
        check_dtype(config, "attention_mask", mask.dtype)
        mask = mask != 0
    counts = mask.sum(axis=1)
    settings = check_generate(config, B, T, int(counts.max()), int(counts.min()), chosen)
    return Prompt(ids, mask, settings, chosen, held)


def held_alone(ids: Shape, mask: Shape | None, options: Options) -> int:
    """How many columns are in `past_key_values` and not in the ids: those that the mask has more, as in transformers.
    Raises ValueError where their tokens would be read again."""
    known = options.get("past_key_values") is None or options.get("inputs_embeds") is not None
    if known or mask is None or len(mask) != 2 or mask[1] <= ids[1]:
        return 0
    if not options.get("use_cache", True):
        raise ValueError("use_cache: found False with past_key_values, wanted True, or the ids of all columns")
    return mask[1] - ids[1]


def padding(config: OPTConfig, options: Options) -> int | None:
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
