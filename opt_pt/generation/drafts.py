"""Drafts: several tokens guessed, by a smaller model or from the text itself, and verified in one pass. What is written
is what would be written without; sampling draws from the same distribution (Leviathan et al. 2022, arXiv:2211.17192).

One row.   k tokens of a draft   V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from opt_common.generation import Prompt, Settings

from ..parallel import fully_sharded
from . import loop
from .choosing import Chooser
from .passes import Passes, passes
from .text import Text


class Drafter(Protocol):
    """What guesses the tokens behind a text."""

    def guess(self, text: Text, most: int) -> tuple[list[int], Tensor | None]:
        """At most so many tokens, and the probabilities [k, V] that they were drawn from, if they were drawn."""
        ...

    def learn(self, text: Text, accepted: int) -> None:
        """How many of them were right; the text has one more token behind those."""
        ...


def drafter(given: Prompt, ids: Tensor, mask: Tensor, text: Text) -> Drafter | None:
    """What guesses in this `generate`, if something does."""
    if not given.settings.draft:
        return None
    if not given.settings.assisted:
        return Lookup(given.settings)
    return Assistant(given.options.get("assistant_model"), given, ids, mask)


class Lookup:
    """Guesses what followed the last tokens where they stand earlier in the text, as transformers'
    PromptLookupCandidateGenerator."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def guess(self, text: Text, most: int) -> tuple[list[int], None]:
        ids = text.so_far()[0].tolist()
        for n in range(min(self.settings.max_matching_ngram_size, len(ids) - 1), 0, -1):
            for i in range(len(ids) - n):
                if ids[i : i + n] == ids[-n:]:
                    found = ids[i + n : i + n + min(most, self.settings.draft)]
                    ends = [j for j, token in enumerate(found) if token in self.settings.eos_token_ids]
                    return found[: ends[0]] if ends else found, None
        return [], None

    def learn(self, text: Text, accepted: int) -> None:
        pass


class Assistant:
    """Guesses what a smaller model writes."""

    def __init__(self, model: Any, given: Prompt, ids: Tensor, mask: Tensor) -> None:
        if fully_sharded(model):  # the others' passes could be those of the large model
            raise ValueError("assistant_model: found weights spread over the processes, wanted all of them in each")
        settings, device = given.settings, ids.device
        self.most = settings.draft
        self.text = Text(given, model.config.vocab_size, device)
        self.passes = passes(model, given, ids, mask, self.text, {})
        processors = {k: v for k, v in settings.processors.items() if k != "guidance_scale"}  # a guess is free
        changes = {"processors": processors, "output_scores": settings.do_sample, "output_logits": False}
        self.choose = Chooser(replace(settings, **changes), self.text)
        self.turn: Any = None

    def guess(self, text: Text, most: int) -> tuple[list[int], Tensor | None]:
        mine, start = self.text, text.length
        if self.turn is None:  # the first token of the text is not its own
            self.passes.first()
            self.turn = self.passes.turn(self.choose)
        mine.become(text)
        for _ in range(min(most, self.most)):
            self.turn()
            mine.length += 1
        self.fed = mine.length - 1
        drawn = None
        if self.choose.scores:
            drawn = torch.cat(self.choose.scores).softmax(dim=-1)
            self.choose.scores.clear()
        return mine.ids[0, start : mine.length].tolist(), drawn

    def learn(self, text: Text, accepted: int) -> None:
        if self.fed < text.length - 1:  # all were right, and the last was not fed back
            self.turn()
            self.fed += 1
            if self.choose.scores:
                self.choose.scores.clear()
        self.passes.forget(self.fed - (text.length - 1))


def write(text: Text, passes: Passes, choose: Chooser, stops: loop.Stops, drafter: Drafter) -> Iterator[Tensor]:
    """Yields the new tokens [1], one a step."""
    logits, guessed, drawn = passes.first()[:, None], list[int](), None
    ended = text.eos.tolist()
    while True:
        start = text.length
        if choose.greedy and not stops:  # all at once: one trip to the host
            chosen = logits.float().argmax(dim=-1)[0].tolist()
            wrong = [i for i, guess in enumerate(guessed) if guess != chosen[i]]
            new = chosen[: wrong[0] + 1] if wrong else chosen
            ends = [i for i, token in enumerate(new) if token in ended]
            over = text.extend(new[: ends[0] + 1] if ends else new) or bool(ends)
            yield from text.ids[0, start : text.length, None].clone()
        else:
            over = False
            for i, guess in enumerate([*guessed, None]):
                if guess is None or drawn is None:
                    token = choose(logits[:, i])
                else:
                    token = _speculated(choose, logits[:, i], guess, drawn[i])
                text.write(token)
                text.length += 1
                over = stops.over(text) or text.length == text.ids.shape[1]
                yield text.token
                if over or int(token) != guess:
                    break
        accepted = text.length - start - 1
        passes.forget(len(guessed) - accepted)
        if over:
            return
        if guessed:
            drafter.learn(text, accepted)
        guessed, drawn = drafter.guess(text, text.ids.shape[1] - text.length - 1)
        logits = passes.next(torch.tensor([[int(text.token), *guessed]], device=text.ids.device))


def _speculated(choose: Chooser, logits: Tensor, guess: int, drawn: Tensor) -> Tensor:
    """A token by its own probabilities, which is the guess, drawn from `drawn` [V], as often as can be."""
    if choose.logits is not None:
        choose.logits.append(logits.float().clone())
    chances = choose.process(logits.float()).softmax(dim=-1)
    if torch.rand((), generator=choose.rng, device=chances.device) <= chances[0, guess] / drawn[guess]:
        return torch.tensor([guess], device=chances.device)
    return choose.draw((chances - drawn).clamp(min=0))[:, 0]
