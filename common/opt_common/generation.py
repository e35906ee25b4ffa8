"""The options of `generate`: declared, documented and checked once for all frameworks; and those kept with a model."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from .config import OPTConfig
from .files import read_json, write_atomically
from .inputs import check_call, check_tokens


class Options(TypedDict, total=False):
    """The keyword arguments of every `generate`. Defaults are transformers'."""

    max_new_tokens: int | None
    """How many tokens to add at most. Default: 20, if `max_length` is not given either."""

    max_length: int | None
    """The same limit, counting the prompt's columns too."""

    min_new_tokens: int
    """No row ends before it has this many new tokens. Default: 0."""

    do_sample: bool
    """Draw each token at random instead of taking the likeliest. Default: False."""

    temperature: float
    """Sampling: divide the logits by it. Default: 1.0."""

    top_k: int | None
    """Sampling: keep the k likeliest tokens, after temperature. 0 or None keeps all. Default: 50."""

    top_p: float
    """Sampling: keep the fewest tokens whose probabilities add up to p, after top_k. Default: 1.0, all."""

    seed: int | None
    """Sampling: makes the draw repeatable. Default: a random seed."""

    eos_token_id: int | Sequence[int] | None
    """The token or tokens that end a row. Default: the config's. An empty list: no token does."""

    generation_config: Any
    """A GenerationConfig, ours or transformers', in place of the model's."""

    pad_token_id: int | None
    """Fills a row after its end. Default: the config's, or else the first `eos_token_id`."""


# transformers' options that are not offered, each with the value that asks for nothing: given so, they are accepted.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "use_cache": True, "early_stopping": False,
    "min_length": 0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "diversity_penalty": 0.0, "renormalize_logits": False, "remove_invalid_values": False,
    "return_dict_in_generate": False, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "synced_gpus": False, "token_healing": False, "is_assistant": False,
} | dict.fromkeys([
    "min_p", "top_h", "penalty_alpha", "bad_words_ids", "force_words_ids", "sequence_bias", "guidance_scale",
    "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "max_time",
    "exponential_decay_length_penalty", "stop_strings", "stopping_criteria", "logits_processor", "streamer",
    "prefix_allowed_tokens_fn", "constraints", "assistant_model", "inputs_embeds", "past_key_values",
    "cache_implementation", "cache_config", "watermarking_config", "prompt_lookup_num_tokens", "decoder_start_token_id",
    "negative_prompt_ids", "negative_prompt_attention_mask", "dola_layers", "low_memory", "compile_config",
])  # fmt: skip
# What a file or a call may also say, and no choice of a token depends on.
_SAID = ("bos_token_id", "transformers_version", "_from_model_config", "disable_compile", "custom_generate")


class GenerationConfig:
    """The options of `generate` that stay with a model, by transformers' names: read from `generation_config.json`, set
    as attributes, and overridden by a call's keywords. What is not set reads as None."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name in Options.__annotations__ or name in NEUTRAL or name in _SAID:
            return None
        raise AttributeError(f"GenerationConfig has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self))  # by value: Flax keeps it as the static part of a model

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @classmethod
    def from_model_config(cls, config: OPTConfig) -> GenerationConfig:
        """The token ids of a model's config."""
        eos = config.eos_token_id
        ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
        return cls(**ids, eos_token_id=list(eos) if isinstance(eos, tuple) else eos)

    @classmethod
    def from_folder(cls, folder: Path, config: OPTConfig) -> GenerationConfig:
        """From a checkpoint's `generation_config.json`, or from its config where there is none."""
        path = folder / "generation_config.json"
        return cls(**read_json(path)) if path.is_file() else cls.from_model_config(config)

    def to_dict(self) -> dict[str, Any]:
        """What is set."""
        return {name: value for name, value in sorted(self.__dict__.items()) if value is not None}

    def to_diff_dict(self) -> dict[str, Any]:
        """transformers' name of `to_dict`."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """The contents of a `generation_config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def update(self, **values: Any) -> dict[str, Any]:
        """Set options by name; returns those that do not exist."""
        known = {name for name in values if name in Options.__annotations__ or name in NEUTRAL or name in _SAID}
        self.__dict__.update({name: values[name] for name in known})
        return {name: value for name, value in values.items() if name not in known}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/generation_config.json`, whole or not at all."""
        write_atomically(Path(folder) / "generation_config.json", self.to_json_string())


def merged(held: GenerationConfig | None, options: Options) -> Options:
    """A call's options over those that its `generation_config`, or else the model's, sets. Options that are not offered
    are dropped where they ask for nothing; ValueError names the others."""
    given: dict[str, Any] = dict(options)
    chosen = given.pop("generation_config", None) or held
    kept: dict[str, Any] = {} if chosen is None else {k: v for k, v in chosen.to_diff_dict().items() if v is not None}
    if {"max_new_tokens", "max_length"} & given.keys():
        kept = {name: value for name, value in kept.items() if name not in ("max_new_tokens", "max_length")}
    result = kept | given
    for name in [name for name in result if name in NEUTRAL or name in _SAID]:
        value = result.pop(name)
        if name in NEUTRAL and value is not None and value != NEUTRAL[name]:
            raise ValueError(f"generate: found {name}={value!r}, which is not offered; wanted {NEUTRAL[name]!r}")
    return result  # type: ignore[return-value]


@dataclass(frozen=True)
class Generation:
    """The checked settings of one `generate`."""

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int  # 0: all
    top_p: float
    seed: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int


@dataclass(frozen=True)
class Prompt:
    """What `generate` continues: ids [B, T], mask [B, T] (True: a real token), and the settings."""

    ids: np.ndarray
    mask: np.ndarray
    settings: Generation


def prompt(
    config: OPTConfig, input_ids: Any, attention_mask: Any, options: Options, held: GenerationConfig | None = None
) -> Prompt:
    """The checked arguments of a `generate`, in numpy. Without a mask, everything but the config's `pad_token_id` is
    real. Raises ValueError that names the argument."""
    ids = np.asarray(input_ids)
    B, T = check_call(config, ids.shape, None, None if attention_mask is None else np.shape(attention_mask))
    check_tokens(config, int(ids.min()), int(ids.max()))
    if attention_mask is None:
        mask = np.ones((B, T), bool) if config.pad_token_id is None else ids != config.pad_token_id
    else:
        mask = np.asarray(attention_mask) != 0
    counts = mask.sum(axis=1)
    return Prompt(ids, mask, check_generate(config, T, int(counts.max()), int(counts.min()), **merged(held, options)))


def check_generate(
    config: OPTConfig, width: int, longest: int, shortest: int, **options: Unpack[Options]
) -> Generation:
    """The checked settings of a `generate` over prompts `width` columns wide, whose longest row has `longest` tokens
    and whose shortest has `shortest`.

    Raises ValueError that names the argument, and TypeError for options that do not exist.
    """

    def check(ok: bool, name: str, value: object, wanted: str) -> None:
        if not ok:
            raise ValueError(f"{name}: found {value!r}, wanted {wanted}")

    if unknown := options.keys() - Options.__annotations__:
        names = ", ".join(Options.__annotations__)
        raise TypeError(f"generate: found unknown options {', '.join(sorted(unknown))}, wanted some of {names}")
    new, length = options.get("max_new_tokens"), options.get("max_length")
    if new is not None and length is not None:
        raise ValueError("max_new_tokens, max_length: found both, wanted only one of them")
    if length is not None:
        check(length > width, "max_length", length, f"more than the prompt's {width}, or max_new_tokens")
        new = length - width
    new = 20 if new is None else new
    given = options.get("eos_token_id")
    eos = config.eos_token_ids if given is None else (given,) if isinstance(given, int) else tuple(given)
    pad = options.get("pad_token_id")
    pad = config.pad_token_id if pad is None else pad
    pad = pad if pad is not None else eos[0] if eos else 0
    shortest_new, temperature = options.get("min_new_tokens", 0), options.get("temperature", 1.0)
    top_k, top_p, seed = options.get("top_k", 50), options.get("top_p", 1.0), options.get("seed")
    check(shortest > 0, "attention_mask", "a row without tokens", "at least one token in every row")
    check(new > 0, "max_new_tokens", new, "a number > 0")
    check(0 <= shortest_new <= new, "min_new_tokens", shortest_new, f"0 to {new}")
    check(temperature > 0, "temperature", temperature, "a number > 0; do_sample=False for greedy")
    check(top_k is None or top_k >= 0, "top_k", top_k, "a number ≥ 0; 0 for all tokens")
    check(0 < top_p <= 1, "top_p", top_p, "0 < top_p ≤ 1")
    check(all(0 <= i < config.vocab_size for i in eos), "eos_token_id", given, f"ids below {config.vocab_size}")
    check(0 <= pad < config.vocab_size, "pad_token_id", pad, f"an id below {config.vocab_size}")
    limit, total = config.max_position_embeddings, longest + new
    if total > limit:
        raise ValueError(
            f"max_new_tokens: a prompt of {longest} tokens and {new} new ones make {total}, "
            f"wanted at most {limit} (max_position_embeddings)"
        )
    return Generation(
        max_new_tokens=new,
        min_new_tokens=shortest_new,
        do_sample=options.get("do_sample", False),
        temperature=float(temperature),
        top_k=min(top_k or 0, config.vocab_size),
        top_p=float(top_p),
        seed=secrets.randbits(63) if seed is None else seed,
        eos_token_ids=eos,
        pad_token_id=pad,
    )
