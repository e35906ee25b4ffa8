"""The keyword arguments of every `generate`, declared and documented once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict


class Options(TypedDict, total=False):
    """The keyword arguments of every `generate`. Names and defaults are transformers'. None means the default, but for
    top_k and the token ids it means none. What a call does not give, the model's `generation_config` may.

    Length
    """

    max_new_tokens: int | None
    """How many tokens to add at most. Default: 20, if `max_length` is not given either."""

    max_length: int | None
    """The same limit, counting the prompt's columns too. `max_new_tokens` wins over it."""

    min_new_tokens: int | None
    """No row ends before it has this many new tokens. Default: 0."""

    min_length: int | None
    """The same limit, counting the prompt's columns too. `min_new_tokens` wins over it."""

    # How a token is chosen

    do_sample: bool | None
    """Draw each token at random instead of taking the likeliest. Default: False."""

    seed: int | Sequence[int] | None
    """Sampling: makes the draw repeatable. Default: drawn from the framework's own random state, where it has one."""

    num_beams: int | None
    """Beam search: how many continuations of a row are followed. Default: 1."""

    num_return_sequences: int | None
    """How many texts to return for each row: the best beams, or independent draws. Default: 1."""

    length_penalty: float | None
    """Beam search: a beam's score is its log probability over its length to this power. Default: 1.0."""

    early_stopping: bool | str | None
    """Beam search: True ends a row once it has `num_beams` finished texts, "never" only when no running beam can get
    better whatever its length, False when none is likely to. Default: False."""

    guidance_scale: float | None
    """Classifier-free guidance: how far to move from the log probabilities without the prompt, or with
    `negative_prompt_ids`, to those with it. Default: 1.0, no guidance."""

    negative_prompt_ids: Any
    """Guidance: [B, N] tokens to stay away from. Default: the last token of each prompt."""

    negative_prompt_attention_mask: Any
    """Guidance: [B, N], 0 for padding of `negative_prompt_ids`. Default: all ones."""

    # What changes the logits first

    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None
    """Added to the logit of the token that would complete a sequence: {(id, …): bias} or [[[id, …], bias], …]."""

    encoder_repetition_penalty: float | None
    """Above 1 favours the prompt's tokens, below 1 penalizes them. Default: 1.0."""

    repetition_penalty: float | None
    """Above 1 penalizes tokens that are there already, prompt included. Default: 1.0."""

    no_repeat_ngram_size: int | None
    """No sequence of so many tokens comes twice, prompt included. Default: 0, off."""

    encoder_no_repeat_ngram_size: int | None
    """No sequence of so many tokens of the prompt comes again. Default: 0, off."""

    bad_words_ids: Sequence[Sequence[int]] | None
    """Sequences of tokens that must not be written."""

    prefix_allowed_tokens_fn: Callable[[int, Any], Sequence[int]] | None
    """Called with a text's number, of a beam its prompt's, and its tokens so far; returns those that may come next."""

    forced_bos_token_id: int | None
    """The token written behind a prompt of one column."""

    forced_eos_token_id: int | Sequence[int] | None
    """The token written last if `max_new_tokens` is reached."""

    remove_invalid_values: bool | None
    """Read NaN as 0 and infinities as the largest numbers. Default: False."""

    exponential_decay_length_penalty: tuple[int, float] | None
    """(start, factor): from `start` new tokens on, the end becomes likelier by that factor a token."""

    suppress_tokens: Sequence[int] | None
    """Tokens that are never written."""

    begin_suppress_tokens: Sequence[int] | None
    """Tokens that are not written first."""

    logits_processor: Any
    """Called with the tokens so far [B, T] and the logits [B, V], returns logits: a function, or a list of them. In
    PyTorch any of transformers' LogitsProcessors; in TensorFlow it is traced, in JAX if it takes (ids, scores, n),
    as transformers' Flax processors."""

    # What sampling changes then

    temperature: float | None
    """Sampling: divide the logits by it. 0 takes the likeliest token. Default: 1.0."""

    top_k: int | None
    """Sampling: keep the k likeliest tokens, after temperature. 0 keeps all. Default: 50."""

    top_p: float | None
    """Sampling: keep the fewest tokens whose probabilities add up to p, after top_k. Default: 1.0, all."""

    min_p: float | None
    """Sampling: keep tokens at least so likely, relative to the likeliest. Default: off."""

    typical_p: float | None
    """Sampling: keep the tokens whose information is closest to the expected one, up to this probability. Default: 1.0,
    all."""

    epsilon_cutoff: float | None
    """Sampling: keep tokens at least so likely. Default: 0.0, off."""

    eta_cutoff: float | None
    """Sampling: keep tokens at least as likely as the smaller of this and a bound by the entropy. Default: 0.0, off."""

    renormalize_logits: bool | None
    """Turn what is left into log probabilities. Default: False."""

    # When to stop

    eos_token_id: int | Sequence[int] | None
    """The token or tokens that end a row. None, or an empty list: no token does."""

    pad_token_id: int | None
    """Fills a row after its end. None: the first `eos_token_id`."""

    bos_token_id: int | None
    """What a text without a prompt begins with. Default: the config's."""

    stop_strings: str | Sequence[str] | None
    """A row ends with the token that completes one of them; takes `tokenizer`."""

    tokenizer: Any
    """What `stop_strings` are read with."""

    max_time: float | None
    """Seconds after which no further token is begun."""

    stopping_criteria: Any
    """Called with the tokens so far [B, T] and the last scores, returns which rows end: a function, or a list of them,
    as transformers' StoppingCriteria."""

    # What else goes in

    inputs: Any
    """transformers' other name of `input_ids`."""

    inputs_embeds: Any
    """[B, T, E], in place of `input_ids`; the result then holds the new tokens alone."""

    past_key_values: Any
    """A cache of the prompt's first columns, which are not computed again."""

    use_cache: bool | None
    """False: compute the whole text again for each token. Default: True."""

    assistant_model: Any
    """A smaller OPT with the same vocabulary that drafts tokens; what is written stays the same."""

    num_assistant_tokens: int | None
    """How many tokens a draft has. Default: 20 with `assistant_model`."""

    prompt_lookup_num_tokens: int | None
    """Draft so many tokens by finding the last ones earlier in the text; what is written stays the same."""

    max_matching_ngram_size: int | None
    """Prompt lookup: how many last tokens to look for at most. Default: 2."""

    generation_config: Any
    """A GenerationConfig, ours or transformers', in place of the model's."""

    # What comes out

    streamer: Any
    """Gets the prompt and then each new token, as transformers' TextStreamer; one row, no beams."""

    return_dict_in_generate: bool | None
    """Return a GenerateOutput instead of the tokens. Default: False."""

    output_scores: bool | None
    """In it: of each new token the [B, V] that it was chosen from. Default: False."""

    output_logits: bool | None
    """In it: of each new token the model's logits [B, V]. Default: False."""

    output_attentions: bool | None
    """In it: the attention weights of each pass. Default: False."""

    output_hidden_states: bool | None
    """In it: the hidden states of each pass. Default: False."""


# transformers' options that are not offered, each with the values that ask for nothing: given so, they are accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,), "diversity_penalty": (0.0,), "token_healing": (False,), "use_mtp": (False,),
    "low_memory": (False,), "assistant_confidence_threshold": (0.0, 0.4),
    "num_assistant_tokens_schedule": ("constant",),
} | dict.fromkeys([
    "top_h", "penalty_alpha", "dola_layers", "constraints", "force_words_ids", "watermarking_config",
    "assistant_early_exit", "assistant_ensemble_weight", "speculation_type", "custom_generate", "assistant_tokenizer",
    "continuous_batching_config",
], ())  # fmt: skip

# What a file or a call may also say, and no token depends on: how transformers would allocate, compile or synchronize.
SAID = (
    "transformers_version", "_from_model_config", "disable_compile", "compile_config", "cache_implementation",
    "cache_config", "max_cache_len", "prefill_chunk_size", "synced_gpus", "is_assistant", "decoder_start_token_id",
    "assistant_lookbehind", "target_lookbehind", "trust_remote_code",
)  # fmt: skip
