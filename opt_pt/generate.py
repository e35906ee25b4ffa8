"""Text from a model: prefill, choose, then {step, choose} with the cache, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opt_common.inputs import Generation, check_call, check_generate


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
    device, new = input_ids.device, settings.max_new_tokens
    rng = torch.Generator(device)
    rng.manual_seed(seed) if seed is not None else rng.seed()
    eos = torch.tensor(settings.eos_token_ids, device=device, dtype=torch.long)

    tokens = torch.full((B, new), settings.pad_token_id, device=device, dtype=torch.long)
    done = torch.zeros(B, device=device, dtype=torch.bool)
    cache = self.init_cache(B, T + new - 1)  # the last token is never fed back
    hidden = self.model(input_ids, mask, past_key_values=cache).last_hidden_state
    last = T - 1 - mask.flip(1).argmax(dim=1)  # the rightmost real token of each row
    logits = self.lm_head(hidden[torch.arange(B, device=device), last])  # [B, V]
    for step in range(new):
        token = _choose(logits, settings, eos, step, rng).masked_fill(done, settings.pad_token_id)
        tokens[:, step] = token
        done = done | torch.isin(token, eos)
        # looking at `done` waits for the device: on a GPU only now and then
        if step + 1 == new or ((device.type == "cpu" or step % 16 == 15) and bool(done.all())):
            break
        logits = self(token[:, None], past_key_values=cache).logits[:, -1]
    ended = torch.isin(tokens, eos).long()
    lengths = torch.where(ended.any(dim=1), ended.argmax(dim=1) + 1, new)
    return torch.cat([input_ids, tokens[:, : int(lengths.max())].to(input_ids.dtype)], dim=1)


def _choose(logits: Tensor, settings: Generation, eos: Tensor, step: int, rng: torch.Generator) -> Tensor:
    """The next token of each row, [B], from its logits [B, V]."""
    logits = logits.float()
    if step < settings.min_new_tokens:
        logits = logits.index_fill(1, eos, -torch.inf)
    if not settings.do_sample:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    if settings.top_k:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[:, -1:], -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        tail = probabilities.cumsum(dim=-1) - probabilities >= settings.top_p  # what came before is already enough
        logits = logits.masked_fill(tail.scatter(1, order, tail), -torch.inf)
    # p / Exp(1) is largest where a draw from p would fall: a draw without a trip to the host
    noise = torch.empty_like(logits).exponential_(generator=rng)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)
