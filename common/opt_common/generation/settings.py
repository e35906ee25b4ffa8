"""The checked settings of one `generate`, the same for all frameworks: they see only shapes and numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import OPTConfig
from .config import GenerationConfig
from .options import NEUTRAL, SAID, Options


class Sequences(NamedTuple):
    """Sequences of tokens, and what completing each adds to a logit.

    before: [S, longest - 1] int32, all tokens but the last, right-aligned; -1 in front of shorter ones.
    last: [S] int32; bias: [S] float32; length: [S] int32, a sequence's number of tokens.
    """

    before: np.ndarray
    last: np.ndarray
    bias: np.ndarray
    length: np.ndarray

    @classmethod
    def of(cls, biases: Mapping[tuple[int, ...], float]) -> Sequences:
        longest = max(map(len, biases))
        before = np.full((len(biases), longest - 1), -1, np.int32)
        for row, ids in zip(before, biases, strict=True):
            row[longest - len(ids) :] = ids[:-1]
        last, length = [ids[-1] for ids in biases], [len(ids) for ids in biases]
        bias = np.array(list(biases.values()), np.float32)
        return cls(before, np.array(last, np.int32), bias, np.array(length, np.int32))


@dataclass(frozen=True)
class Settings:
    """The checked settings of one `generate`.

    processors: what happens to the logits [B, V] before a token is chosen: names of options with their values, in
    transformers' order, and only those that change something. Those of sampling are there only with `do_sample`.
    least: how many tokens the filters of sampling keep at least; beam sampling draws more than one.
    draft: how many tokens are drafted at most, 0 for none; assisted: by `assistant_model`, else from the text itself.
    output_*: only with `return_dict_in_generate`, as in transformers.
    """

    max_new_tokens: int
    do_sample: bool
    seed: int | tuple[int, ...] | None
    num_beams: int
    num_return_sequences: int
    length_penalty: float
    early_stopping: bool | str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    processors: dict[str, Any]
    stop_strings: tuple[str, ...]
    max_time: float | None
    use_cache: bool
    draft: int
    assisted: bool
    max_matching_ngram_size: int
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    output_attentions: bool
    output_hidden_states: bool

    @property
    def least(self) -> int:
        if self.num_beams == 1:
            return 1
        return len(self.eos_token_ids) + 1 if self.eos_token_ids else 2


def merged(held: GenerationConfig | None, options: Mapping[str, Any]) -> Options:
    """A call's options over those that its `generation_config` and then the model's set, as in transformers: None in a
    config sets nothing, None in a call turns an option off. Options that are not offered are dropped where they ask for
    nothing; ValueError names the others, and those that do not exist."""
    given = dict(options)
    kept: dict[str, Any] = {"top_k": 50, "use_cache": True}
    off = {"top_k": 0, "eos_token_id": [], "pad_token_id": None}
    if held is not None:  # a token id that it lacks is lacking: the model's config is not asked, as in transformers
        kept |= {name: off[name] for name in ("eos_token_id", "pad_token_id")}
    for config in (held, given.pop("generation_config", None)):
        found = {} if config is None else {k: v for k, v in config.to_diff_dict().items() if v is not None}
        kept |= found
    result = {k: v for k, v in (kept | given).items() if k not in SAID}
    for name in result.keys() & NEUTRAL.keys():
        value = result.pop(name)
        if value is not None and value not in NEUTRAL[name]:
            wanted = " or ".join(map(repr, NEUTRAL[name])) or "None"
            raise ValueError(f"generate: found {name}={value!r}, which is not offered; wanted {wanted}")
    if unknown := result.keys() - Options.__annotations__.keys():
        names = ", ".join(sorted(unknown))
        raise ValueError(f"generate: found unknown options {names}; wanted those of opt_common.generation.Options")
    return {k: off.get(k) if v is None else v for k, v in result.items() if v is not None or k in off}  # type: ignore[return-value]


def check_generate(
    config: OPTConfig, rows: int | None, width: int, longest: int, shortest: int, options: Options
) -> Settings:
    """The checked settings of a `generate` over prompts [rows, width], whose longest row has `longest` tokens and whose
    shortest has `shortest`. rows: None if it is not known. `options` are `merged`. Raises ValueError that names the
    argument."""
    get: Callable[..., Any] = options.get
    new, length = get("max_new_tokens"), get("max_length")
    if new is not None and length is not None:
        warnings.warn(f"generate: found max_length={length} and max_new_tokens={new}; the latter applies", stacklevel=3)
    elif length is not None:
        _check(length > width, "max_length", length, f"more than the prompt's {width}, or max_new_tokens")
        new = length - width
    elif new is None:
        new = min(20, max(1, config.max_position_embeddings - longest))
    _check(shortest > 0, "attention_mask", "a row without tokens", "at least one token in every row")
    _check(new > 0, "max_new_tokens", new, "a number > 0")
    limit, total = config.max_position_embeddings, longest + new
    if total > limit:
        raise ValueError(
            f"max_new_tokens: a prompt of {longest} tokens and {new} new ones make {total}, "
            f"wanted at most {limit} (max_position_embeddings)"
        )
    eos = config.eos_token_ids if get("eos_token_id") is None else _ids("eos_token_id", get("eos_token_id"), config)
    pad = get("pad_token_id", config.pad_token_id)
    pad = pad if pad not in (None, -1) else eos[0] if eos else 0  # -1: a config's for none
    _check(0 <= pad < config.vocab_size, "pad_token_id", pad, f"an id below {config.vocab_size}")

    do_sample = bool(get("do_sample", False)) and get("temperature", 1.0) != 0
    beams, returned = get("num_beams", 1), get("num_return_sequences", 1)
    _check(0 < beams < 2**31, "num_beams", beams, "a number > 0, of 31 bits")
    wanted = f"at most num_beams={beams}" + (", or do_sample=True" if beams == 1 else "")
    enough = returned <= beams or (beams == 1 and do_sample)
    _check(returned > 0 and enough, "num_return_sequences", returned, wanted)
    early = get("early_stopping", False)
    _check(early in (True, False, "never"), "early_stopping", early, 'True, False or "never"')
    seconds = get("max_time")
    _check(seconds is None or isinstance(seconds, (int, float)), "max_time", seconds, "seconds")
    seed = get("seed")
    if isinstance(seed, int):
        _check(-(2**63) <= seed < 2**63, "seed", seed, "a number of 64 bits")
    stops = get("stop_strings", ())
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    _check(not stops or get("tokenizer") is not None, "tokenizer", None, "the tokenizer that reads stop_strings")
    output = bool(get("return_dict_in_generate", False))
    layers = {name: output and bool(get(name, False)) for name in ("output_attentions", "output_hidden_states")}
    draft, assisted = _draft(config, options, None if rows is None else rows * returned)
    if any(layers.values()):
        draft = 0  # of each token those of its own pass
    if get("streamer") is not None:
        _check(beams == 1, "num_beams", beams, "1 with streamer")
    return Settings(
        max_new_tokens=new,
        do_sample=do_sample,
        seed=seed if seed is None or isinstance(seed, int) else tuple(int(part) for part in seed),
        num_beams=beams,
        num_return_sequences=returned,
        length_penalty=float(get("length_penalty", 1.0)),
        early_stopping=early,
        eos_token_ids=eos,
        pad_token_id=pad,
        processors=_processors(config, options, width, new, eos, do_sample),
        stop_strings=stops,
        max_time=seconds,
        use_cache=get("use_cache", True),
        draft=draft,
        assisted=assisted and draft > 0,
        max_matching_ngram_size=get("max_matching_ngram_size", 2),
        return_dict_in_generate=output,
        output_scores=output and bool(get("output_scores", False)),
        output_logits=output and bool(get("output_logits", False)),
        **layers,
    )


def _draft(config: OPTConfig, options: Options, texts: int | None) -> tuple[int, bool]:
    """`Settings.draft` and `Settings.assisted`, of so many texts. What transformers refuses is refused; beams go on
    without, as there."""
    get: Callable[..., Any] = options.get
    lookup, assistant = get("prompt_lookup_num_tokens", 0), get("assistant_model")
    most = get("num_assistant_tokens", 20)
    _check(lookup >= 0, "prompt_lookup_num_tokens", lookup, "a number ≥ 0")
    _check(most > 0, "num_assistant_tokens", most, "a number > 0")
    if not lookup and assistant is None:
        return 0, False
    name = "prompt_lookup_num_tokens" if lookup else "assistant_model"
    if (beams := get("num_beams", 1)) > 1:
        warnings.warn(f"{name}: found with num_beams={beams}, which ignores it", stacklevel=3)
        return 0, False
    if texts not in (None, 1):
        raise ValueError(f"{name}: found {texts} texts, wanted one")
    if not get("use_cache", True):
        raise ValueError(f"use_cache: found False, wanted True with {name}")
    if lookup:
        return lookup, False
    if get("inputs_embeds") is not None:
        raise ValueError("assistant_model: found with inputs_embeds, wanted input_ids, which both models can read")
    if (found := assistant.config.vocab_size) != config.vocab_size:
        raise ValueError(f"assistant_model: found vocab_size {found}, wanted {config.vocab_size}, as the model has")
    return most, True


def _processors(
    config: OPTConfig, options: Options, width: int, new: int, eos: tuple[int, ...], do_sample: bool
) -> dict[str, Any]:
    """`Settings.processors`: what the options ask to do to the logits."""
    get: Callable[..., Any] = options.get
    found: dict[str, Any] = {}

    def number(name: str, off: float, ok: Callable[[Any], bool], wanted: str, used: bool = True) -> None:
        value = get(name, off)
        _check(isinstance(value, (int, float, np.number)) and ok(value), name, value, wanted)
        _check(bool(abs(value) < np.inf), name, value, "a finite number")
        if used and value != off:
            found[name] = type(off)(value)

    def ids(name: str) -> None:
        if get(name) is not None:
            found[name] = _ids(name, options[name], config)

    number("guidance_scale", 1.0, lambda x: True, "a number")
    if (biases := get("sequence_bias")) is not None:
        pairs = biases.items() if isinstance(biases, Mapping) else biases
        found["sequence_bias"] = _sequences("sequence_bias", pairs, config)
    read = get("inputs_embeds") is None  # of a prompt of embeddings, transformers knows no tokens
    number("encoder_repetition_penalty", 1.0, lambda x: x > 0, "a number > 0", read)
    number("repetition_penalty", 1.0, lambda x: x > 0, "a number > 0")
    number("no_repeat_ngram_size", 0, lambda x: x >= 0, "a number ≥ 0")
    number("encoder_no_repeat_ngram_size", 0, lambda x: x >= 0, "a number ≥ 0", read)
    if (words := get("bad_words_ids")) is not None:
        words = [word for word in words if list(word) not in [[i] for i in eos]]  # eos stays, as in transformers
        if words:
            found["bad_words_ids"] = _sequences("bad_words_ids", ((word, -np.inf) for word in words), config)
    if (least := get("min_new_tokens")) is None:
        least = max(0, get("min_length", 0) - width)
    else:
        _check(least >= 0, "min_new_tokens", least, "a number ≥ 0")
        if least > new:
            warnings.warn(f"generate: found min_new_tokens={least} and {new} new tokens at most", stacklevel=4)
    if least and eos:
        found["min_new_tokens"] = least
    if get("prefix_allowed_tokens_fn") is not None:
        found["prefix_allowed_tokens_fn"] = get("prefix_allowed_tokens_fn")
    ids("forced_bos_token_id")
    ids("forced_eos_token_id")
    if get("remove_invalid_values"):
        found["remove_invalid_values"] = True
    if (decay := get("exponential_decay_length_penalty")) is not None and eos:
        start, factor = decay
        found["exponential_decay_length_penalty"] = (int(start), float(factor))
    ids("suppress_tokens")
    ids("begin_suppress_tokens")
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = {*found.get(name, ())}
        if forced and forced <= {*found.get("suppress_tokens", ())}:
            raise ValueError(f"suppress_tokens: found all of {name}={sorted(forced)}, wanted one that may be written")
    functions = get("logits_processor", ())
    functions = tuple(functions) if isinstance(functions, (list, tuple)) else (functions,)
    if functions:
        found["logits_processor"] = functions
    number("temperature", 1.0, lambda x: x >= 0, "a number ≥ 0", do_sample)
    number("top_k", 0, lambda x: x >= 0, "a number ≥ 0; 0 for all tokens", do_sample)
    number("top_p", 1.0, lambda x: 0 < x <= 1, "0 < top_p ≤ 1", do_sample)
    number("min_p", 0.0, lambda x: 0 <= x <= 1, "0 ≤ min_p ≤ 1", do_sample)
    number("typical_p", 1.0, lambda x: 0 < x <= 1, "0 < typical_p ≤ 1", do_sample)
    number("epsilon_cutoff", 0.0, lambda x: 0 <= x < 1, "0 ≤ epsilon_cutoff < 1", do_sample)
    number("eta_cutoff", 0.0, lambda x: 0 <= x < 1, "0 ≤ eta_cutoff < 1", do_sample)
    if "top_k" in found:
        found["top_k"] = min(found["top_k"], config.vocab_size)
    if get("renormalize_logits"):
        found["renormalize_logits"] = True
    return found


def _check(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: found {value!r}, wanted {wanted}")


def _ids(name: str, value: Any, config: OPTConfig) -> tuple[int, ...]:
    """The token ids of an option: one, or several."""
    ids = tuple(int(i) for i in np.atleast_1d(np.asarray(value, np.int64)))
    _check(all(0 <= i < config.vocab_size for i in ids), name, value, f"ids below {config.vocab_size}")
    return ids


def _sequences(name: str, pairs: Iterable[tuple[Any, float]], config: OPTConfig) -> Sequences:
    """Token sequences with their biases."""
    biases = {tuple(int(i) for i in ids): float(bias) for ids, bias in pairs}
    for ids in biases or {(): 0}:
        ok = len(ids) > 0 and all(0 <= i < config.vocab_size for i in ids)
        _check(ok, name, list(ids), f"sequences of ids below {config.vocab_size}")
    return Sequences.of(biases)
