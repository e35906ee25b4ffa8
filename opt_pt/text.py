"""The tokens that `generate` chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from opt_common.generation import Generation


class Text:
    """The tokens chosen so far. Every tensor keeps its place, so that `write` can be part of a CUDA graph.

    token: [B], the last chosen; tokens: [B, max_new_tokens]; done: [B], the rows that have ended; step: [B], how many
    tokens are chosen, in every row the same.
    """

    def __init__(self, B: int, V: int, settings: Generation, device: torch.device) -> None:
        self.settings, self.rng = settings, torch.Generator(device)
        self.rng.manual_seed(settings.seed)
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
