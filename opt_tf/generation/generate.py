"""Text from a model: the prompts, the way that the settings ask for, and the result. All of it is one compiled program,
but for what only the host can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import numpy as np
import tensorflow as tf
from tensorflow import Tensor

from opt_common.generation import Options, pieces
from opt_common.outputs import GenerateOutput

from .beams import Beams
from .callbacks import Stops, stops
from .choosing import Numbers, Plan
from .drafts import draft
from .loop import Pass, Result, Rows, Start, first, further
from .programs import Kind, called, compiled, weights
from .prompts import Call, prepared, traced
from .results import output


@tf.autograph.experimental.do_not_convert
def generate(
    self: Any,
    input_ids: Tensor | np.ndarray | Mapping[str, Any] | None = None,
    attention_mask: Tensor | np.ndarray | None = None,
    **options: Unpack[Options],
) -> Tensor | GenerateOutput:
    """Continue each row of `input_ids` [B, T]; returns [B, T + new], the prompts included, or a GenerateOutput.

    input_ids: the prompts, or a dictionary of the arguments. Default: one that is `bos_token_id`.
    attention_mask: [B, T], 0 for padding on either side. Default: everything but `pad_token_id`.
    options: see `opt_common.generation.Options`.
    In a tf.function the result is always max_new_tokens wide, with padding behind the ends.
    XLA compiles a program for each kind of model and settings, number of rows, width of the prompts and of the new
    tokens; widths are rounded up to 32, multiples of 64, and from 512 on four to each power of two. TensorFlow never
    drops one: once there are 256, or the process has no room for more, further ones run slower, without XLA.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is invalid.
    """
    if not tf.executing_eagerly():
        call = traced(self, input_ids, attention_mask, options)
        return output(call, _run(*call.models, call.start, call.ahead, call.numbers, call.plan))
    call = prepared(self, input_ids, attention_mask, options)
    streamer = call.options.get("streamer")
    if not call.hosted:
        models = call.models
        return output(
            call, called(_generate, Kind(models), weights(models), call.start, call.ahead, call.numbers, plan=call.plan)
        )
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
    return output(call, _way(call.start, call.numbers, call.plan).result(state), attentions, hidden_states)


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
    call = prepared(self, input_ids, attention_mask, options | {"tokenizer": tokenizer})
    rows = call.plan.copies * call.start.text.shape[0]
    if rows != 1 or call.plan.num_beams > 1:
        raise ValueError(f"stream: found {rows} texts, wanted one")
    return pieces(_tokens(call), tokenizer)


def _way(start: Start, numbers: Numbers, plan: Plan, ends: Stops | None = None) -> Rows | Beams:
    return (Beams if plan.num_beams > 1 else Rows)(start, numbers, plan, ends)


def _run(model: Any, assistant: Any, start: Start, ahead: Start | None, numbers: Numbers, plan: Plan) -> Result:
    """The whole of it, in a graph."""
    if plan.draft:
        return draft(model, assistant, start, ahead, numbers, plan)[0]
    way: Any = _way(start, numbers, plan)

    def advance(state: Any) -> tuple[Any]:
        end = start.width + state.step
        return (way.write(further(model, state.text, way.padding, end, state.cache, state.guide_cache), state),)

    state = way.begin(first(model, start, plan.room, plan.copies, plan.use_cache))
    (state,) = tf.while_loop(way.unfinished, advance, (state,))
    return way.result(state)


_generate, _first, _further = map(compiled, (_run, first, further))


def _steps(call: Call) -> Iterator[tuple[Pass, Any]]:
    """Each pass with the state after it: the passes are compiled, what is chosen from them is the host's."""
    settings, plan, start = call.settings, call.plan, call.start
    wanted = {name: getattr(settings, name) for name in ("output_attentions", "output_hidden_states")}
    ends = stops(settings, call.options)
    models, way = call.models[:1], _way(start, call.numbers, plan, ends)
    kind, tensors = Kind(models), weights(models)
    out = called(_first, kind, tensors, start, plan.room, plan.copies, plan.use_cache, **wanted)
    state: Any = way.begin(out)
    end = int(start.width)
    while True:
        yield _cut(out, end, plan.use_cache), state
        if not way.unfinished(state):
            return
        end += 1
        caches = state.cache, state.guide_cache
        out = called(_further, kind, tensors, state.text, way.padding, tf.constant(end), *caches, **wanted)
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
