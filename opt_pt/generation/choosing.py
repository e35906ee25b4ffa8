"""From the logits of the next token to the token: what `Settings.processors` names, and the draw.

A processor is a function (text, scores [R, V], value) -> scores, with the value of its option; token ids and sequences
come as tensors. All but those of HOST are tensor operations of fixed shapes, so that they can be part of a CUDA graph.

R rows   V vocabulary   W columns of a prompt   S sequences
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opt_common.generation import Sequences, Settings

from .text import Text

HOST = {"guidance_scale", "prefix_allowed_tokens_fn", "logits_processor"}  # they call the model, or the user's Python


class Chooser:
    """Chooses the next tokens of a text from their logits.

    scores, logits: of each token, if asked for, what it was chosen from, and what the model said; [R, V] float32 each.
    fixed: whether choosing is nothing but tensor operations, and leaves nothing behind. greedy: whether it takes the
    likeliest, whatever was written before. variant: what its operations depend on.
    """

    def __init__(self, settings: Settings, text: Text, guide: Callable[[], Tensor] | None = None) -> None:
        device = text.ids.device
        self.text, self.do_sample = text, settings.do_sample
        functions = PROCESSORS | {"guidance_scale": partial(_guidance_scale, guide)}
        ordered = _ordered(settings.processors)
        self.processors = [(functions[name], _on(device, value)) for name, value in ordered]
        self.scores: list[Tensor] | None = [] if settings.output_scores else None
        self.logits: list[Tensor] | None = [] if settings.output_logits else None
        self.rng = _generator(settings.seed, device) if settings.do_sample else None
        self.fixed = self.scores is None and self.logits is None and not HOST & settings.processors.keys()
        self.greedy = self.fixed and not self.processors and not self.do_sample
        # On a GPU what comes behind top_k sees only what it leaves: to sort a vocabulary takes longer than all the rest
        self.few, k = None, settings.processors.get("top_k", 0)
        if device.type == "cuda" and self.fixed and settings.num_beams == 1 and 0 < 2 * k < len(text.is_eos):
            self.few = [name for name, _ in ordered].index("top_k"), k
        numbers = [(name, v if isinstance(v, int) else None) for name, v in settings.processors.items()]
        self.variant = (settings.do_sample, settings.num_beams, self.fixed, *numbers)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row, [R], from its logits [R, V]."""
        logits = logits.float()
        if self.logits is not None:
            self.logits.append(logits.clone())
        if self.few is not None:
            return self._of_few(logits, *self.few)
        scores = self.process(logits)
        return self.draw(scores.softmax(dim=-1))[:, 0] if self.do_sample else scores.argmax(dim=-1)

    def _of_few(self, scores: Tensor, at: int, k: int) -> Tensor:
        """As `__call__`, but from processor `at`, top_k, on with the 2 k likeliest alone: so many, because all that are
        as likely as the k-th stay."""
        for function, value in self.processors[:at]:
            scores = function(self.text, scores, value)
        scores, ids = scores.topk(2 * k)
        scores = scores.masked_fill(scores < scores[:, k - 1 : k], -torch.inf)
        for function, value in self.processors[at + 1 :]:
            scores = function(self.text, scores, value)
        return ids.gather(1, self.draw(scores.softmax(dim=-1)))[:, 0]

    def process(self, scores: Tensor) -> Tensor:
        """What the tokens are chosen from, [R, V], of their logits or log probabilities, float32."""
        for function, value in self.processors:
            scores = function(self.text, scores, value)
        if self.scores is not None:
            self.scores.append(scores.clone())
        return scores

    def draw(self, chances: Tensor, n: int = 1) -> Tensor:
        """`n` different columns of each row, [R, n], by their chances [R, V]."""
        if chances.device.type == "cpu":
            return torch.multinomial(chances, n, generator=self.rng)
        # the same draw, which in PyTorch waits for the device: p / Exp(1) is largest where a draw from p would fall
        races = chances / torch.empty_like(chances).exponential_(generator=self.rng)
        return races.argmax(dim=-1, keepdim=True) if n == 1 else races.topk(n).indices


def _generator(seed: int | tuple[int, ...] | None, device: torch.device) -> torch.Generator | None:
    """None: PyTorch's own, as torch.manual_seed says."""
    if seed is None:
        return None
    if isinstance(seed, tuple):
        seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def _ordered(processors: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and values in the order in which they apply. As in transformers, one of its own processors among those of
    `logits_processor` takes the place of the option that asks for the same."""
    functions, found = list(processors.get("logits_processor", ())), []
    for name, value in processors.items():
        own = next((f for f in functions if _OPTIONS.get(type(f).__name__) == name), None)
        if name == "logits_processor":
            value = tuple(functions)
        elif own is not None:
            functions.remove(own)
            name, value = "logits_processor", (own,)
        found.append((name, value))
    return found


def _on(device: torch.device, value: Any) -> Any:
    """Token ids and sequences as tensors; anything else as it is."""
    if isinstance(value, Sequences):
        return Sequences(*(torch.tensor(part, device=device) for part in value))  # type: ignore[arg-type]
    if isinstance(value, tuple) and all(isinstance(i, int) for i in value):
        return torch.tensor(value, device=device)
    return value


_OPTIONS = {
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "MinLengthLogitsProcessor": "min_new_tokens",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
}  # transformers' processors, and the options that make them


# === What changes the logits ===


def _guidance_scale(guide: Any, text: Text, scores: Tensor, scale: float) -> Tensor:
    """guide: the logits [R, V] to move away from."""
    away = guide().float().log_softmax(dim=-1)
    return scale * (scores.log_softmax(dim=-1) - away) + away


def _sequence_bias(text: Text, scores: Tensor, sequences: Any) -> Tensor:
    before, last, bias, length = sequences
    taken, n = text.at[0], before.shape[1]
    tail = text.ids[:, (taken - n + torch.arange(n, device=before.device)).clamp(min=0)]  # [R, n]
    complete = ((tail[:, None] == before) | (before < 0)).all(dim=-1) & (length <= taken + 1)  # [R, S]
    return scores + torch.zeros_like(scores).index_add(1, last, torch.where(complete, bias, 0.0).to(scores.dtype))


def _encoder_repetition_penalty(text: Text, scores: Tensor, penalty: float) -> Tensor:
    return _penalized(scores, text.ids[:, : text.width], 1 / penalty)


def _repetition_penalty(text: Text, scores: Tensor, penalty: float) -> Tensor:
    columns = torch.arange(text.ids.shape[1], device=scores.device)
    return _penalized(scores, text.ids.masked_fill(columns < text.padding[:, None], scores.shape[1]), penalty)


def _penalized(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    return torch.where(_among(ids, scores), torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _no_repeat_ngram_size(text: Text, scores: Tensor, n: int) -> Tensor:
    return _without_ngrams(text, scores, n, text.ids)


def _encoder_no_repeat_ngram_size(text: Text, scores: Tensor, n: int) -> Tensor:
    return _without_ngrams(text, scores, n, text.ids[:, : text.width])


def _without_ngrams(text: Text, scores: Tensor, n: int, ids: Tensor) -> Tensor:
    """Without the tokens that would complete a sequence of n that is in ids [R, T]."""
    if ids.shape[1] < n:
        return scores
    tail = text.ids[:, (text.at[0] - n + 1 + torch.arange(n - 1, device=ids.device)).clamp(min=0)]
    windows = ids.unfold(1, n, 1)  # those that end in a blank column complete nothing
    repeated = (windows[..., :-1] == tail[:, None]).all(dim=-1)
    return scores.masked_fill(_among(torch.where(repeated, windows[..., -1], scores.shape[1]), scores), -torch.inf)


def _among(ids: Tensor, scores: Tensor) -> Tensor:
    """[R, V], which tokens are in ids [R, T]; ids of V and above are none."""
    R, V = scores.shape
    return scores.new_zeros((R, V + 1), dtype=torch.bool).scatter_(1, ids.clamp(max=V), True)[:, :V]


def _min_new_tokens(text: Text, scores: Tensor, least: int) -> Tensor:
    return _suppressed(scores, text.eos, text.at[0] - text.width < least)


def _prefix_allowed_tokens_fn(text: Text, scores: Tensor, function: Callable[[int, Tensor], Any]) -> Tensor:
    allowed = torch.full_like(scores, -torch.inf)
    for row, ids in enumerate(text.so_far()):
        tokens = function(row // text.beams, ids)
        if len(tokens) == 0:
            raise ValueError(f"prefix_allowed_tokens_fn: found no tokens for row {row // text.beams}, wanted some")
        allowed[row, tokens] = 0
    kept = scores + allowed
    # where other options leave none of them, in all beams of a prompt, they are allowed all the same
    nothing = kept.amax(dim=1).isneginf().view(-1, text.beams).all(dim=1).repeat_interleave(text.beams)
    return torch.where(nothing[:, None], allowed, kept)


def _forced_bos_token_id(text: Text, scores: Tensor, ids: Tensor) -> Tensor:
    return _forced(scores, ids, text.at[0] == 1)


def _forced_eos_token_id(text: Text, scores: Tensor, ids: Tensor) -> Tensor:
    return _forced(scores, ids, text.at[0] == text.ids.shape[1] - 1)


def _forced(scores: Tensor, ids: Tensor, now: Tensor) -> Tensor:
    return torch.where(now, torch.full_like(scores, -torch.inf).index_fill(1, ids, 0.0), scores)


def _remove_invalid_values(text: Text, scores: Tensor, value: bool) -> Tensor:
    return scores.nan_to_num()


def _exponential_decay_length_penalty(text: Text, scores: Tensor, value: tuple[int, float]) -> Tensor:
    start, factor = value
    over = (text.at[0] - text.width - start).clamp(min=0)
    end = scores[:, text.eos]
    more = end.abs() * (torch.pow(factor, over.double()) - 1)
    return scores.index_copy(1, text.eos, end + more.masked_fill(~end.isfinite(), 0.0))


def _suppress_tokens(text: Text, scores: Tensor, ids: Tensor) -> Tensor:
    return scores.index_fill(1, ids, -torch.inf)


def _begin_suppress_tokens(text: Text, scores: Tensor, ids: Tensor) -> Tensor:
    return _suppressed(scores, ids, text.at[0] == text.begin)


def _suppressed(scores: Tensor, ids: Tensor, now: Tensor) -> Tensor:
    return torch.where(now, scores.index_fill(1, ids, -torch.inf), scores)


def _logits_processor(text: Text, scores: Tensor, functions: tuple[Callable[[Tensor, Tensor], Tensor], ...]) -> Tensor:
    for function in functions:
        scores = function(text.so_far(), scores)
    return scores


# === What sampling changes then; the likeliest `text.least` tokens stay ===


def _temperature(text: Text, scores: Tensor, temperature: float) -> Tensor:
    return scores / temperature


def _top_k(text: Text, scores: Tensor, k: int) -> Tensor:
    return scores.masked_fill(scores < _nth(scores, max(k, text.least)), -torch.inf)


def _top_p(text: Text, scores: Tensor, p: float) -> Tensor:
    ordered, order = scores.sort(dim=-1)
    gone = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    gone[:, -text.least :] = False
    return scores.masked_fill(gone.scatter(1, order, gone), -torch.inf)


def _min_p(text: Text, scores: Tensor, p: float) -> Tensor:
    chances = scores.softmax(dim=-1)
    gone = chances < p * chances.amax(dim=-1, keepdim=True)
    likeliest = chances.topk(min(text.least, scores.shape[1])).indices
    return scores.masked_fill(gone.scatter(1, likeliest, False), -torch.inf)


def _typical_p(text: Text, scores: Tensor, p: float) -> Tensor:
    logs = scores.log_softmax(dim=-1)
    entropy = -(logs * logs.exp()).nansum(dim=-1, keepdim=True)
    distance, order = (-logs - entropy).abs().sort(dim=-1)
    below = scores.gather(1, order).softmax(dim=-1).cumsum(dim=-1) < p
    last = below.sum(dim=-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    gone = distance > distance.gather(1, last)
    gone[:, : text.least] = False
    return scores.masked_fill(gone.scatter(1, order, gone), -torch.inf)


def _epsilon_cutoff(text: Text, scores: Tensor, epsilon: float) -> Tensor:
    return _without_unlikely(text, scores, scores.softmax(dim=-1), epsilon)


def _eta_cutoff(text: Text, scores: Tensor, epsilon: float) -> Tensor:
    chances, logs = scores.softmax(dim=-1), scores.log_softmax(dim=-1)
    entropy = -(logs.clamp(min=torch.finfo(logs.dtype).min) * chances).sum(dim=-1, keepdim=True)
    return _without_unlikely(text, scores, chances, (epsilon**0.5 * (-entropy).exp()).clamp(max=epsilon))


def _without_unlikely(text: Text, scores: Tensor, chances: Tensor, least: Tensor | float) -> Tensor:
    return scores.masked_fill((chances < least) & (scores < _nth(scores, text.least)), -torch.inf)


def _nth(scores: Tensor, n: int) -> Tensor:
    """The n-th largest of each row, [R, 1]."""
    return scores.topk(min(n, scores.shape[1])).values[:, -1:]


def _renormalize_logits(text: Text, scores: Tensor, value: bool) -> Tensor:
    return scores.log_softmax(dim=-1)


PROCESSORS: dict[str, Callable[[Text, Tensor, Any], Tensor]] = {
    function.__name__[1:]: function
    for function in (
        _sequence_bias, _encoder_repetition_penalty, _repetition_penalty, _no_repeat_ngram_size,
        _encoder_no_repeat_ngram_size, _min_new_tokens, _prefix_allowed_tokens_fn, _forced_bos_token_id,
        _forced_eos_token_id, _remove_invalid_values, _exponential_decay_length_penalty, _suppress_tokens,
        _begin_suppress_tokens, _logits_processor, _temperature, _top_k, _top_p, _min_p, _typical_p, _epsilon_cutoff,
        _eta_cutoff, _renormalize_logits,
    )
} | {"bad_words_ids": _sequence_bias}  # fmt: skip
