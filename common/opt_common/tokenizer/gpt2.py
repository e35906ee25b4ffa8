"""OPT's tokenizer with the calls of transformers 5's GPT2Tokenizer.

The `tokenizers` library splits, merges, cuts and pads. This sets it up and gives its results transformers' form.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from ..files import write_atomically
from ..hub import TOKENIZER_FILES, fetch
from ..kin import Kin
from . import files
from .chat import render
from .encoding import BatchEncoding, check_tensors, tensors_of, to_lists
from .special import SpecialToken, SpecialTokenId
from .training import learn

_NO_LIMIT = int(1e30)  # what transformers writes for it; it takes anything above 1e20 as that
_CUTS = ("longest_first", "only_first", "only_second", "do_not_truncate")
_FILLS = ("longest", "max_length", "do_not_pad")
# Keywords of from_pretrained that scripts pass to transformers, and that change no id there either.
_IGNORED = frozenset(
    "config device_map do_lower_case dtype errors force_download from_slow legacy low_cpu_mem_usage proxies"
    " resume_download tokenizer_type torch_dtype trust_remote_code use_fast use_safetensors verbose".split()
)


class GPT2Tokenizer(Kin):
    """Text to ids and back.

    `vocab` maps tokens to ids, `merges` holds the pairs to merge, first to last; or `tokenizer_object` is a Tokenizer
    of the `tokenizers` library with both, which this takes over. Special and added tokens that the vocabulary lacks
    get the next free ids: first `added_tokens`, then the special ones. `extra_special_tokens` are a list of further
    ones, or a dict of attributes (`image_token`), which `model_specific_special_tokens` holds too.

    `add_bos_token` and `add_eos_token` put `bos_token` in front of every text and `eos_token` behind it; None means
    bos alone, as in OPT, or what `tokenizer_object` does. `add_prefix_space` puts a space in front.
    `split_special_tokens` reads special tokens in a text as plain text. `padding_side` and `truncation_side` are "left"
    or "right". `model_max_length` bounds a text where a call asks for a bound and names none. `chat_template` is a
    Jinja template, or a dict of several. The defaults are OPT's.

    Raises ValueError if `merges` do not fit `vocab`, and for an unknown side.
    """

    bos_token, bos_token_id = SpecialToken(), SpecialTokenId()
    eos_token, eos_token_id = SpecialToken(), SpecialTokenId()
    unk_token, unk_token_id = SpecialToken(), SpecialTokenId()
    sep_token, sep_token_id = SpecialToken(), SpecialTokenId()
    pad_token, pad_token_id = SpecialToken(), SpecialTokenId()
    cls_token, cls_token_id = SpecialToken(), SpecialTokenId()
    mask_token, mask_token_id = SpecialToken(), SpecialTokenId()

    SPECIAL_TOKENS_ATTRIBUTES: Sequence[str] = list(files.NAMES)
    vocab_files_names = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    is_fast = True
    pad_token_type_id = 0

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        merges: Sequence[tuple[str, str]] | None = None,
        *,
        tokenizer_object: Tokenizer | None = None,
        bos_token: str | AddedToken | None = "</s>",
        eos_token: str | AddedToken | None = "</s>",
        unk_token: str | AddedToken | None = "</s>",
        sep_token: str | AddedToken | None = None,
        pad_token: str | AddedToken | None = "<pad>",
        cls_token: str | AddedToken | None = None,
        mask_token: str | AddedToken | None = None,
        extra_special_tokens: Sequence[str | AddedToken] | Mapping[str, str | AddedToken] = (),
        model_specific_special_tokens: Mapping[str, str | AddedToken] | None = None,
        added_tokens: Sequence[AddedToken] = (),
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        add_prefix_space: bool | None = None,
        split_special_tokens: bool = False,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int = _NO_LIMIT,
        model_input_names: Sequence[str] = ("input_ids", "attention_mask"),
        clean_up_tokenization_spaces: bool = False,
        chat_template: str | dict[str, str] | None = None,
        name_or_path: str = "",
    ) -> None:
        if tokenizer_object is None:
            vocab, merges = vocab or {}, list(merges or ())
            files.check_merges(vocab, merges)
            with files.library("vocab and merges make no BPE"):
                self._tokenizer = Tokenizer(BPE(vocab, merges))
            self._tokenizer.decoder = decoders.ByteLevel()
            self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(add_prefix_space))
        else:
            self._tokenizer = tokenizer_object
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            splits = self._tokenizer.pre_tokenizer
            if isinstance(splits, pre_tokenizers.ByteLevel) and add_prefix_space is not None:
                splits.add_prefix_space = add_prefix_space
        self.add_prefix_space = getattr(self._tokenizer.pre_tokenizer, "add_prefix_space", bool(add_prefix_space))
        self._tokenizer.encode_special_tokens = self.split_special_tokens = split_special_tokens

        given = (bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token)
        named = dict(zip(files.NAMES, given, strict=True)) | dict(model_specific_special_tokens or {})
        if isinstance(extra_special_tokens, Mapping):
            named |= extra_special_tokens
            extra_special_tokens = ()
        special = [token for token in (*named.values(), *extra_special_tokens) if token is not None]
        known = {token.content: token for token in added_tokens}  # with flags that a mere str would reset
        self._tokenizer.add_tokens(list(added_tokens))
        self._tokenizer.add_special_tokens([known.get(str(token), token) for token in special])
        self._named = {name: None if token is None else str(token) for name, token in named.items()}
        self.extra_special_tokens = [str(token) for token in extra_special_tokens]
        self.SPECIAL_TOKENS_ATTRIBUTES = list(named)
        for name in named.keys() - set(files.NAMES):  # such as image_token
            setattr(self, name, self._named[name])
            setattr(self, f"{name}_id", self._tokenizer.token_to_id(str(named[name])))
        if tokenizer_object is None:
            self._put_around(bos=True, eos=False)
        if add_bos_token is not None:
            self.add_bos_token = add_bos_token
        if add_eos_token is not None:
            self.add_eos_token = add_eos_token

        self.padding_side = _side("padding_side", padding_side)
        self.truncation_side = _side("truncation_side", truncation_side)
        self.model_max_length = int(model_max_length)
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.chat_template = chat_template
        self.name_or_path = name_or_path
        self.deprecation_warnings: dict[str, bool] = {}  # transformers' collators write to it

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        subfolder: str | None = None,
        **settings: Any,
    ) -> GPT2Tokenizer:
        """The tokenizer in a folder or in a Hub repository, or in their `subfolder`.

        The tokenizer is read from tokenizer.json, or else from vocab.json and merges.txt; what no file says is as in
        OPT. `revision`, `cache_dir`, `token` and `local_files_only` are huggingface_hub's. `settings` are the
        constructor's keywords from `bos_token` on and win over the files; None says nothing. Keywords of transformers
        that change no id, such as `use_fast`, are ignored.
        Raises FileNotFoundError if there is no BPE, ValueError, naming the files, if they hold none that fits here, and
        TypeError for an unknown keyword.
        """
        settings = {name: value for name, value in settings.items() if value is not None and name not in _IGNORED}
        for old, new in (("max_len", "model_max_length"), ("additional_special_tokens", "extra_special_tokens")):
            if old in settings:
                settings.setdefault(new, settings.pop(old))
        own = {name: value for name, value in settings.items() if name.endswith("_token")}
        own = {name: own[name] for name in own.keys() - {*files.NAMES, *files.SETTINGS}}
        unknown = settings.keys() - own.keys() - {*files.NAMES, *files.SETTINGS, "extra_special_tokens"}
        if unknown:
            raise TypeError(f"from_pretrained: found {', '.join(sorted(unknown))}, wanted keywords of {cls.__name__}")

        folder = fetch(
            pretrained_model_name_or_path,
            [str(Path(subfolder or "", name)) for name in TOKENIZER_FILES],
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        folder = folder / (subfolder or "")
        saved, ids = files.read(folder)
        saved["model_specific_special_tokens"] |= own
        settings = saved | {name: value for name, value in settings.items() if name not in own}
        try:
            tokenizer = cls(**settings, name_or_path=str(pretrained_model_name_or_path))
            for text, index in ids.items():
                if (found := tokenizer._tokenizer.token_to_id(text)) != index:
                    raise ValueError(f"{text!r} should be {index}, but the files make it {found}")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            names = ", ".join(name for name in TOKENIZER_FILES if (folder / name).is_file())
            raise ValueError(f"{folder}: no tokenizer in {names}: {error}") from error
        return tokenizer

    def save_pretrained(
        self, save_directory: str | Path, legacy_format: bool | None = None, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write tokenizer.json and tokenizer_config.json, for this and transformers; return the paths of all files.

        Beside them go special_tokens_map.json and, where they say everything, vocab.json and merges.txt, for older
        readers, whatever `legacy_format` is. `filename_prefix` and a hyphen precede each name.
        """
        gpt2 = files.is_gpt2(self._tokenizer)
        settings = self._settings()
        if isinstance(self.chat_template, dict):
            settings["chat_template"] = [{"name": k, "template": v} for k, v in self.chat_template.items()]
        config = {name: value for name, value in settings.items() if value is not None} | self._named
        config["added_tokens_decoder"] = {
            index: files.flags(token) for index, token in self.added_tokens_decoder.items()
        }
        config["errors"] = "replace"
        config["tokenizer_class"] = "GPT2Tokenizer" if gpt2 else "PreTrainedTokenizerFast"
        special: dict[str, Any] = dict(self.special_tokens_map)
        if self.extra_special_tokens:
            config["extra_special_tokens"] = special["additional_special_tokens"] = self.extra_special_tokens
        texts = files.vocabulary(self._tokenizer) if gpt2 else {}
        texts["tokenizer.json"] = self._tokenizer.to_str(pretty=True)
        texts["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        texts["special_tokens_map.json"] = json.dumps(special, indent=2, ensure_ascii=False) + "\n"
        return _write(save_directory, texts, filename_prefix)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write vocab.json, with merges.txt beside it; return the path of the first alone, as transformers 5 does."""
        written = _write(save_directory, files.vocabulary(self._tokenizer), filename_prefix)
        return tuple(path for path in written if path.endswith("vocab.json"))

    def train_new_from_iterator(
        self,
        text_iterator: Iterable[str] | Iterable[Sequence[str]],
        vocab_size: int,
        length: int | None = None,
        new_special_tokens: Sequence[str | AddedToken] | None = None,
        special_tokens_map: Mapping[str, str] | None = None,
        **options: Any,
    ) -> GPT2Tokenizer:
        """A tokenizer with these settings and special tokens, and a vocabulary learnt from texts or batches of texts.

        `vocab_size` bounds the vocabulary, `length` is how many texts there are, for the progress bar.
        `new_special_tokens` are added, `special_tokens_map` renames old ones. `options` are those of
        `tokenizers.trainers.BpeTrainer`.
        """
        renamed = special_tokens_map or {}
        new = list(new_special_tokens or ())
        learnt = learn(self._tokenizer, text_iterator, vocab_size, length, new, renamed, options)
        settings = self._settings()
        del settings["add_bos_token"], settings["add_eos_token"]  # the post-processor's business
        names: dict[str, Any] = {name: renamed.get(token, token) for name, token in self._named.items() if token}
        own = {name: names.pop(name) for name in names.keys() - set(files.NAMES)}
        names = dict.fromkeys(files.NAMES) | names
        extra = [renamed.get(token, token) for token in self.extra_special_tokens] + new
        return type(self)(
            tokenizer_object=learnt, **settings, **names, model_specific_special_tokens=own, extra_special_tokens=extra
        )

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size},"
            f" model_max_length={self.model_max_length}, padding_side={self.padding_side!r},"
            f" truncation_side={self.truncation_side!r}, special_tokens={self.special_tokens_map},"
            f" added_tokens_decoder={self.added_tokens_decoder})"
        )

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The `tokenizers.Tokenizer` that does the work."""
        return self._tokenizer

    @property
    def decoder(self) -> decoders.Decoder:
        """What joins tokens to text."""
        return self._tokenizer.decoder

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary, without added ones; `len(tokenizer)` counts those too."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return self._tokenizer.get_vocab()

    @property
    def vocab(self) -> dict[str, int]:
        """Every token, added ones too, and its id."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added and special tokens by their ids, in ascending order."""
        return dict(sorted(self._tokenizer.get_added_tokens_decoder().items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the added and special tokens."""
        return {token.content: index for index, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the added and special tokens."""
        return self.added_tokens_encoder

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add one token or several, which no text is split within; return how many were new.

        `special_tokens=True` lets `decode` skip them. The model's embedding then needs
        `resize_token_embeddings(len(tokenizer))`.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        return (self._tokenizer.add_special_tokens if special_tokens else self._tokenizer.add_tokens)(tokens)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Set special tokens by their names (`pad_token`), add those that are new, and return how many were.

        `extra_special_tokens` (`additional_special_tokens` of old) takes a list, which replaces the one before it, or
        with `replace_extra_special_tokens=False` goes behind it. Raises ValueError for other names and other values.
        """
        named, extra = dict(special_tokens_dict), []
        for name in ("additional_special_tokens", "extra_special_tokens"):
            extra = named.pop(name, extra)
        if not isinstance(extra, list | tuple):
            raise ValueError(f"extra_special_tokens: found {extra!r}, wanted a list of tokens")
        for name, token in (*named.items(), *(("extra_special_tokens", token) for token in extra)):
            if name not in (*files.NAMES, "extra_special_tokens"):
                raise ValueError(f"special_tokens_dict: found {name!r}, wanted one of {', '.join(files.NAMES)}")
            if not isinstance(token, str | AddedToken):
                raise ValueError(f"{name}: found {token!r}, wanted a str or an AddedToken")
        before = [] if replace_extra_special_tokens and extra else self.extra_special_tokens
        self.extra_special_tokens = list(dict.fromkeys([*before, *map(str, extra)]))
        added = self.add_tokens([*named.values(), *extra], special_tokens=True)
        self._named |= {name: str(token) for name, token in named.items()}
        return added

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have names, by name."""
        return {name: token for name, token in self._named.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once: those with names, then `extra_special_tokens`."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        """The ids of `extra_special_tokens`."""
        return self.convert_tokens_to_ids(self.extra_special_tokens)

    @property
    def add_bos_token(self) -> bool:
        """Whether `bos_token` goes in front of every text; setting it takes the `bos_token` of that moment."""
        return bool(self._tokenizer.encode("a").special_tokens_mask[0])

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._put_around(value, self.add_eos_token)

    @property
    def add_eos_token(self) -> bool:
        """Whether `eos_token` goes behind every text; setting it takes the `eos_token` of that moment."""
        return bool(self._tokenizer.encode("a").special_tokens_mask[-1])

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._put_around(self.add_bos_token, value)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens a call adds to a text, or to a text and its pair."""
        return self._tokenizer.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens of a text fit into `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """How many tokens of a text and its pair fit into `model_max_length`."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def get_special_tokens_mask(
        self, token_ids_0: Any, token_ids_1: Any = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for each special token of a row of ids, 0 for the others.

        As in transformers, only for rows that a call made (`already_has_special_tokens=True`), else ValueError.
        """
        if token_ids_1 is not None or not already_has_special_tokens:
            raise ValueError("get_special_tokens_mask: wanted one row of ids and already_has_special_tokens=True")
        special = set(self.all_special_ids)
        return [int(index in special) for index in to_lists(token_ids_0)]

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        **options: Any,
    ) -> BatchEncoding:
        """Ids and attention mask of a text or a list of texts, each followed by its `text_pair` if there is one.

        A str gives flat lists, or with `return_tensors` a batch of one. A list may hold tuples of a text and its pair.
        `text_target` becomes `labels`, or with no `text` the result. The options are keywords:

        add_special_tokens: put bos before each text and each pair, as the tokenizer is set to; True.
        padding: fill up to the longest row (True, "longest") or to `max_length` ("max_length"); False.
        truncation: cut to `max_length` tokens, special ones included and kept: of a pair the longer text first (True,
            "longest_first"), "only_first" or "only_second". None cuts so if `max_length` is given and `padding` is
            False; False never cuts.
        max_length: without it `model_max_length` is taken, and where that too sets no limit nothing is cut or filled.
        stride: tokens that each overflowing row repeats of the one before; 0.
        is_split_into_words: the text is a list of words, a batch a list of such lists.
        pad_to_multiple_of: fill up to a multiple of this.
        padding_side: "left" or "right" in place of the tokenizer's.
        return_tensors: "np" or "pt" (int64), "tf" or "jax" (int32), or what another registered framework names.
        return_token_type_ids, return_attention_mask: as in `model_input_names` if None.
        return_overflowing_tokens: what was cut follows in rows of its own; `overflow_to_sample_mapping` says whose.
        return_special_tokens_mask, return_offsets_mapping, return_length: that too.
        split_special_tokens: read special tokens in the text as plain text, in place of the tokenizer's setting.
        add_prefix_space, verbose: ignored, as in transformers 5.

        Raises TypeError for what is not text and for an unknown option, ImportError for a missing framework, ValueError
        for unknown values of options, pairs that do not match, a `max_length` with no room for the special tokens or
        for `stride`, a text too short for "only_first" or "only_second", and tensors of unequal rows.
        """
        if text is None:
            text, text_pair, text_target = text_target, text_pair_target, None
        encoding = self._encode(text, text_pair, **options)
        if text_target is not None:
            encoding["labels"] = self._encode(text_target, text_pair_target, **options)["input_ids"]
        return encoding

    def _encode(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        add_prefix_space: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        kind = check_tensors(return_tensors)
        fill, cut, limit = self._limits(padding, truncation, max_length, pad_to_multiple_of)
        if add_prefix_space not in (None, self.add_prefix_space):
            warnings.warn("add_prefix_space: changes nothing in a call; from_pretrained takes it", stacklevel=3)
        batched = isinstance(text, list | tuple)
        if is_split_into_words:
            batched = batched and len(text) > 0 and isinstance(text[0], list | tuple)
            alike = True
        else:
            alike = text_pair is None or isinstance(text_pair, str) != batched
        if not alike or (batched and text_pair is not None and len(text_pair) != len(text)):
            raise ValueError("text_pair: wanted a str if text is one, and else a list of as many texts")
        if not batched:
            rows = [(text, text_pair)] if text_pair else [text]
        else:
            rows = list(text) if text_pair is None else list(zip(text, text_pair, strict=True))

        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        backend = self._tokenizer
        if fill or cut or split != backend.encode_special_tokens:
            backend = self._view()
            backend.encode_special_tokens = split
        if cut and limit is not None:
            first = rows[0] if rows else ""
            if is_split_into_words and first:
                first = first[0]
            added = self.num_special_tokens_to_add(pair=isinstance(first, list | tuple)) if add_special_tokens else 0
            if limit < added:
                raise ValueError(f"max_length {limit} leaves no room for {added} {self.bos_token}")
            backend.enable_truncation(limit, stride=stride, strategy=cut, direction=self.truncation_side)
        if fill:
            backend.enable_padding(
                direction=_side("padding_side", padding_side or self.padding_side),
                pad_id=self.pad_token_id,
                pad_token=self.pad_token,
                length=limit if fill == "max_length" else None,
                pad_to_multiple_of=pad_to_multiple_of,
            )
        try:
            found = backend.encode_batch(
                rows, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            wanted = "a list of words or of lists of words" if is_split_into_words else "a str or a list of str"
            raise TypeError(f"text: wanted {wanted}, found {text!r:.80}") from error
        except BaseException as error:  # the library raises a bare Exception, and panics if stride is too long
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"truncation={cut!r}, max_length={limit}, stride={stride}: {error}") from error

        pieces = [[one, *one.overflowing] if return_overflowing_tokens else [one] for one in found]
        encodings = [one for piece in pieces for one in piece]
        data: dict[str, Any] = {"input_ids": [one.ids for one in encodings]}
        if self._returns("token_type_ids", return_token_type_ids):
            data["token_type_ids"] = [one.type_ids for one in encodings]
        if self._returns("attention_mask", return_attention_mask):
            data["attention_mask"] = [one.attention_mask for one in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [one.special_tokens_mask for one in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [one.offsets for one in encodings]
        if return_length:
            data["length"] = [len(one) for one in encodings]
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = [i for i, piece in enumerate(pieces) for _ in piece]
        elif not batched and kind is None:
            data = {name: value[0] if isinstance(value[0], list) else value for name, value in data.items()}
        if kind and not encodings:
            data = {name: np.zeros((0, 0), np.int64) for name in data}
        return BatchEncoding(data, encodings, kind)

    def encode(self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any) -> Any:
        """`input_ids` alone of a call with the same arguments; of a str, a list[int]."""
        return self._encode(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def tokenize(self, text: Any, pair: Any = None, add_special_tokens: bool = False, **options: Any) -> list[str]:
        """The tokens of a text, and of its pair, as the vocabulary spells them.

        The options are those of a call, but as in transformers 5 `padding`, `truncation` and `max_length` do nothing.
        """
        for name in ("padding", "truncation", "max_length"):
            options.pop(name, None)
        return self._encode(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Rows of equal length from encoded ones: a mapping of names to one row or to several, or a list of mappings.

        Fills `input_ids`, `attention_mask` (made if it is not there), `token_type_ids` and `special_tokens_mask`, and
        passes all else on. The options are those of a call. Tensors come back as such if `return_tensors` is None.
        Raises ValueError for unknown values of options, missing `input_ids` and columns of unequal length.
        """
        columns: Any = encoded_inputs
        if isinstance(encoded_inputs, list | tuple) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            columns = {name: [one[name] for one in encoded_inputs] for name in encoded_inputs[0]}
        main = self.model_input_names[0]
        if main not in columns:
            raise ValueError(f"encoded_inputs: found {', '.join(columns)}, wanted {main}")
        given = columns[main]
        kind = check_tensors(return_tensors)
        if kind is None and len(given):
            kind = tensors_of(given) or tensors_of(given[0])
        data = {name: to_lists(value) for name, value in columns.items()}
        if not data[main]:
            return BatchEncoding(data | ({"attention_mask": []} if return_attention_mask else {}))

        fill, _, limit = self._limits(padding, False, max_length, None)
        single = not isinstance(data[main][0], list)
        if single:
            data = {name: [value] for name, value in data.items()}
        rows = data[main]
        for name, column in data.items():
            if len(column) != len(rows):
                raise ValueError(f"{name}: found {len(column)} rows, wanted {len(rows)} as in {main}")
        masks = self._returns("attention_mask", return_attention_mask)
        if masks:
            data.setdefault("attention_mask", [[1] * len(row) for row in rows])
        if fill:
            width = limit if fill == "max_length" and limit is not None else max(map(len, rows))
            width += -width % (pad_to_multiple_of or 1)
            left = _side("padding_side", padding_side or self.padding_side) == "left"
            missing = [width - len(row) for row in rows]
            values = {main: self.pad_token_id, "token_type_ids": self.pad_token_type_id, "special_tokens_mask": 1}
            if masks:
                values["attention_mask"] = 0
            for name in values.keys() & data.keys():
                fillers = [[values[name]] * gap for gap in missing]
                both = zip(fillers, data[name], strict=True) if left else zip(data[name], fillers, strict=True)
                data[name] = [first + second for first, second in both]
        if single:
            data = {name: value[0] for name, value in data.items()}
        return BatchEncoding(data, tensor_type=kind)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> Any:
        """The text of one sequence of ids (an int, a list, an array of any framework), a list of them for several.

        Bytes that are not UTF-8 become U+FFFD; ids past the vocabulary, such as OPT's unused rows 50265 to 50271,
        become nothing. `clean_up_tokenization_spaces` and `spaces_between_special_tokens` are ignored, as transformers
        ignores them for a BPE. Raises OverflowError for negative ids.
        """
        ids = to_lists(token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens) for row in ids]
        return self._tokenizer.decode([ids] if isinstance(ids, int) else ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
    ) -> list[str]:
        """The texts of several sequences of ids; see `decode`."""
        sequences = to_lists(sequences["input_ids"] if isinstance(sequences, Mapping) else sequences)
        text = self.decode(sequences, skip_special_tokens) if sequences else []
        return [text] if isinstance(text, str) else text

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id (an int) of a token, or a list of those of several; `unk_token_id` for one not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        index = self._tokenizer.token_to_id(tokens)
        return self.unk_token_id if index is None and tokens != self.unk_token else index

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token (a str) of an id, or a list of them for a sequence; None for an id outside the vocabulary."""
        ids = to_lists(ids)
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._tokenizer.id_to_token(index) for index in to_lists(list(ids)) if index not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens as the vocabulary spells them."""
        return self._tokenizer.decoder.decode(list(tokens))

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """The ids of a conversation (a list of messages with `role` and `content`) or of several.

        `chat_template` is a Jinja template, or the name of one of this tokenizer's, in place of its default. The
        template sees `messages`, `tools`, `documents`, `add_generation_prompt`, the special tokens and `variables`.
        `continue_final_message` leaves out what the template puts after the last message. The result is a
        BatchEncoding, the ids alone with `return_dict=False`, or the text with `tokenize=False`. The other options, and
        `tokenizer_kwargs`, are those of a call; the template itself puts the special tokens.
        Raises ImportError without jinja2, ValueError without a template, for an empty conversation, for tools that are
        not JSON schemas, and for transformers' `return_assistant_tokens_mask` and `sanitize_control_tokens`.
        """
        for name in ("return_assistant_tokens_mask", "sanitize_control_tokens"):
            if variables.pop(name, False):
                raise ValueError(f"{name}: found True, wanted False: OPT's tokenizer does not do this")
        if not conversation:
            raise ValueError("conversation: found none, wanted at least one message")
        if not all(isinstance(tool, Mapping) for tool in tools or ()):
            raise ValueError(f"tools: found {tools!r:.80}, wanted JSON schemas")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message: found it with add_generation_prompt, wanted one of the two")
        template = self.get_chat_template(chat_template, tools)
        variables = self.special_tokens_map | {"tools": tools, "documents": documents} | variables
        variables["add_generation_prompt"] = add_generation_prompt
        batched = isinstance(conversation[0], list | tuple)
        chats = conversation if batched else [conversation]
        texts = [render(template, chat, continue_final_message, variables) for chat in chats]
        text = texts if batched else texts[0]
        if not tokenize:
            return text
        options = {"padding": padding, "truncation": truncation, "max_length": max_length}
        options |= {"return_tensors": return_tensors, "add_special_tokens": False} | dict(tokenizer_kwargs or {})
        encoding = self._encode(text, **options)
        return encoding if return_dict else encoding["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that `apply_chat_template` takes for these arguments. Raises ValueError if there is none."""
        own = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        name = "tool_use" if tools is not None and "tool_use" in own else "default"
        template = own.get(name) if chat_template is None else own.get(chat_template, chat_template)
        if template is None:
            raise ValueError("chat_template: found none, wanted one as the argument or as the tokenizer's attribute")
        return template

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """The keywords that make a tokenizer with these settings."""
        return self._named | self._settings() | {"name_or_path": self.name_or_path}

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in files.SETTINGS}

    def _returns(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _put_around(self, bos: bool, eos: bool) -> None:
        """Have the library put the special tokens around a text and around its pair."""
        before = [self.bos_token] if bos and self.bos_token is not None else []
        after = [self.eos_token] if eos and self.eos_token is not None else []
        single, pair = ([f"{piece}:{i}" for piece in (*before, text, *after)] for i, text in enumerate(("$A", "$B")))
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=single + pair,
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in {*before, *after}],
        )

    def _view(self) -> Tokenizer:
        """Another tokenizer over the same vocabulary, of which a call may set cutting and padding: those of
        `self._tokenizer` are every thread's."""
        view = Tokenizer(self._tokenizer.model)
        view.normalizer = self._tokenizer.normalizer
        view.pre_tokenizer = self._tokenizer.pre_tokenizer
        view.post_processor = self._tokenizer.post_processor
        view.add_tokens(list(self.added_tokens_decoder.values()))
        return view

    def _limits(
        self, padding: Any, truncation: Any, max_length: int | None, multiple: int | None
    ) -> tuple[str | None, str | None, int | None]:
        """How to fill ("longest", "max_length", None), how to cut (None or the library's strategy), and the length."""
        padding, truncation = (getattr(value, "value", value) for value in (padding, truncation))  # transformers' enums
        if padding not in (False, True, *_FILLS):
            raise ValueError(f"padding: found {padding!r}, wanted True, False or one of {', '.join(_FILLS)}")
        if truncation not in (None, False, True, *_CUTS):
            raise ValueError(f"truncation: found {truncation!r}, wanted True, False, None or one of {', '.join(_CUTS)}")
        if truncation is None:
            truncation = max_length is not None and padding is False
        fill = "longest" if padding is True else padding if padding and padding != "do_not_pad" else None
        cut = "longest_first" if truncation is True else truncation or None
        cut = None if cut == "do_not_truncate" else cut
        if max_length is None and self.model_max_length > 1e20:
            fill, cut = None if fill == "max_length" else fill, None
        elif max_length is None and (fill == "max_length" or cut):
            max_length = self.model_max_length
        if fill and self.pad_token_id is None:
            raise ValueError("padding: wanted a pad_token; set one, such as tokenizer.pad_token = tokenizer.eos_token")
        if fill and cut and multiple and max_length is not None and max_length % multiple:
            raise ValueError(f"max_length: found {max_length}, wanted a multiple of pad_to_multiple_of, {multiple}")
        return fill, cut, max_length


def _side(name: str, side: str) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"{name}: found {side!r}, wanted 'left' or 'right'")
    return side


def _write(folder: str | Path, texts: Mapping[str, str], prefix: str | None) -> tuple[str, ...]:
    """Write the files and return their paths."""
    paths = {name: Path(folder, f"{prefix}-{name}" if prefix else name) for name in texts}
    for name, text in texts.items():
        write_atomically(paths[name], text)
    return tuple(map(str, paths.values()))
