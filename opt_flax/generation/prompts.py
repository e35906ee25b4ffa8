"""What `generate` continues, as arrays of the widths that its programs are compiled for.

B prompts   T columns of a prompt   N columns of the other prompt of guidance
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from opt_common.generation import Prompt, Settings, check_generate, columns, merged, prompt
from opt_common.generation.prompts import held_alone, padding, started
from opt_common.inputs import check_call, check_tokens

from .loop import Given


def asked(model: Any, input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> Prompt:
    """The checked arguments of a `generate`, whose arrays may be traced. Raises ValueError that names the argument."""
    config, held = model.config, model.generation_config
    arrays = (input_ids, attention_mask, options.get("inputs"), options.get("inputs_embeds"))
    if not any(isinstance(x, Tracer) for x in arrays):
        return prompt(config, input_ids, attention_mask, options, held)
    chosen = merged(held, options)
    embeds = chosen.get("inputs_embeds") if input_ids is None else None  # which then come alone
    ids = None if embeds is not None else jnp.asarray(started(config, input_ids, chosen))
    of_ids, of_embeds, of_mask = (None if x is None else jnp.shape(x) for x in (ids, embeds, attention_mask))
    held = 0 if of_ids is None else held_alone(of_ids, of_mask, chosen)
    B, T = check_call(config, of_ids, of_embeds, of_mask, past=held)
    if attention_mask is not None:
        mask = jnp.asarray(attention_mask) != 0
    elif ids is None or (pad := padding(config, chosen)) is None:
        mask = np.ones((B, T), bool)
    else:
        mask = ids != pad
    settings = check_generate(config, B, T, T, 1, chosen)
    return Prompt(np.zeros((B, 0), np.int32) if ids is None else ids, mask, settings, chosen, held)  # pyright: ignore[reportArgumentType]


def given(model: Any, prompt: Prompt, room: int, exact: bool) -> Given:
    """The prompt as the loop takes it, and its cache, with room for so many new tokens. exact: not a column wider."""
    ids, mask, options = prompt.ids, prompt.mask, prompt.options
    xp: Any = jnp if any(isinstance(x, Tracer) for x in (ids, mask)) else np
    real = mask[:, prompt.held :]
    T = real.shape[1]
    real_last = (real * T + np.arange(T)).argsort(axis=1)
    moved = xp.take_along_axis(ids, real_last, axis=1) if ids.shape[1] else ids
    padding = mask.shape[1] - mask.sum(axis=1)
    feed = options.get("inputs_embeds")
    if feed is not None and ids.shape[1] and feed.shape[:2] != ids.shape:
        raise ValueError(f"inputs_embeds: found shape {list(feed.shape)}, wanted {list(ids.shape)} of input_ids first")
    feed = ids if feed is None else feed
    other = _other(model, prompt, moved)
    cache: Any = options.get("past_key_values") if prompt.settings.use_cache else None
    if cache is not None:
        if isinstance(cache.length, Tracer):
            raise ValueError("past_key_values: found one that is traced, wanted one whose length is known")
        feed = feed[:, prompt.unread(int(cache.length)) :]
        cache = cache.between(0, max(cache.slots, mask.shape[1] + room))
    front = 0 if exact else columns(T) - T
    if front:
        sides = ((0, 0), (front, 0))
        feed = jnp.pad(feed, (*sides, (0, 0))) if feed.ndim == 3 else np.pad(feed, sides, constant_values=1)
        moved = np.pad(moved, sides) if moved.shape[1] else moved
        mask = np.pad(mask, sides)
    feed = feed if feed.ndim == 3 else feed.astype(np.int32)
    start = front if moved.shape[1] else 0
    return Given(moved.astype(np.int32), start, padding, feed, front, mask, cache, other)


def _other(model: Any, prompt: Prompt, moved: Any) -> tuple[Any, Any] | None:
    """What guidance moves away from: ids [B, N] and their mask."""
    if "guidance_scale" not in prompt.settings.processors:
        return None
    ids, mask = (prompt.options.get(f"negative_prompt_{name}") for name in ("ids", "attention_mask"))
    if ids is None:
        if not moved.shape[1]:
            raise ValueError("negative_prompt_ids: found None with inputs_embeds alone, wanted those of guidance")
        ids = moved[:, -1:]
    elif not isinstance(ids, Tracer):
        ids = np.asarray(ids)
        check_tokens(model.config, int(ids.min()), int(ids.max()))
    if ids.ndim != 2 or len(ids) != len(moved):
        raise ValueError(f"negative_prompt_ids: found shape {list(ids.shape)}, wanted [{len(moved)}, tokens]")
    mask = np.ones(ids.shape, bool) if mask is None else jnp.asarray(mask) != 0
    if mask.shape != ids.shape:
        raise ValueError(f"negative_prompt_attention_mask: found shape {list(mask.shape)}, wanted {list(ids.shape)}")
    return ids.astype(np.int32), mask


def key(settings: Settings, prng_key: Any, traced: bool, spread: bool) -> Array | None:
    """What is drawn with: `prng_key`, or one of `seed`, or else of the system's random numbers.
    spread: whether the model lies on the devices of several processes."""
    if not settings.do_sample or prng_key is not None:
        return prng_key if settings.do_sample else None
    if settings.seed is None and traced:
        raise ValueError("prng_key: found None under jit, which would draw the same text at each call; wanted a key")
    if settings.seed is None and spread:
        found = "found None with a model over several processes"
        raise ValueError(f"seed: {found}, each of which would draw another text; wanted a number")
    seed, *parts = (settings.seed,) if isinstance(settings.seed, int) else settings.seed or (secrets.randbits(31),)
    found = jax.random.key(seed)
    for part in parts:
        found = jax.random.fold_in(found, part)
    return found
