"""OPT's tokenizer: GPT-2's byte-level BPE, with `</s>` in front of every text.

The `tokenizers` library splits and merges. This reads and writes a checkpoint's files, puts `</s>` in front, cuts,
pads and makes tensors. Calls and ids are those of GPT2Tokenizer in transformers 5.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from .files import read_json, write_atomically
from .frameworks import Framework, registered
from .hub import TOKENIZER_FILES as _FILES
from .hub import fetch

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# In the order in which transformers gives them ids if the vocabulary lacks them.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SETTINGS = ("add_bos_token", "add_prefix_space", "padding_side", "truncation_side", "model_max_length")
_NO_LIMIT = int(1e30)  # what transformers writes for it; it takes anything above 1e20 as that


class BatchEncoding(dict[str, Any]):
    """What the tokenizer gives: `input_ids` and `attention_mask`, as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"BatchEncoding has no {name!r}, only {', '.join(self)}")
        return self[name]

    def to(self, device: Any) -> BatchEncoding:
        """Move the torch tensors in this to `device` (a torch.device or its name), leave all else; return self."""
        for key, value in self.items():
            if hasattr(value, "to"):
                self[key] = value.to(device=device)  # by name: a dtype in its place is torch's TypeError, not a cast
        return self


class GPT2Tokenizer:
    """Text to ids and back.

    `vocab` maps tokens to ids, `merges` holds the pairs to merge, first to last. Special and added tokens that `vocab`
    lacks get the next free ids: first `added_tokens`, then bos, eos, unk, pad. `add_bos_token` puts `bos_token` in
    front of every text, `add_prefix_space` a space. `padding_side` and `truncation_side` are "left" or "right".
    `model_max_length` bounds a text where a call asks for a bound and names none. The defaults are OPT's.
    Raises ValueError if `merges` do not fit `vocab`, or for an unknown side.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        bos_token: str | AddedToken = "</s>",
        eos_token: str | AddedToken = "</s>",
        unk_token: str | AddedToken = "</s>",
        pad_token: str | AddedToken = "<pad>",
        added_tokens: Sequence[AddedToken] = (),
        add_bos_token: bool = True,
        add_prefix_space: bool = False,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int = _NO_LIMIT,
    ) -> None:
        try:
            self.backend = Tokenizer(BPE(vocab, merges))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"vocab and merges make no BPE: {error}") from error
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_tokens(list(added_tokens))
        known = {token.content: token for token in added_tokens}  # with flags that a mere str would reset
        named = (bos_token, eos_token, unk_token, pad_token)
        self.backend.add_special_tokens([known.get(str(token), token) for token in named])
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = map(str, named)
        self.add_bos_token, self.add_prefix_space = add_bos_token, add_prefix_space
        self.padding_side = _side(padding_side)
        self.truncation_side = _side(truncation_side)
        self.model_max_length = int(model_max_length)

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> GPT2Tokenizer:
        """The tokenizer in a folder or in a Hub repository; the other arguments are huggingface_hub's.

        The BPE is read from vocab.json and merges.txt, or else from tokenizer.json; what no file says is as in OPT.
        Raises FileNotFoundError if there is no BPE, and ValueError, naming the files, if they hold none that fits here.
        """
        folder = fetch(
            path_or_name,
            _FILES,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        found = [name for name in _FILES if (folder / name).is_file()]
        if not {"vocab.json", "merges.txt"}.issubset(found) and "tokenizer.json" not in found:
            raise FileNotFoundError(f"{folder}: wanted vocab.json and merges.txt, or tokenizer.json; found {found}")
        saved = {name: read_json(folder / name) for name in found if name.endswith(".json")}
        try:
            if {"vocab.json", "merges.txt"}.issubset(found):
                vocab, merges = saved["vocab.json"], _read_merges(folder / "merges.txt")
            else:
                vocab, merges = _read_bpe(saved["tokenizer.json"])
            settings, ids = _read_settings(saved)
            tokenizer = cls(vocab, merges, **settings)
            for text, index in ids.items():
                if tokenizer._id(text) != index:
                    raise ValueError(f"{text!r} is to be {index}, but the files make it {tokenizer._id(text)}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}: no tokenizer in {', '.join(found)}: {error}") from error
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, for this and transformers.

        Raises FileExistsError if `folder` holds a tokenizer.json: transformers would read that instead.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            raise FileExistsError(f"{folder / 'tokenizer.json'}: would hide what is to be saved; remove it first")
        special = {name: getattr(self, name) for name in _NAMED}
        config = special | {
            "add_bos_token": self.add_bos_token,
            "add_prefix_space": self.add_prefix_space,
            "added_tokens_decoder": {
                index: {flag: getattr(token, flag) for flag in ("content", *_FLAGS)}
                for index, token in self.backend.get_added_tokens_decoder().items()
            },
            "errors": "replace",
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "tokenizer_class": "GPT2Tokenizer",
            "truncation_side": self.truncation_side,
        }
        with tempfile.TemporaryDirectory() as made:
            texts = {Path(path).name: Path(path).read_text(encoding="utf-8") for path in self.backend.model.save(made)}
        texts["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        texts["special_tokens_map.json"] = json.dumps(special, indent=2, ensure_ascii=False) + "\n"
        for name, text in texts.items():
            write_atomically(folder / name, text)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, without those added to it, which `len(tokenizer)` counts too."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    @property
    def bos_token_id(self) -> int:
        """Id of the token in front of every text; OPT's is 2."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int:
        """Id of the token that ends a text; OPT's is 2."""
        return self._id(self.eos_token)

    @property
    def unk_token_id(self) -> int:
        """Id given for a token that is not in the vocabulary; OPT's is 2. Texts never need it."""
        return self._id(self.unk_token)

    @property
    def pad_token_id(self) -> int:
        """Id of the token that fills up short texts; OPT's is 1."""
        return self._id(self.pad_token)

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Ids and attention mask of a text or a list of texts, each followed by its `text_pair` if there is one.

        A str gives flat lists, or with `return_tensors` a batch of one. `add_special_tokens` puts bos before each text
        and each pair. `padding` fills up to the longest (True, "longest") or to `max_length` ("max_length"), on
        `padding_side` or else the tokenizer's. `truncation` cuts to `max_length` tokens, bos included and kept, of a
        pair the longer text first; None cuts if `max_length` is given and `padding` is False. Without `max_length`
        `model_max_length` is taken, and where that too sets no limit nothing is cut or filled up to it.
        `return_tensors`: "np" or "pt" (int64), "tf" or "jax" (int32), or what another registered framework names.

        Raises TypeError for what is not text, ImportError for a missing framework, ValueError for unknown options,
        pairs that do not match, a `max_length` with no room for bos, and tensors of unequal rows.
        """
        if padding not in (False, True, "longest", "max_length"):
            raise ValueError(f"padding must be True, False, 'longest' or 'max_length', found {padding!r}")
        if truncation not in (None, False, True):
            raise ValueError(f"truncation must be True, False or None, found {truncation!r}")
        if return_tensors not in (None, "np") and return_tensors not in _frameworks():
            wanted = ", ".join(dict.fromkeys(["np", *_frameworks()]))
            raise ValueError(f"return_tensors must be one of {wanted}, found {return_tensors!r}")
        side = _side(self.padding_side if padding_side is None else padding_side)
        cut = truncation or (truncation is None and max_length is not None and padding is False)
        limit = self.model_max_length if max_length is None else max_length

        single = isinstance(text, str)
        if single and text_pair == "":
            text_pair = None  # as in transformers, which does so for a str only
        parts = [_texts(text)] if text_pair is None else [_texts(text), _texts(text_pair)]
        if text_pair is not None and (isinstance(text_pair, str) != single or len(parts[0]) != len(parts[1])):
            raise ValueError("text_pair must be a str if text is one, and else a list of as many texts")
        bos = [self.bos_token_id] if add_special_tokens and self.add_bos_token else []
        room = limit - len(bos) * len(parts)
        if cut and room < 0:
            raise ValueError(f"max_length {limit} leaves no room for {len(bos) * len(parts)} {self.bos_token}")

        rows: list[list[int]] = []
        # The library can cut and pad too, but only by changing the tokenizer, which other threads may be using.
        for encodings in zip(*(self.backend.encode_batch(p, add_special_tokens=False) for p in parts), strict=True):
            ids = [encoding.ids for encoding in encodings]
            if cut and sum(map(len, ids)) > room:
                ids = [self._cut(part, keep) for part, keep in zip(ids, _shares(ids, room), strict=True)]
            rows.append([index for part in ids for index in (*bos, *part)])
        masks = [[1] * len(row) for row in rows]

        if padding:
            width = limit if padding == "max_length" else max(map(len, rows), default=0)
            for values, value in ((rows, self.pad_token_id), (masks, 0)):
                for i, row in enumerate(values):
                    fill = [value] * (width - len(row) if width <= 1e20 else 0)
                    values[i] = row + fill if side == "right" else fill + row

        out = {"input_ids": rows, "attention_mask": masks} if return_attention_mask else {"input_ids": rows}
        if return_tensors:
            return BatchEncoding({key: _tensor(values, return_tensors) for key, values in out.items()})
        return BatchEncoding({key: values[0] if single else values for key, values in out.items()})

    def encode(self, text: str | Sequence[str], text_pair: str | Sequence[str] | None = None, **options: Any) -> Any:
        """`input_ids` alone of a call with the same arguments; of a str, a list[int]."""
        return self(text, text_pair, **options)["input_ids"]

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids: an int, a list, or an array of any framework.

        Bytes that are not UTF-8 become U+FFFD; ids past the vocabulary, such as OPT's unused rows 50265 to 50271,
        become nothing. Raises ValueError for a batch, OverflowError for negative ids.
        """
        ids = _plain(ids)
        ids = [ids] if isinstance(ids, int) else ids
        if any(isinstance(row, list) for row in ids):
            raise ValueError("decode takes one sequence of ids; batch_decode takes several")
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of each sequence in a list or an array. A flat sequence is a batch of one."""
        rows = _plain(sequences)
        if rows and isinstance(rows[0], int):
            rows = [rows]
        return [self.decode(row, skip_special_tokens) for row in rows]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text as the vocabulary spells them, without bos."""
        return self.backend.encode(text, add_special_tokens=False).tokens

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id (an int) of a token, or a list of those of several; `unk_token_id` for one not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self.backend.token_to_id(tokens)
        return self.unk_token_id if index is None else index

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token (a str) of an id, or a list of them for a sequence; None for an id outside the vocabulary."""
        ids = _plain(ids)
        return self.backend.id_to_token(ids) if isinstance(ids, int) else [self.backend.id_to_token(i) for i in ids]

    def _id(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:  # somebody has set, say, pad_token
            raise ValueError(f"{token!r} is not in the vocabulary")
        return index

    def _cut(self, ids: list[int], keep: int) -> list[int]:
        return ids[:keep] if self.truncation_side == "right" else ids[max(len(ids) - keep, 0) :]


def _side(side: str) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"a side of padding or truncation must be 'left' or 'right', found {side!r}")
    return side


def _texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        raise TypeError(f"wanted a str or a list of str, found {text!r:.80}")
    return list(texts)


def _shares(ids: list[list[int]], room: int) -> list[int]:
    """How many ids each of one or two texts may keep: the longer shrinks until both are equal, then both do."""
    if len(ids) == 1:
        return [room]
    short = min(len(ids[0]), len(ids[1]), room // 2)
    return [room - short, short] if len(ids[0]) > len(ids[1]) else [short, room - short]


def _tensor(rows: list[list[int]], kind: str) -> Any:
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(
            f"rows of {min(lengths)} to {max(lengths)} ids make no tensor: pass padding=True,"
            " and with padding='max_length' truncation=True too"
        )
    array = np.array(rows, dtype=np.int64).reshape(len(rows), max(lengths, default=0))
    if kind == "np":
        return array
    framework = _frameworks()[kind]
    try:
        return framework.tensor(array.astype(framework.ids))
    except ImportError as error:
        raise ImportError(f"return_tensors={kind!r} needs {framework.title}: {error}") from error


def _frameworks() -> dict[str, Framework]:
    """By what `return_tensors` calls them."""
    return {framework.tensors: framework for framework in registered().values()}


def _plain(ids: Any) -> Any:
    """Ids as Python ints, nested as they are: from numbers, arrays of any framework, and lists of these."""
    if isinstance(ids, list | tuple):
        return [_plain(part) for part in ids]
    if hasattr(ids, "numpy") and not hasattr(ids, "tolist"):  # TensorFlow's
        ids = ids.numpy()
    return ids.tolist() if hasattr(ids, "tolist") else ids


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"merges.txt is not UTF-8: {error}") from error
    merges = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            if not left or not right or " " in right:
                raise ValueError(f"line {number} of merges.txt is {line!r:.80}, wanted two tokens")
            merges.append((left, right))
    return merges


def _read_bpe(written: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in a tokenizer.json, if it splits texts as GPT-2 does."""
    model, splits = written["model"], written.get("pre_tokenizer") or {}
    if (model["type"], splits.get("type"), splits.get("use_regex", True)) != ("BPE", "ByteLevel", True):
        raise ValueError("tokenizer.json holds something else than GPT-2's byte-level BPE")
    if written.get("normalizer"):
        raise ValueError(f"tokenizer.json normalizes ({written['normalizer']}), which OPT does not")
    # A merge is one string in older files, two in newer.
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return model["vocab"], [(left, right) for left, right in pairs]


def _read_settings(saved: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """The constructor's keyword arguments from the JSON files in `saved`, and the ids that added tokens must get."""
    config, written = saved.get("tokenizer_config.json", {}), saved.get("tokenizer.json", {})
    if "added_tokens_decoder" in config:  # then special_tokens_map.json is for older readers
        listed = {int(index): token for index, token in config["added_tokens_decoder"].items()}
    else:
        config = config | saved.get("special_tokens_map.json", {})
        listed = {index: token for token, index in saved.get("added_tokens.json", {}).items()}
        listed |= {token["id"]: token for token in written.get("added_tokens", ())}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    extra = [*(config.get(name) for name in _NAMES), *(extra.values() if isinstance(extra, dict) else extra)]
    special = {token.content: token for token in (_token(value, True) for value in extra if value)}
    added = {index: _token(value, False) for index, value in sorted(listed.items())}
    for token in added.values():
        token.special = token.special or token.content in special
    ids = {token.content: index for index, token in added.items()}

    settings: dict[str, Any] = {name: _token(config[name], True).content for name in _NAMED if config.get(name)}
    settings["added_tokens"] = [*added.values(), *(token for text, token in special.items() if text not in ids)]
    if written and "add_bos_token" not in config:  # transformers 5 writes it in tokenizer.json alone
        after: dict[str, Any] = written.get("post_processor") or {"type": "ByteLevel"}
        around = [piece.get("SpecialToken", {}).get("id") for piece in after.get("single", [{}])]
        settings["add_bos_token"] = around == [settings.get("bos_token", "</s>"), None]
        if after["type"] not in ("ByteLevel", "TemplateProcessing") or len(around) != 1 + settings["add_bos_token"]:
            raise ValueError(f"tokenizer.json adds {around} to a text; wanted bos in front or nothing")
    if config.get("add_eos_token"):
        raise ValueError("add_eos_token is set, which OPT does not have")
    return settings | {name: config[name] for name in _SETTINGS if config.get(name) is not None}, ids


def _token(value: Any, special: bool) -> AddedToken:
    """From a file's string, or its object with "content" and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"a special token is {value!r}, wanted a string or an object with content")
    flags = {"special": special} | {flag: value[flag] for flag in _FLAGS if flag in value}
    return AddedToken(value["content"], **flags)
