"""A vocabulary learnt from texts, for a tokenizer that otherwise works like an old one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers, trainers


def learn(
    old: Tokenizer,
    texts: Iterable[str] | Iterable[Sequence[str]],
    vocab_size: int,
    length: int | None,
    new: Sequence[str | AddedToken],
    renamed: Mapping[str, str],
    options: Mapping[str, Any],
) -> Tokenizer:
    """`old` with another vocabulary. Its special tokens, some of them `renamed`, and then `new` get the first ids."""
    state = json.loads(old.to_str())
    around = state["post_processor"]
    special: list[str | AddedToken] = []
    for token in state["added_tokens"]:
        if token.pop("special"):
            del token["id"]
            special.append(AddedToken(**token | {"content": renamed.get(token["content"], token["content"])}))
    state["model"] |= {"vocab": {}, "merges": []}
    learner = Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))
    keywords: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} | dict(options)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*special, *new], **keywords)
    learner.train_from_iterator(texts, trainer=trainer, length=length)
    if around:
        _renumber(around, learner, renamed)
    return Tokenizer.from_str(json.dumps(json.loads(learner.to_str()) | {"post_processor": around}))


def _renumber(around: dict[str, Any], learner: Tokenizer, renamed: Mapping[str, str]) -> None:
    """Give a post-processor, which names tokens by their ids too, the new ids. ValueError for a token that is gone."""

    def new_id(token: str) -> int:
        if (index := learner.token_to_id(token)) is None:
            raise ValueError(f"the post-processor puts {token!r}, which is no special token: see add_special_tokens")
        return index

    for piece in around.get("special_tokens", {}).values():
        piece["tokens"] = [renamed.get(token, token) for token in piece["tokens"]]
        piece["ids"] = [new_id(token) for token in piece["tokens"]]
    for name in {"cls", "sep"} & around.keys():  # of RoBERTa's and BERT's post-processors
        token = renamed.get(around[name][0], around[name][0])
        around[name] = [token, new_id(token)]
