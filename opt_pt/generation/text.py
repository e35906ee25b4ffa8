"""The text that `generate` writes.

R rows: each prompt as often as it has texts or beams   W columns of a prompt   V vocabulary
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from opt_common.generation import Prompt

BLANK = 2**31 - 1  # in a column that is not written yet: no token, so that nothing matches it


class Text:
    """The rows so far. Every tensor keeps its place, so that `write` can be part of a CUDA graph.

    ids: [R, W + new] int64, the prompts with their padding moved to the left, then the new tokens, then BLANK;
    padding: [R], how many columns of each mask are padding; token: [R], the last new tokens; at: [R] int32, the columns
    that are taken, in every row as many; done: [R], the rows that have ended and go on with pad_token_id; stopped: [R],
    those that a stopping criterion ended where no token ends a row: they go on with what is chosen, as in transformers.
    length: the columns that are taken, known without asking the device. can_end: whether rows may end before the last
    column. copies: how many rows a prompt has; beams: how many of them are its beams. begin: at
    which length `begin_suppress_tokens` applies. least: see Settings.
    """

    def __init__(self, given: Prompt, vocabulary: int, device: torch.device) -> None:
        settings, (B, W) = given.settings, given.ids.shape
        self.width, self.length, self.pad, self.least = W, W, settings.pad_token_id, settings.least
        self.beams, self.copies = settings.num_beams, max(settings.num_beams, settings.num_return_sequences)
        self.begin = W if W > 1 or "forced_bos_token_id" not in settings.processors else W + 1
        real = given.mask[:, given.held :]
        real = real if real.shape == (B, W) else np.ones((B, W), bool)  # of `inputs_embeds`
        order = real.argsort(axis=1, kind="stable")  # padding first, each part as it was
        ids = np.full((B, W + settings.max_new_tokens), BLANK)
        ids[:, :W] = np.take_along_axis(given.ids, order, axis=1)
        self.ids = torch.tensor(ids.repeat(self.copies, axis=0), device=device, dtype=torch.long)
        self.padding = torch.tensor((~given.mask).sum(axis=1).repeat(self.copies), device=device)
        R = B * self.copies
        self.token = torch.empty(R, device=device, dtype=torch.long)
        self.at = torch.full((R,), W, device=device, dtype=torch.int32)
        self.done, self.stopped = (torch.zeros(R, device=device, dtype=torch.bool) for _ in range(2))
        self.eos = torch.tensor(settings.eos_token_ids, device=device, dtype=torch.long)
        self.is_eos = torch.zeros(vocabulary, device=device, dtype=torch.bool)
        if settings.num_beams == 1:  # no beam ends: those that would are not gone on with
            self.is_eos[self.eos] = True
        self.can_end = bool(settings.eos_token_ids) or settings.num_beams > 1

    def write(self, token: Tensor) -> None:
        """Put a token [R] behind each row."""
        token = token.masked_fill(self.done, self.pad)
        self.token.copy_(token)
        self.ids.scatter_(1, self.at.long()[:, None], token[:, None])
        self.done.logical_or_(self.is_eos[token])
        self.at.add_(1)

    def extend(self, tokens: list[int]) -> bool:
        """Put several tokens behind the only row, of which none but the last ends it; whether it is full then."""
        new = torch.tensor(tokens, device=self.ids.device)
        self.ids[0, self.length : self.length + len(tokens)] = new
        self.token.copy_(new[-1:])
        self.at.add_(len(tokens))
        self.length += len(tokens)
        return self.length == self.ids.shape[1]

    def ended(self) -> bool:
        """Whether every row has. Waits for the device."""
        return bool((self.done | self.stopped).all())

    def become(self, other: Text) -> None:
        """Take over what another text of the same prompts says."""
        self.length = other.length
        for name in ("ids", "token", "at", "done"):
            getattr(self, name).copy_(getattr(other, name))

    def so_far(self) -> Tensor:
        """The rows without blank columns."""
        return self.ids[:, : self.length]

    def new(self) -> Tensor:
        """The new tokens, up to where the longest row ends. Waits for the device."""
        new = self.ids[:, self.width : self.length]
        ended = self.is_eos[new].long()  # the padding behind an end may be an eos too, but never the first
        lengths = torch.where(ended.any(dim=1), ended.argmax(dim=1) + 1, new.shape[1])
        return new[:, : int(lengths.max())]
