"""Beam search and beam sampling, as transformers 5 does them.

B prompts   K beams a prompt   R = B · K rows   C candidates a prompt for the next beams   V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from opt_common.generation import Settings

from . import loop
from .choosing import Chooser
from .passes import Passes
from .text import BLANK, Text

LOW = -1e9  # the score of a beam that is none


class Beams:
    """The beams of a text: called with the logits of its rows, it chooses the next ones, moves the rows of the text and
    of the passes accordingly, and returns each row's new token. Every tensor keeps its place, and nothing changes after
    the end, so that it can be part of a CUDA graph.

    running: [B, K], the sums of log probabilities of the rows, best first; came: [B, K, new], the row in whose scores
    each of their tokens was found. texts, scores, indices: the best ended texts [B, K, new], their scores [B, K], and
    what `came` was; ended: [B, K], which of them are there. open: [B, 1], whether rows may still get better than those.
    """

    def __init__(self, settings: Settings, text: Text, passes: Passes, choose: Chooser, stops: loop.Stops) -> None:
        self.settings, self.text, self.passes, self.choose, self.stops = settings, text, passes, choose, stops
        self.fixed, self.greedy = choose.fixed and not stops, False
        self.variant, self.rng = (*choose.variant, settings.early_stopping, len(text.eos)), choose.rng
        K, new, device = settings.num_beams, settings.max_new_tokens, text.ids.device
        B = len(text.ids) // K
        self.fill = settings.pad_token_id or settings.eos_token_ids[0] if settings.eos_token_ids else -1  # as there
        self.running = torch.zeros(B, K, device=device)
        self.running[:, 1:] = LOW  # the rows of a prompt are the same yet: one of them counts
        self.came = torch.full((B, K, new), -1, device=device, dtype=torch.int32)
        self.texts = torch.full((B, K, new), self.fill, device=device)
        self.scores = torch.full((B, K), LOW, device=device)
        self.indices = self.came.clone()
        self.ended = torch.zeros(B, K, device=device, dtype=torch.bool)
        self.open = torch.ones(B, 1, device=device, dtype=torch.bool)

    def __call__(self, logits: Tensor) -> Tensor:
        settings, text, full = self.settings, self.text, self.text.ids.shape[1]
        (B, K), V = self.running.shape, logits.shape[1]
        logits = logits.float()
        if self.choose.logits is not None:
            self.choose.logits.append(logits.clone())
        sums = self.choose.process(logits.log_softmax(dim=-1)).view(B, K, V) + self.running[:, :, None]

        # The candidates, best first or as they are drawn: so many that K of them go on, whichever of them end
        C = max(2, 1 + len(text.eos)) * K
        sums = sums.view(B, K * V)
        if settings.do_sample:
            at = self.choose.draw(sums.softmax(dim=-1), C)
            sums = sums.gather(1, at)
        else:
            sums, at = sums.topk(C)
        beam, token = at // V, at % V  # [B, C] each
        column = text.at[0].long() - text.width
        row = beam + torch.arange(B, device=at.device)[:, None] * K
        new = text.ids[:, text.width :].view(B, K, -1)
        new = new.masked_fill(new == BLANK, self.fill)
        texts = _put(_of(new, beam), column, token)  # [B, C, new]
        came = _put(_of(self.came, beam), column, row.int())

        last = text.at[0] + 1 == full
        end = (token[:, :, None] == text.eos).any(dim=2) | last
        if self.stops:
            ids = torch.cat([text.ids[row.flatten(), : text.length], token.view(-1, 1)], dim=1)
            end = end | self.stops(ids).view(B, C)

        # Those that go on
        on = sums + end * LOW
        best = on.topk(K).indices
        running = on.gather(1, best)

        # Those that end, if they are among the first K and better than a text that is there
        written = (column + 1).double()
        score = sums / written.pow(settings.length_penalty)
        if settings.early_stopping is True:
            score = score + self.ended.all(dim=1, keepdim=True) * LOW
        score = score + ~self.open * LOW
        ending = end & (torch.arange(C, device=end.device) < K)
        score = score + ~ending * LOW
        scores = torch.cat([self.scores, score], dim=1)
        kept = scores.topk(K).indices
        scores = scores.gather(1, kept)
        ended = torch.cat([self.ended, ending], dim=1).gather(1, kept)
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            written = torch.full_like(written, settings.max_new_tokens)
        hope = running[:, :1] / written.pow(settings.length_penalty)
        least = torch.where(ended, scores.amin(dim=1, keepdim=True), LOW)
        open = self.open & (hope > least).any(dim=1, keepdim=True)

        over = text.stopped[0].clone()
        for old, now in (
            (self.texts, _of(torch.cat([self.texts, texts], dim=1), kept)),
            (self.indices, _of(torch.cat([self.indices, came], dim=1), kept)),
            (self.scores, scores), (self.ended, ended), (self.open, open),
        ):  # fmt: skip
            old.copy_(torch.where(over, old, now))
        self.running.copy_(running)
        self.came.copy_(_of(came, best))
        going = open.any() & ~end.all()
        if settings.early_stopping is True:
            going = going & ~ended.all()
        text.stopped.copy_(over | ~going)

        rows = row.gather(1, best).flatten()
        text.ids.copy_(text.ids[rows])
        self.passes.reorder(rows)
        return token.gather(1, best).flatten()


def search(
    settings: Settings, text: Text, passes: Passes, choose: Chooser, stops: loop.Stops
) -> tuple[Tensor, Tensor, Tensor]:
    """The texts [B · num_return_sequences, new], their beam_indices, of the same shape, and their scores."""
    beams, n = Beams(settings, text, passes, choose, stops), settings.num_return_sequences
    for _ in loop.write(text, passes, beams, Text.ended):
        pass
    texts, indices, scores = (x[:, :n].flatten(0, 1) for x in (beams.texts, beams.indices, beams.scores))
    length = int((indices >= 0).sum(dim=1).max())
    return texts[:, :length], indices[:, :length], scores


def _of(x: Tensor, at: Tensor) -> Tensor:
    """x [B, K, n] at [B, C] of its K, [B, C, n]."""
    return x.gather(1, at[:, :, None].expand(-1, -1, x.shape[2]))


def _put(x: Tensor, column: Tensor, values: Tensor) -> Tensor:
    """x [B, C, n] with values [B, C] in a column."""
    return x.index_copy(2, column[None], values[:, :, None].to(x.dtype))
