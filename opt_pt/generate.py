"""Text from a model: prefill, choose, then {step, choose} with the cache, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from opt_common.generation import Generation, check_generate
from opt_common.inputs import check_call

from . import decode_cpu
from .decode import Step, can_step
from .linear import linear


@torch.inference_mode()
def generate(
    self: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> Tensor:
    """Continue each row of `input_ids` [B, T]; returns [B, T + new], the prompts included.

    In half precision on a GPU each token is one replay of a CUDA graph (`opt_pt.decode`), on a CPU a row of plain calls
    (`opt_pt.decode_cpu`), whatever attn_implementation is; that chooses how the prompt is read.

    attention_mask: [B, T], 0 for padding on either side. Default: everything that is not `pad_token_id`.
    max_new_tokens, or max_length, which counts the prompt too: when to stop at the latest. Default: max_length=20.
    min_new_tokens: no end of text before so many.
    do_sample: draw from the probabilities after temperature, then the top_k likeliest (0: all), then the fewest tokens
        that make up top_p; otherwise take the likeliest token. `seed` makes the draw repeatable.
    eos_token_id: the end of a row, one id or several; the rest of the row is `pad_token_id`. Default: the config's.
    Raises ValueError, before any work, if the result would run past max_position_embeddings or an argument is off.
    """
    B, T = check_call(self.config, input_ids.shape, None, None if attention_mask is None else attention_mask.shape)
    if attention_mask is None and self.config.pad_token_id is not None:
        attention_mask = input_ids != self.config.pad_token_id
    mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    counts = mask.sum(dim=1)
    settings = check_generate(
        self.config,
        T,
        int(counts.max()),
        int(counts.min()),
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        min_new_tokens=min_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    device = input_ids.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # Triton launches on the current one
        text = _write(self, input_ids, mask, settings, seed)
    return torch.cat([input_ids, text.tokens[:, : text.length()].to(input_ids.dtype)], dim=1)


def _write(self: Any, input_ids: Tensor, mask: Tensor, settings: Generation, seed: int | None) -> Text:
    (B, T), device, new = input_ids.shape, input_ids.device, settings.max_new_tokens
    cache = self.init_cache(B, T + new - 1)  # the last token is never fed back
    hidden = self.model(input_ids, mask, past_key_values=cache).last_hidden_state
    last = T - 1 - mask.flip(1).argmax(dim=1)  # the rightmost real token of each row
    logits = linear(self.lm_head, hidden[torch.arange(B, device=device), last])  # [B, V]

    text = Text(B, self.config.vocab_size, settings, seed, device)
    text.write(logits)
    at = 1
    if new > 1 and can_step(self, device):
        step = Step(self, cache, mask, mask.sum(dim=1), text.token)
        greedy = not settings.do_sample and not settings.min_new_tokens

        def turn() -> None:
            logits = step()
            step.keep(text, None if greedy else text.choose(logits))

        variant = (*step.variant, greedy, settings.do_sample, settings.top_k, settings.top_p < 1)
        if variant not in _compiled:
            step.compile(text, greedy)
            turn()  # for real, since loading does not go into a graph
            _compiled.add(variant)
            at = 2
        turn = _captured(turn, text.rng) if at + 1 < new else turn
    else:

        def modules() -> Tensor:
            return self(text.token[:, None], past_key_values=cache).logits[:, -1]

        quick = new > 1 and decode_cpu.can_step(self, device)
        step = decode_cpu.Step(self, cache, mask, mask.sum(dim=1), text.token) if quick else modules

        def turn() -> None:
            text.write(step())

    every = 1 if device.type == "cpu" else 16  # looking at `done` waits for the device
    for i in range(at, new):
        if settings.eos_token_ids and i % every == 0 and bool(text.done.all()):
            break
        turn()
    return text


_compiled: set[tuple] = set()  # the variants of a step whose kernels this process has loaded


def _captured(turn: Callable[[], None], rng: torch.Generator) -> Callable[[], None]:
    """`turn`, whose kernels are loaded, as a CUDA graph: the host says once what the device then repeats."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    graph.register_generator_state(rng)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        turn()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


class Text:
    """The tokens chosen so far. Every tensor keeps its place, so that `write` can be part of a CUDA graph.

    token: [B], the last chosen; tokens: [B, max_new_tokens]; done: [B], the rows that have ended; step: [B], how many
    tokens are chosen, in every row the same.
    """

    def __init__(self, B: int, V: int, settings: Generation, seed: int | None, device: torch.device) -> None:
        self.settings, self.rng = settings, torch.Generator(device)
        self.rng.manual_seed(seed) if seed is not None else self.rng.seed()
        self.is_eos = torch.zeros(V, device=device, dtype=torch.bool)
        self.is_eos[list(settings.eos_token_ids)] = True
        self.token = torch.empty(B, device=device, dtype=torch.long)
        self.tokens = torch.full((B, settings.max_new_tokens), settings.pad_token_id, device=device, dtype=torch.long)
        self.done = torch.zeros(B, device=device, dtype=torch.bool)
        self.step = torch.zeros(B, device=device, dtype=torch.int32)

    def write(self, logits: Tensor) -> None:
        """Choose and keep the next token of each row from its logits [B, V]."""
        chosen = self.choose(logits).masked_fill(self.done, self.settings.pad_token_id)
        self.token.copy_(chosen)
        self.tokens.scatter_(1, self.step.long()[:, None], chosen[:, None])
        self.done.logical_or_(self.is_eos[chosen])
        self.step.add_(1)

    def length(self) -> int:
        """How many tokens the longest row has, its end of text included."""
        ended = self.is_eos[self.tokens].long()  # the padding behind an end may be an eos too, but never the first
        lengths = torch.where(ended.any(dim=1), ended.argmax(dim=1) + 1, self.settings.max_new_tokens)
        return int(lengths.max())

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, [B], from its logits [B, V]."""
        settings = self.settings
        if settings.min_new_tokens:
            early = (self.step < settings.min_new_tokens)[:, None]
            logits = logits.masked_fill(self.is_eos & early, -torch.inf)
        if not settings.do_sample:
            return logits.argmax(dim=-1)
        scores, ids = logits, None
        if settings.top_k:
            scores, ids = logits.topk(settings.top_k)
        elif settings.top_p < 1:
            scores, ids = logits.sort(dim=-1, descending=True)
        scores = scores.float() / settings.temperature
        if settings.top_p < 1:
            chances = scores.softmax(dim=-1)
            scores = scores.masked_fill(chances.cumsum(dim=-1) - chances >= settings.top_p, -torch.inf)
        # p / Exp(1) is largest where a draw from p would fall: a draw without a trip to the host
        noise = torch.empty_like(scores).exponential_(generator=self.rng)
        at = (scores.softmax(dim=-1) / noise).argmax(dim=-1)
        return at if ids is None else ids.gather(1, at[:, None])[:, 0]
