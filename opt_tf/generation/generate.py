"""Text from a model: the prompts, the way that the settings ask for, and the result. All of it is one compiled program,
but for what only the host can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Unpack

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_common.generation import Options, Settings, StopStrings, check_generate, merged, pieces, prompt
from opt_common.generation.prompts import started
from opt_common.outputs import GenerateOutput

from ..cache import KVCache
from .beams import Beams
from .choosing import Numbers, Plan
from .loop import Pass, Result, Rows, Start, Stops, first, further

# Prompts and new tokens are padded to a multiple of so many columns, or half of it: one program serves the lengths
# between.
STEP = 64

# What the host does after each step
HOST = ("prefix_allowed_tokens_fn", "stop_strings", "stopping_criteria", "streamer", "max_time")


@tf.autograph.experimental.do_not_convert
def generate(
    self: Any,
    input_ids: Tensor | np.ndarray | Mapping[str, Any] | None = None,
    attention_mask: Tensor | np.ndarray | None = None,
    **options: Unpack[Options],
) -> Tensor | GenerateOutput:
    """Continue each row of `input_ids` [B, T]; returns [B, T + new], the prompts included, or a GenerateOutput.

    input_ids: the prompts, or a dictionary of the arguments. Default: one that is `bos_token_id`.
    attention_mask: [B, T], 0 for padding on either side. Default: everything that is not `pad_token_id`.
    options: see `opt_common.generation.Options`.
    In a tf.function the result is always max_new_tokens wide, with padding behind the ends.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is off.
    """
    if not tf.executing_eagerly():
        call = _traced(self, input_ids, attention_mask, options)
        return _output(call, _run(self, call.start, call.numbers, call.plan))
    call = _prepared(self, input_ids, attention_mask, options)
    streamer = call.options.get("streamer")
    if not call.hosted:
        return _output(call, _generate(self, _weights(self), call.start, call.numbers, plan=call.plan))
    if streamer is not None:
        streamer.put(np.asarray(call.prompts))
    passes, state = [], None
    for out, state in _steps(call):
        passes.append((out.attentions, out.hidden_states))
        if streamer is not None:
            streamer.put(_last(call, state))
    if streamer is not None:
        streamer.end()
    attentions, hidden_states = zip(*passes, strict=True)
    return _output(call, call.way().result(state), attentions, hidden_states)


def stream(
    self: Any,
    input_ids: Tensor | np.ndarray | Mapping[str, Any] | None = None,
    attention_mask: Tensor | np.ndarray | None = None,
    *,
    tokenizer: Any,
    **options: Unpack[Options],
) -> Iterator[str]:
    """Continue the one row of `input_ids` [1, T]; an iterator of pieces of the new text, each as soon as it is known.
    Arguments and errors as in `generate`."""
    call = _prepared(self, input_ids, attention_mask, options | {"tokenizer": tokenizer})
    rows = call.plan.copies * call.start.text.shape[0]
    if rows != 1 or call.plan.num_beams > 1:
        raise ValueError(f"stream: found {rows} texts, wanted one")
    return pieces(_tokens(call), tokenizer)


def compute_transition_scores(
    self: Any,
    sequences: Tensor,
    scores: tuple[Tensor, ...],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """The score of each new token of `sequences` [R, T + new], [R, new], from the fields of a GenerateOutput: its entry
    in `scores`, or with normalize_logits its log probability. 0 behind the end of a beam search's text."""
    kept = tf.stack(scores, axis=1)  # [rows, new, V]
    if normalize_logits:
        kept = tf.nn.log_softmax(kept)
    if beam_indices is None:
        beam_indices = tf.broadcast_to(tf.range(kept.shape[0])[:, None], kept.shape[:2])
    there = beam_indices >= 0
    new = int(tf.reduce_max(tf.reduce_sum(tf.cast(there, tf.int32), axis=1)))
    there, rows = there[:, :new], tf.maximum(tf.cast(beam_indices[:, :new], tf.int32), 0)
    tokens = tf.cast(sequences[:, sequences.shape[1] - new :], tf.int32)
    steps = tf.broadcast_to(tf.range(new), rows.shape)
    return tf.where(there, tf.gather_nd(kept, tf.stack([rows, steps, tokens], axis=-1)), 0)


class Call(NamedTuple):
    """One `generate`: the model, the prompts as they were given, the settings, and what its program takes."""

    model: Any
    prompts: Tensor
    settings: Settings
    options: Options
    start: Start
    numbers: Numbers
    plan: Plan

    def way(self, stops: Stops | None = None) -> Rows | Beams:
        return _way(self.start, self.numbers, self.plan, stops)

    @property
    def hosted(self) -> bool:
        """Whether the host has something to do at each step."""
        settings = self.settings
        layers = settings.output_attentions or settings.output_hidden_states
        return any(self.options.get(name) is not None for name in HOST) or (settings.return_dict_in_generate and layers)


def _way(start: Start, numbers: Numbers, plan: Plan, stops: Stops | None = None) -> Rows | Beams:
    return (Beams if plan.num_beams > 1 else Rows)(start, numbers, plan, stops)


def _prepared(model: Any, input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> Call:
    input_ids, attention_mask, options = _arguments(input_ids, attention_mask, options)
    given = prompt(model.config, input_ids, attention_mask, options, model.generation_config)
    ids = given.options.get("inputs") if input_ids is None else input_ids
    prompts = tf.constant(given.ids, tf.int32) if ids is None else tf.convert_to_tensor(ids)
    room = _columns(given.settings.max_new_tokens)
    return _call(model, prompts, tf.constant(given.mask), given.settings, given.options, room)


def _traced(model: Any, input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> Call:
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
    settings = check_generate(config, T or 1, T or 1, 1, chosen)
    if ids is None:
        ids, mask = tf.zeros((tf.shape(embeds)[0], 0), tf.int32), tf.ones(tf.shape(embeds)[:2], tf.bool)
    else:
        mask = tf.ones_like(ids, tf.bool) if config.pad_token_id is None else ids != config.pad_token_id
    if attention_mask is not None:
        mask = tf.convert_to_tensor(attention_mask) != 0
    return _call(model, ids, mask, settings, chosen, settings.max_new_tokens)


def _arguments(input_ids: Any, attention_mask: Any, options: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The arguments, from a dictionary if they come in one."""
    if not isinstance(input_ids, Mapping):
        return input_ids, attention_mask, dict(options)
    given = {"attention_mask": attention_mask} | dict(input_ids) | options
    return given.pop("input_ids", None), given.pop("attention_mask"), given


def _call(model: Any, prompts: Tensor, mask: Tensor, settings: Settings, options: Options, room: int) -> Call:
    plan = Plan.of(settings, room, model.config.vocab_size)
    numbers = Numbers.of(settings, _seed(settings))
    return Call(model, prompts, settings, options, _start(prompts, mask, numbers, options, plan), numbers, plan)


def _start(prompts: Tensor, mask: Tensor, numbers: Numbers, options: Options, plan: Plan) -> Start:
    """All padding goes to the left: every row then ends in its last token, and more padding changes nothing."""
    ids, real = tf.cast(prompts, tf.int32), tf.cast(mask, tf.int32)
    embeds, past = options.get("inputs_embeds"), options.get("past_key_values")
    eager, W = tf.executing_eagerly(), tf.shape(ids)[1]
    order = tf.argsort(real, axis=1, stable=True)
    text = tf.gather(ids, order, batch_dims=1) if ids.shape[1] != 0 else ids
    padding = (W - tf.reduce_sum(real, axis=1)) if ids.shape[1] != 0 else tf.zeros_like(real[:, 0])
    away, away_mask = _away(text, options) if "guidance_scale" in plan.names else (None, None)
    if embeds is not None:
        inputs = tf.gather(tf.convert_to_tensor(embeds), order, batch_dims=1)
    else:
        inputs = text
    seen = tf.gather(real, order, batch_dims=1)
    if past is not None:
        inputs, seen, past = _rest(ids, real, past, plan.room)
    elif eager and not plan.keep_cache:
        longest = int(tf.reduce_max(tf.reduce_sum(real, axis=1)))
        extra = _columns(longest) - longest
        inputs, seen = (_left(x[:, x.shape[1] - longest :], extra) for x in (inputs, seen))
    behind = plan.room + (_columns(int(W)) - int(W) if eager else 0)
    text = tf.pad(text, ((0, 0), (0, behind)), constant_values=numbers.pad_token_id)
    ids, embeds = (inputs, None) if embeds is None else (None, inputs)
    return Start(text, padding, W, ids, embeds, seen, past, away, away_mask)


def _away(text: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """What guidance moves away from: `negative_prompt_ids`, or the last token of each prompt."""
    ids, mask = options.get("negative_prompt_ids"), options.get("negative_prompt_attention_mask")
    ids = text[:, -1:] if ids is None else tf.cast(tf.convert_to_tensor(ids), tf.int32)
    if len(ids.shape) != 2 or ids.shape[0] != text.shape[0] or ids.shape[1] == 0:
        raise ValueError(f"negative_prompt_ids: found shape {list(ids.shape)}, wanted [{text.shape[0]}, tokens]")
    return ids, tf.ones_like(ids) if mask is None else tf.cast(tf.convert_to_tensor(mask) != 0, tf.int32)


def _rest(ids: Tensor, real: Tensor, past: KVCache, room: int) -> tuple[Tensor, Tensor, KVCache]:
    """The columns behind those in a cache, the mask of both, and the cache with room for the new tokens."""
    L, T = int(past.length), ids.shape[1]
    if not L < T:
        raise ValueError(f"past_key_values: found {L} tokens, wanted fewer than the {T} columns of input_ids")
    order = tf.argsort(real[:, L:], axis=1, stable=True)
    rest, seen = (tf.gather(x[:, L:], order, batch_dims=1) for x in (ids, real))
    k, v = ([tf.pad(x[:, :L], ((0, 0), (0, T - L + room), (0, 0))) for x in part] for part in (past.k, past.v))
    segments = tf.pad(past.segments[:, :L], ((0, 0), (0, T - L + room)))
    return rest, tf.concat([real[:, :L], seen], axis=1), KVCache(tuple(k), tuple(v), past.length, segments)


def _left(x: Tensor, n: int) -> Tensor:
    return tf.pad(x, ((0, 0), (n, 0)) + ((0, 0),) * (len(x.shape) - 2))


def _columns(n: int) -> int:
    return STEP // 2 if n <= STEP // 2 else n + -n % STEP


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


def _weights(model: Any) -> list[Tensor]:
    return [tf.convert_to_tensor(weight.value) for weight in model.weights]


def _run(model: Any, start: Start, numbers: Numbers, plan: Plan) -> Result:
    way: Any = _way(start, numbers, plan)

    def advance(state: Any) -> tuple[Any]:
        end = start.width + state.step
        return (way.write(further(model, state.text, way.padding, end, state.cache, state.guide_cache), state),)

    state = way.begin(first(model, start, plan.room, plan.copies, plan.use_cache))
    (state,) = tf.while_loop(way.unfinished, advance, (state,))
    return way.result(state)


# TensorFlow keeps every program for good, and one that took the weights from the model would keep them as well, long
# after the model is gone: they are arguments.
def _with_weights(function: Callable[..., Any]) -> Any:
    def run(model: Any, weights: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        with keras.StatelessScope(state_mapping=zip(model.weights, weights, strict=True)):
            return function(model, *args, **kwargs)

    return tf.function(run, jit_compile=True, autograph=False)


_generate, _first, _further = map(_with_weights, (_run, first, further))


def _steps(call: Call) -> Iterator[tuple[Pass, Any]]:
    """Each pass with the state after it: the passes are compiled, what is chosen from them is the host's."""
    settings, plan, start = call.settings, call.plan, call.start
    on = settings.return_dict_in_generate
    wanted = {
        "output_attentions": on and settings.output_attentions,
        "output_hidden_states": on and settings.output_hidden_states,
    }
    weights, way = _weights(call.model), call.way(_stops(call))
    out = _first(call.model, weights, start, plan.room, plan.copies, plan.use_cache, **wanted)
    state: Any = way.begin(out)
    end = int(start.width)
    while True:
        yield _cut(out, end, plan.use_cache), state
        if not way.unfinished(state):
            return
        end += 1
        caches = state.cache, state.guide_cache
        out = _further(call.model, weights, state.text, way.padding, tf.constant(end), *caches, **wanted)
        state = way.write(out, state)


def _cut(out: Pass, end: int, use_cache: bool) -> Pass:
    """Without the slots and columns that are not taken yet."""
    attentions = tuple(x[..., :end] if use_cache else x[:, :, :end, :end] for x in out.attentions)
    hidden_states = out.hidden_states if use_cache else tuple(x[:, :end] for x in out.hidden_states)
    return out._replace(attentions=attentions, hidden_states=hidden_states)


def _last(call: Call, state: Any) -> np.ndarray:
    """The tokens of the last step, [R]."""
    return state.text[:, int(call.start.width + state.step) - 1].numpy()


def _tokens(call: Call) -> Iterator[np.ndarray]:
    return (_last(call, state) for _, state in _steps(call))


def _stops(call: Call) -> Stops | None:
    """What the host says about ends."""
    settings, options = call.settings, call.options
    criteria = options.get("stopping_criteria") or ()
    criteria = tuple(criteria) if isinstance(criteria, (list, tuple)) else (criteria,)
    strings = StopStrings(options.get("tokenizer"), settings.stop_strings) if settings.stop_strings else None
    if not criteria and strings is None and settings.max_time is None:
        return None
    began, padding = time.monotonic(), call.start.padding.numpy()

    def stops(text: Tensor, scores: tuple[Tensor, ...] | None) -> Tensor:
        rows = text.shape[0]
        ended = np.zeros(rows, bool)
        for criterion in criteria:
            ended |= np.asarray(criterion(text, scores), bool)
        if strings is not None:
            for row, ids in enumerate(text.numpy()):
                ended[row] |= strings(ids[padding[row * len(padding) // rows] :])
        if settings.max_time is not None:
            ended |= time.monotonic() - began > settings.max_time
        return tf.constant(ended)

    return stops


def _output(call: Call, found: Result, attentions: Any = (), hidden_states: Any = ()) -> Tensor | GenerateOutput:
    settings, n = call.settings, call.settings.num_return_sequences
    eager = tf.executing_eagerly()
    length, steps = (int(found.length), int(found.steps)) if eager else (call.plan.room, call.plan.room)
    W = int(call.start.width) if eager else call.start.width
    tokens = tf.cast(found.text[:, W : W + length], call.prompts.dtype)
    sequences = tf.concat([tf.repeat(call.prompts, n, axis=0), tokens], axis=1)
    if not settings.return_dict_in_generate:
        return sequences
    beams = settings.num_beams > 1
    return GenerateOutput(
        sequences=sequences,
        sequences_scores=found.sequences_scores if beams and settings.output_scores else None,
        scores=tuple(tf.unstack(found.scores[:steps])) if settings.output_scores else None,
        logits=tuple(tf.unstack(found.logits[:steps])) if settings.output_logits else None,
        beam_indices=found.beam_indices[:, :length] if beams else None,
        attentions=attentions if settings.output_attentions else None,
        hidden_states=hidden_states if settings.output_hidden_states else None,
        past_key_values=found.cache or None,
    )
