"""What `generate` continues, as its programs take it.

B prompts   T columns of the prompts
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow import Tensor

from opt_common.generation import Options, Settings, check_generate, columns, merged, prompt
from opt_common.generation.prompts import padding, started

from ..cache import KVCache
from .choosing import Numbers, Plan
from .loop import Start

# What the host does after each step
HOST = ("prefix_allowed_tokens_fn", "stop_strings", "stopping_criteria", "streamer", "max_time")


class Call(NamedTuple):
    """One `generate`: the prompts as they were given, the settings, and what its program takes: the model and the
    assistant, or None, what they begin with, and the settings again."""

    models: tuple[Any, Any]
    prompts: Tensor
    settings: Settings
    options: Options
    start: Start
    ahead: Start | None
    numbers: Numbers
    plan: Plan
    extra: int  # columns in front of the prompts, which only make programs fewer

    @property
    def hosted(self) -> bool:
        """Whether the host has something to do at each step."""
        return _hosted(self.settings, self.options)


def _hosted(settings: Settings, options: Options) -> bool:
    layers = settings.output_attentions or settings.output_hidden_states
    return layers or any(options.get(name) is not None for name in HOST)


def prepared(model: Any, input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> Call:
    input_ids, attention_mask, options = _arguments(input_ids, attention_mask, options)
    given = prompt(model.config, input_ids, attention_mask, options, model.generation_config)
    ids, past = given.options.get("inputs") if input_ids is None else input_ids, given.options.get("past_key_values")
    if past is not None:
        given.unread(int(past.length))
    prompts = tf.constant(given.ids, tf.int32) if ids is None else tf.convert_to_tensor(ids)
    return call(model, prompts, tf.constant(given.mask), given.settings, given.options)


def traced(model: Any, input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> Call:
    """The arguments in a tf.function, where only shapes are known, and perhaps not all of them."""
    config = model.config
    input_ids, attention_mask, options = _arguments(input_ids, attention_mask, options)
    chosen = merged(model.generation_config, options)
    for name in (*HOST, "past_key_values", "output_attentions", "output_hidden_states"):
        if chosen.get(name):
            raise ValueError(f"{name}: found in a tf.function, wanted a call outside of one")
    embeds, ids = chosen.get("inputs_embeds"), None
    if embeds is None or input_ids is not None:
        ids = tf.convert_to_tensor(started(config, input_ids, chosen))
    T = (embeds if ids is None else ids).shape[1]
    for name, wanted in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if T is None and chosen.get(name) is not None:
            raise ValueError(f"{name}: found with prompts of unknown width, wanted {wanted}")
    rows = (embeds if ids is None else ids).shape[0]
    settings = check_generate(config, rows, T or 1, T or 1, 1, chosen)
    pad = padding(config, chosen)
    if attention_mask is not None:
        mask = tf.convert_to_tensor(attention_mask) != 0
    elif embeds is None and pad is not None:
        mask = ids != pad
    else:
        mask = tf.ones(tf.shape(ids if embeds is None else embeds)[:2], tf.bool)
    if ids is None:
        ids = tf.zeros((tf.shape(embeds)[0], 0), tf.int32)
    if T is None:
        longest = tf.reduce_max(tf.reduce_sum(tf.cast(mask, tf.int32), axis=1))
        message = "max_new_tokens: found more, with the prompts, than max_position_embeddings"
        limit = config.max_position_embeddings
        tf.debugging.assert_less_equal(longest + settings.max_new_tokens, limit, message=message)
    return call(model, ids, mask, settings, chosen)


def _arguments(input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The arguments, from a dictionary if they come in one."""
    if not isinstance(input_ids, Mapping):
        return input_ids, attention_mask, dict(options)
    given = {"attention_mask": attention_mask} | dict(input_ids) | options
    return given.pop("input_ids", None), given.pop("attention_mask"), given


def call(model: Any, prompts: Tensor, mask: Tensor, settings: Settings, options: Options) -> Call:
    """The call of checked arguments."""
    # nothing is drafted where the host chooses, or from embeddings; what is written does not hang on it
    length = 0 if _hosted(settings, options) or options.get("inputs_embeds") is not None else settings.draft
    assistant = options.get("assistant_model") if length and settings.assisted else None
    room = settings.max_new_tokens + (length + 1 if length else 0)  # the last draft may reach so far beyond the end
    room = columns(room) if tf.executing_eagerly() else room
    plan = Plan.of(settings, room, model.config.vocab_size, length)
    if options.get("inputs_embeds") is not None:
        plan = plan._replace(use_cache=True)  # they cannot be had again from the text
    numbers = Numbers.of(settings, _seed(settings))
    exact = settings.output_attentions or settings.output_hidden_states
    start, extra = _start(prompts, mask, numbers, options, plan, exact)
    ahead = None if assistant is None else _start(prompts, mask, numbers, {}, plan._replace(names=()))[0]
    return Call((model, assistant), prompts, settings, options, start, ahead, numbers, plan, extra)


def _start(
    prompts: Tensor, mask: Tensor, numbers: Numbers, options: Options, plan: Plan, exact: bool = False
) -> tuple[Start, int]:
    """All padding goes to the left: every row then ends in its last token, and more padding changes nothing, unless
    the columns are wanted `exact`. Also how many there are more than in the prompts."""
    ids, real = tf.cast(prompts, tf.int32), tf.cast(mask, tf.int32)
    embeds, past = options.get("inputs_embeds"), options.get("past_key_values")
    eager, W, extra = tf.executing_eagerly(), tf.shape(ids)[1], 0
    new = real if past is None or embeds is not None else real[:, real.shape[1] - ids.shape[1] :]  # of the ids
    order, padding = tf.argsort(new, axis=1, stable=True), tf.reduce_sum(1 - real, axis=1)
    text = tf.gather(ids, order, batch_dims=1) if ids.shape[1] == new.shape[1] else ids  # else of embeddings
    away, away_mask = _away(text, options) if "guidance_scale" in plan.names else (None, None)
    if embeds is not None:
        inputs = tf.gather(tf.convert_to_tensor(embeds), order, batch_dims=1)
    else:
        inputs = text
    seen = tf.gather(new, order, batch_dims=1)
    if past is not None:
        inputs, seen, past = _rest(ids, real, past, plan.room)
    elif eager and not exact:  # a cache that is returned has a slot for each column, padding or not
        longest = real.shape[1] if plan.keep_cache else int(tf.reduce_max(tf.reduce_sum(real, axis=1)))
        extra = columns(longest) - longest
        inputs, seen = (_left(x[:, x.shape[1] - longest :], extra) for x in (inputs, seen))
    behind = plan.room + (columns(int(W)) - int(W) if eager else 0)
    text = tf.pad(text, ((0, 0), (0, behind)), constant_values=numbers.pad_token_id)
    ids, embeds = (inputs, None) if embeds is None else (None, inputs)
    return Start(text, padding, W, ids, embeds, seen, past, away, away_mask), extra


def _away(text: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """What guidance moves away from: `negative_prompt_ids`, or the last token of each prompt."""
    ids, mask = options.get("negative_prompt_ids"), options.get("negative_prompt_attention_mask")
    ids = text[:, -1:] if ids is None else tf.cast(tf.convert_to_tensor(ids), tf.int32)
    if len(ids.shape) != 2 or ids.shape[0] != text.shape[0] or ids.shape[1] == 0:
        raise ValueError(f"negative_prompt_ids: found shape {list(ids.shape)}, wanted [{text.shape[0]}, tokens]")
    return ids, tf.ones_like(ids) if mask is None else tf.cast(tf.convert_to_tensor(mask) != 0, tf.int32)


def _rest(ids: Tensor, real: Tensor, past: KVCache, room: int) -> tuple[Tensor, Tensor, KVCache]:
    """The columns behind those in a cache, the mask of both, and the cache with room for the new tokens."""
    L, T = int(past.length), real.shape[1]
    order = tf.argsort(real[:, L:], axis=1, stable=True)
    rest, seen = (tf.gather(x[:, x.shape[1] - (T - L) :], order, batch_dims=1) for x in (ids, real))
    k, v = ([tf.pad(x[:, :L], ((0, 0), (0, T - L + room), (0, 0))) for x in part] for part in (past.k, past.v))
    segments = tf.pad(past.segments[:, :L], ((0, 0), (0, T - L + room)))
    return rest, tf.concat([real[:, :L], seen], axis=1), KVCache(tuple(k), tuple(v), past.length, segments)


def _left(x: Tensor, n: int) -> Tensor:
    return tf.pad(x, ((0, 0), (n, 0)) + ((0, 0),) * (len(x.shape) - 2))


def _seed(settings: Settings) -> Tensor:
    """Two numbers, as TensorFlow's stateless functions take them; without a seed, from the global state."""
    seed = settings.seed
    if not settings.do_sample:
        return tf.zeros(2, tf.int64)
    if seed is None:
        return tf.random.uniform((2,), 0, tf.int64.max, tf.int64)
    pair = (seed, 0) if isinstance(seed, int) else seed
    if len(pair) != 2:
        raise ValueError(f"seed: found {seed!r}, wanted a number or two")
    return tf.constant([part % 2**63 for part in pair], tf.int64)
