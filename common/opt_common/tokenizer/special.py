"""The special tokens as attributes of a tokenizer: `bos_token` and `bos_token_id`, and so on."""

from __future__ import annotations

import warnings
from typing import Any

from tokenizers import AddedToken


class SpecialToken:
    """A special token: a str, or None if the tokenizer has none of this kind."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tokenizer: Any, owner: type) -> Any:
        return self if tokenizer is None else tokenizer._named[self.name]

    def __set__(self, tokenizer: Any, value: str | AddedToken | None) -> None:
        if value is not None and not isinstance(value, str | AddedToken):
            raise ValueError(f"{self.name}: found {value!r}, wanted a str, an AddedToken or None")
        tokenizer._named[self.name] = None if value is None else str(value)
        if value is not None and tokenizer.backend_tokenizer.token_to_id(str(value)) is None:
            hint = f"add_special_tokens({{{self.name!r}: {str(value)!r}}}) adds it"
            found = f"{str(value)!r} is not in the vocabulary and gets unk_token's id, {tokenizer.unk_token_id}"
            warnings.warn(f"{self.name}: {found}; {hint}", stacklevel=2)


class SpecialTokenId:
    """The id of a special token, or None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    def __get__(self, tokenizer: Any, owner: type) -> Any:
        if tokenizer is None:
            return self
        token = tokenizer._named[self.name]
        return None if token is None else tokenizer.convert_tokens_to_ids(token)

    def __set__(self, tokenizer: Any, value: int | None) -> None:
        setattr(tokenizer, self.name, None if value is None else tokenizer.convert_ids_to_tokens(int(value)))
