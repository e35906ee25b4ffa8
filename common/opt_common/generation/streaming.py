"""Text as it is written: pieces of it from tokens, and the streamers that transformers' scripts give to `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from queue import Queue
from typing import Any

import numpy as np


class Pieces:
    """Turns tokens into pieces of text that add up to the text of all of them. Characters come whole: of one that takes
    several tokens, with the last of these."""

    def __init__(self, tokenizer: Any, **decode: Any) -> None:
        self.tokenizer, self.decode = tokenizer, decode
        self.ids: list[int] = []
        self.context = 0  # where the last piece begins: some tokenizers read a token by the one in front of it
        self.told = 0  # the tokens whose text is out

    def __call__(self, ids: Iterable[int]) -> str:
        """The text that these further tokens make known; it may be empty."""
        self.ids.extend(int(i) for i in ids)
        piece = self._untold()
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):  # perhaps the beginning of a character
            return ""
        self.context, self.told = self.told, len(self.ids)
        return piece

    def rest(self) -> str:
        """What is left at the end."""
        piece, self.ids, self.context, self.told = self._untold(), [], 0, 0
        return piece

    def _untold(self) -> str:
        before = self._text(self.ids[self.context : self.told])
        return self._text(self.ids[self.context :])[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode)


def pieces(tokens: Iterable[np.ndarray], tokenizer: Any, **decode: Any) -> Iterator[str]:
    """The text of one row, piece by piece, from its new tokens [1], one a step."""
    text = Pieces(tokenizer, **({"skip_special_tokens": True} | decode))
    for token in tokens:
        if piece := text(np.ravel(token)):
            yield piece
    if piece := text.rest():
        yield piece


class TextStreamer:
    """Prints the text of one row as it is written: give it to `generate` as `streamer`. As transformers' class of that
    name; `decode` are arguments of `tokenizer.decode`. Subclasses may override `on_finalized_text`."""

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode: Any) -> None:
        self.pieces, self.skip_prompt = Pieces(tokenizer, **decode), skip_prompt
        self.begins = True

    def put(self, value: Any) -> None:
        """Take the prompt's tokens, [1, T], or the next one, [1]. Raises ValueError for several rows."""
        ids = np.asarray(value)
        if ids.ndim > 1 and ids.shape[0] > 1:
            raise ValueError(f"{type(self).__name__}: found {ids.shape[0]} rows, wanted one")
        prompt, self.begins = self.begins, False
        if not (prompt and self.skip_prompt):
            self.on_finalized_text(self.pieces(ids.ravel()))

    def end(self) -> None:
        """Print what is left."""
        self.begins = True
        self.on_finalized_text(self.pieces.rest(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of text, and with the last one."""
        print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text that a `generate` in another thread writes. timeout: seconds to wait for a piece before
    `queue.Empty` is raised; None waits for ever."""

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode: Any) -> None:
        super().__init__(tokenizer, skip_prompt, **decode)
        self.timeout, self.queue = timeout, Queue[str | None]()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.queue.put(text)
        if stream_end:
            self.queue.put(None)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        text = self.queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text
