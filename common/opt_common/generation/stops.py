"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class StopStrings:
    """Whether the last token of a text completes one of some strings, as transformers' StopStringCriteria says it: a
    string ends within that token, and it may begin in the prompt."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        self.window = max(len(string.encode()) for string in strings) + 1  # a token is at least one byte

    def __call__(self, ids: Sequence[int]) -> bool:
        """ids: the tokens of one row so far."""
        window = [int(i) for i in ids[-self.window :]]
        before, text = (self._text(tokens) for tokens in (window[:-1], window))
        known = len(before.rstrip("\N{REPLACEMENT CHARACTER}"))  # the last token may complete a character
        return any(string in text[max(0, known - len(string) + 1) :] for string in self.strings)

    def of(self, texts: np.ndarray) -> np.ndarray:
        """Which of texts [R, T] end, [R]."""
        return np.array([self(text) for text in texts])

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
