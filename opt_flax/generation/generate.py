"""Text from a model: the arguments, the prompt, which way, the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from opt_common.generation import Options, Settings, columns, pieces
from opt_common.outputs import GenerateOutput

from . import drafts
from .callbacks import Callbacks, callbacks, traceable
from .choosing import Numbers, Plan, chosen, values
from .loop import PROGRAMS, Given, Reading, State, forget, from_slot, run, steps
from .prompts import asked, given, key
from .results import of_passes, texts


def generate(
    self: Any,
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    *,
    prng_key: Array | None = None,
    trace: bool = True,
    **options: Unpack[Options],
) -> Any:
    """Continue each row of `input_ids` [B, T]; returns [R, T + new] int32, the prompts included, where R is
    B · num_return_sequences; or a GenerateOutput, with `return_dict_in_generate`. The array has itself as its attribute
    `sequences`, for scripts that expect transformers' output.

    attention_mask: [B, T], 0 for padding on either side. Default: everything but the config's `pad_token_id`.
    prng_key: what sampling draws with, in place of `seed`.
    trace: has no effect, the loop is always one compiled program; transformers' Flax models take False for debugging.
    options: see `opt_common.generation.Options`. A `logits_processor` of (ids, scores, cur_len) is traced, with ids
        [R, T + max_new_tokens] of which `cur_len` columns are there; one of (ids, scores) is called at each step.
    Under jit and pmap ids and mask may be traced, and the result has all T + max_new_tokens columns.
    A program is compiled for each kind of settings, number of rows, width of the prompts and of the new tokens; widths
    are rounded up to 32, multiples of 64, and from 512 on four to each power of two. At 256 programs, or where the
    process has no room for more, all are forgotten; `jax.clear_caches` forgets them sooner.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is invalid.
    """
    call = Call.of(self, input_ids, attention_mask, prng_key, options)
    readings: list[Reading] = []
    scores: list[Array] = []
    if call.drafts:
        longest = call.settings.max_matching_ngram_size
        state = drafts.run(self, call.assistant, call.given, call.numbers, longest, plan=call.plan, k=call.drafts)
    elif not call.by_step:
        state = run(self, call.given, call.numbers, plan=call.plan)
    else:
        if call.streamer is not None:
            call.streamer.put(np.asarray(call.ids))
        for step, (reading, scored, state) in enumerate(call.steps()):
            if call.settings.return_dict_in_generate:
                readings.append(reading)
                scores.append(scored)
            if call.streamer is not None:
                call.streamer.put(call.token(state, step))
        if call.streamer is not None:
            call.streamer.end()
    return call.result(state, readings, scores)


def stream(
    self: Any,
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    *,
    tokenizer: Any,
    prng_key: Array | None = None,
    **options: Any,
) -> Iterator[str]:
    """Like `generate` for one row, but yields the new text in pieces, as it is written. Raises ValueError, before any
    work, for several rows or beams too."""
    call = Call.of(self, input_ids, attention_mask, prng_key, {**options, "tokenizer": tokenizer})
    call.check_one("stream")
    return pieces(call.tokens(), tokenizer)


@dataclass(frozen=True)
class Call:
    """A `generate` whose arguments are checked.

    ids: [B, T], the prompts as they were given. traced: whether any array is, so that no width can depend on tokens.
    """

    model: Any
    ids: Any
    settings: Settings
    streamer: Any
    assistant: Any
    given: Given
    numbers: Numbers
    plan: Plan
    callbacks: Callbacks
    traced: bool

    @classmethod
    def of(cls, model: Any, input_ids: Any, attention_mask: Any, prng_key: Any, options: Mapping[str, Any]) -> Call:
        forget((*PROGRAMS, drafts.run))
        prompt = asked(model, input_ids, attention_mask, options)
        settings, options = prompt.settings, prompt.options
        arrays = [options.get(name) for name in ("inputs_embeds", "past_key_values", "negative_prompt_ids")]
        leaves = jax.tree.leaves((model, prng_key, prompt.ids, prompt.mask, arrays))
        traced = any(isinstance(x, Tracer) for x in leaves)
        spread = not traced and any(isinstance(x, Array) and not x.is_fully_addressable for x in leaves)
        for name in ("prefix_allowed_tokens_fn", "stop_strings", "max_time", "streamer"):
            if traced and options.get(name) is not None:
                raise ValueError(f"{name}: found one under jit, where no token is known; wanted a call outside of it")
        functions = settings.processors.get("logits_processor", ())
        functions = functions if traceable(functions) else ()
        shown = settings.output_attentions or settings.output_hidden_states
        # what is traced is as wide as it has to be, and so is what the caller sees; a cache has the prompt's columns
        exact = traced or bool(functions) or shown or options.get("past_key_values") is not None
        room = settings.max_new_tokens if exact else columns(settings.max_new_tokens)
        found = given(model, prompt, room, exact)
        plan = Plan(
            names=tuple(settings.processors),
            functions=functions,
            beams=settings.num_beams > 1,
            each=max(settings.num_beams, settings.num_return_sequences),
            least=settings.least,
            early_stopping=settings.early_stopping,
            room=room,
            use_cache=settings.use_cache or found.feed.ndim == 3,  # embeddings are read once, as in transformers
            output_attentions=settings.output_attentions,
            output_hidden_states=settings.output_hidden_states,
        )
        vocabulary, pad, ends = model.config.vocab_size, settings.pad_token_id, settings.eos_token_ids
        numbers = Numbers(
            values(settings, vocabulary),
            chosen(ends, vocabulary),
            pad or ends[0] if plan.beams and ends else pad,  # as in transformers, no 0 behind a beam
            settings.max_new_tokens,
            settings.length_penalty,
            key(settings, prng_key, traced, spread),
        )
        functions = callbacks(settings, options)
        streamer, assistant = options.get("streamer"), options.get("assistant_model") if settings.assisted else None
        call = cls(model, prompt.ids, settings, streamer, assistant, found, numbers, plan, functions, traced)
        if call.streamer is not None:
            call.check_one("streamer")
        return call

    @property
    def drafts(self) -> int:
        """How many tokens are drafted: none unless the text is written from tokens alone, in one program. It does not
        depend on that."""
        settings, plan, given = self.settings, self.plan, self.given
        alone = given.cache is None and given.other is None and given.feed.ndim == 2
        return settings.draft if alone and not (self.by_step or plan.functions) else 0

    @property
    def by_step(self) -> bool:
        """Whether the caller's functions take part, or what each step computes is wanted."""
        settings = self.settings
        wanted = settings.output_scores or settings.output_logits
        wanted = wanted or settings.output_attentions or settings.output_hidden_states
        return bool(wanted or self.streamer is not None or any(self.callbacks))

    def check_one(self, name: str) -> None:
        """Raise ValueError unless one text is written."""
        if len(self.ids) > 1:
            raise ValueError(f"input_ids: found {len(self.ids)} rows, wanted one with {name}")
        if self.plan.each > 1:
            option = "num_beams" if self.plan.beams else "num_return_sequences"
            raise ValueError(f"{option}: found {self.plan.each}, wanted 1 with {name}")

    def steps(self) -> Iterator[tuple[Reading, Array, State]]:
        """What the model reads, the scores, and the state with the new token, of each step."""
        return steps(self.model, self.given, self.numbers, self.plan, self.callbacks, self.traced)

    def tokens(self) -> Iterator[np.ndarray]:
        """The new tokens [R], one a step."""
        for step, (_, _, state) in enumerate(self.steps()):
            yield self.token(state, step)

    def token(self, state: State, step: int) -> np.ndarray:
        """The new token [R] of a step, from 0."""
        return np.asarray(state.texts)[:, self.given.ids.shape[1] + step]

    def result(self, state: State, readings: list[Reading], scores: list[Array]) -> Any:
        """What `generate` returns, from the state at the end and what the steps had."""
        settings, plan, T = self.settings, self.plan, self.given.ids.shape[1]
        fields: dict[str, Any] = {}
        xp: Any = jnp if self.traced else np  # numpy and device_put: for jnp every length would be one more program
        ids, count = state.texts, state.step
        if plan.beams:
            n = settings.num_return_sequences
            best = (xp.asarray(x) for x in (state.best, state.best_sources))
            ids, sources = (x[:, :n].reshape(-1, x.shape[2]) for x in best)
            count = (sources >= 0).sum(axis=1).max()
            fields["beam_indices"] = jax.device_put(sources[:, : self._columns(count)])
            if settings.output_scores:
                fields["sequences_scores"] = jax.device_put(xp.asarray(state.best_scores)[:, :n].reshape(-1))
        prompts = xp.repeat(xp.asarray(self.ids, np.int32), settings.num_return_sequences, axis=0)
        sequences = xp.concatenate([prompts, xp.asarray(ids)[:, T : T + self._columns(count)]], axis=1)
        if not settings.return_dict_in_generate:
            return texts(sequences)
        if settings.output_scores:
            fields["scores"] = tuple(scores)
        if settings.output_logits:
            fields["logits"] = tuple(reading.logits for reading in readings)
        cache = state.cache
        if cache is not None and self.given.front:
            cache = from_slot(cache, self.given.front)
        fields |= of_passes(readings, self.given, plan)
        return GenerateOutput(sequences=jax.device_put(sequences), past_key_values=cache, **fields)

    def _columns(self, count: Array) -> int:
        """How many columns of new tokens are returned: all where the longest text is not known."""
        return self.settings.max_new_tokens if self.traced else int(count)
