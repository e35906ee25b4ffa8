"""What a tokenizer returns: lists or tensors by name, and the place in the text that each token comes from."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding

from ..frameworks import Framework, registered
from ..kin import Kin


class CharSpan(NamedTuple):
    """Characters `start` to `end`, without `end`, of a text."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens `start` to `end`, without `end`, of a row."""

    start: int
    end: int


class BatchEncoding(Kin, UserDict[str, Any]):
    """`input_ids`, `attention_mask` and whatever else the call asked for, as keys and as attributes.

    An integer or slice in place of a key gives the `tokenizers.Encoding` of rows. Methods that take a row and a place
    in it (`char_to_token(row, char)`) also take the place alone, in row 0.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ) -> None:
        super().__init__(data)
        self._encodings = [encoding] if isinstance(encoding, Encoding) else encoding
        self._n_sequences = self._encodings[0].n_sequences if n_sequences is None and self._encodings else n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.data[key]
        if self._encodings is not None:
            return self._encodings[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        raise KeyError(f"{key!r}: wanted a name or a slice, for no tokenizer made this BatchEncoding")

    def __getattr__(self, name: str) -> Any:
        data = self.__dict__.get("data", {})  # absent while being unpickled
        if name not in data:
            raise AttributeError(f"BatchEncoding has no {name!r}, only {', '.join(data)}")
        return data[name]

    def convert_to_tensors(self, tensor_type: str | None = None, prepend_batch_axis: bool = False) -> BatchEncoding:
        """Turn every list into a tensor of "np", "pt", "tf", "jax" or another registered framework; return self.

        `prepend_batch_axis` makes each a batch of one. Raises ValueError for an unknown `tensor_type` and for rows of
        unequal lengths, ImportError if the framework is not installed.
        """
        kind = check_tensors(tensor_type)
        if kind is not None:
            for name, value in self.data.items():
                self.data[name] = _tensor(name, [value] if prepend_batch_axis else value, kind)
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Move the torch tensors to `device` (a torch.device, its name or its index), leave all else; return self.

        A dtype in place of a device changes nothing but for a warning: ids in half precision would be other ids.
        """
        if type(device).__name__ == "dtype":
            warnings.warn(f"device: found {device}, wanted a device; the tensors keep their dtypes", stacklevel=2)
            return self
        for name, value in self.data.items():
            if hasattr(value, "to"):
                self.data[name] = value.to(device=device, non_blocking=non_blocking)
        return self

    @property
    def encodings(self) -> list[Encoding] | None:
        """The library's own record of each row, or None if no tokenizer made this."""
        return None if self._encodings is None else list(self._encodings)

    @property
    def is_fast(self) -> bool:
        """Whether `encodings`, and so the methods below, are there."""
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """Texts in a row: 1, or 2 for pairs; None if unknown."""
        return self._n_sequences

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row as the vocabulary spells them."""
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row its word in the text; None for a token that the tokenizer put in."""
        return self._row(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 for the text, 1 for its pair, None for a token that the tokenizer put in."""
        return self._row(batch_index).sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """0 if a token belongs to the text, 1 if to its pair, None if to neither."""
        row, index = self._locate(batch_or_token_index, token_index)
        return row.token_to_sequence(index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The word that a token belongs to."""
        row, index = self._locate(batch_or_token_index, token_index)
        return row.token_to_word(index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters that a token stands for; None for a token that the tokenizer put in."""
        row, index = self._locate(batch_or_token_index, token_index)
        span = row.token_to_chars(index)
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that a character belongs to, of the text or (`sequence_index` 1) of its pair."""
        row, index = self._locate(batch_or_char_index, char_index)
        return row.char_to_token(index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that a character belongs to, of the text or (`sequence_index` 1) of its pair."""
        row, index = self._locate(batch_or_char_index, char_index)
        return row.char_to_word(index, sequence_index)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word of the text or (`sequence_index` 1) of its pair; None if it has none."""
        row, index = self._locate(batch_or_word_index, word_index)
        span = row.word_to_tokens(index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word of the text or (`sequence_index` 1) of its pair; None if there is no such word."""
        row, index = self._locate(batch_or_word_index, word_index)
        span = row.word_to_chars(index, sequence_index)
        return None if span is None else CharSpan(*span)

    def _row(self, index: int) -> Encoding:
        if not self._encodings:
            raise ValueError("no tokenizer made this BatchEncoding: it knows its ids, not where they come from")
        return self._encodings[index]

    def _locate(self, first: int, second: int | None) -> tuple[Encoding, int]:
        """Row and place, of which the row may be left out."""
        return (self._row(0), first) if second is None else (self._row(first), second)


def to_lists(value: Any) -> Any:
    """Python numbers, nested as in `value`: a number, an array of any framework, or lists of these."""
    if isinstance(value, list | tuple):
        return [to_lists(part) for part in value]
    if hasattr(value, "numpy") and not hasattr(value, "tolist"):  # TensorFlow's
        value = value.numpy()
    return value.tolist() if hasattr(value, "tolist") else value


def tensors_of(value: Any) -> str | None:
    """What `return_tensors` calls the framework that made `value`; None for Python's own numbers and lists."""
    module = type(value).__module__.split(".")[0].removesuffix("lib")  # jax's arrays are jaxlib's
    if module == "numpy":
        return "np"
    return next((name for name, framework in _frameworks().items() if module in framework.needs), None)


def check_tensors(kind: Any) -> str | None:
    """`return_tensors` as a plain str or None. Raises ValueError if nothing is called so."""
    kind = getattr(kind, "value", kind)  # of transformers' enum
    if kind not in (None, "np", *_frameworks()):
        raise ValueError(f"return_tensors: found {kind!r}, wanted one of {', '.join(['np', *_frameworks()])}")
    return kind


def _frameworks() -> dict[str, Framework]:
    """By what `return_tensors` calls them."""
    return {framework.tensors: framework for framework in registered().values()}


def _tensor(name: str, value: Any, kind: str) -> Any:
    if tensors_of(value) == kind:
        return value
    values = value if isinstance(value, np.ndarray) else to_lists(value)
    try:
        array = np.asarray(values)
    except ValueError as error:
        lengths = [len(row) if isinstance(row, Sequence) else 1 for row in values]
        raise ValueError(
            f"{name}: found rows of {min(lengths)} to {max(lengths)}, wanted rows of one length: pass padding=True,"
            " and with padding='max_length' truncation=True too"
        ) from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: found {value!r:.80}, wanted numbers")
    if array.size == 0:
        array = array.astype(np.int64)
    if kind == "np":
        return array
    framework = _frameworks()[kind]
    dtype = {"i": framework.ids, "u": framework.ids, "f": "float32", "b": "bool"}[array.dtype.kind]
    try:
        return framework.tensor(array.astype(dtype))
    except ImportError as error:
        raise ImportError(f"return_tensors={kind!r} needs {framework.title}: {error}") from error
