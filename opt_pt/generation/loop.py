"""One text a row, a token at a time: greedy search and sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from opt_common.generation import Options, Settings, StopStrings

from ..parallel import as_first
from .passes import Passes
from .text import Text


class Stops:
    """What ends rows besides tokens: `stop_strings`, `max_time` and `stopping_criteria`."""

    def __init__(
        self, settings: Settings, options: Options, scores: list[Tensor] | None = None, split: bool = False
    ) -> None:
        self.split = split  # the model over processes, which must all stop at once: clocks and criteria could differ
        self.scores, self.checks = scores, list[Callable[[Tensor, Any], Any]]()
        if settings.max_time is not None:
            end = time.monotonic() + settings.max_time
            self.checks.append(lambda ids, scores: time.monotonic() > end)
        if settings.stop_strings:
            stops = StopStrings(options.get("tokenizer"), settings.stop_strings)
            self.checks.append(
                lambda ids, scores: torch.tensor([stops(row) for row in ids.tolist()], device=ids.device)
            )
        criteria: Any = options.get("stopping_criteria") or []
        criteria = criteria if isinstance(criteria, list) else [criteria]
        self.checks += criteria
        # transformers goes on with padding behind an end only if a token can end a row
        self.pads = bool(settings.eos_token_ids) or any(hasattr(c, "eos_token_id") for c in criteria)

    def __bool__(self) -> bool:
        return bool(self.checks)

    def __call__(self, ids: Tensor) -> Tensor:
        """Which rows of ids [R, T] end here, [R]."""
        ended = torch.zeros(len(ids), device=ids.device, dtype=torch.bool)
        for check in self.checks:
            ended = ended | check(ids, None if self.scores is None else tuple(self.scores))
        return as_first(ended) if self.split and self.checks else ended

    def over(self, text: Text) -> bool:
        """Note which rows end here, and say whether all have. Waits for the device."""
        if self.checks:
            (text.done if self.pads else text.stopped).logical_or_(self(text.so_far()))
        return bool(self.checks or text.can_end) and text.ended()


def write(
    text: Text, passes: Passes, choose: Any, over: Callable[[Text], bool], watched: bool = False
) -> Iterator[Tensor]:
    """Yields the new tokens [R], one a row, in a tensor that the next ones are written to.

    choose: a Chooser, or Beams. over: whether all rows have ended, which is asked after each token only where the
    device is waited for anyhow, as it is if the tokens are watched."""
    every = 1 if watched or not choose.fixed or text.ids.device.type == "cpu" else 16
    text.write(choose(passes.first()))
    turn = passes.turn(choose)
    while True:
        text.length += 1
        ended = (text.length - text.width) % every == 0 and over(text)
        yield text.token
        if ended or text.length == text.ids.shape[1]:
            return
        turn()
