"""The files of a tokenizer: from a folder to what makes a GPT2Tokenizer, and back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from ..files import read_json, read_text
from ..hub import TOKENIZER_FILES

# In the order in which transformers gives them ids if the vocabulary lacks them.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What else tokenizer_config.json and the keywords of from_pretrained may set.
SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "chat_template",
    "clean_up_tokenization_spaces",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_LONGEST = 1000  # characters of a special token; the library's automaton for them grows with every one
_ANY_BPE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take a tokenizer.json as it is


def read(folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The constructor's keyword arguments, and the ids that added tokens must get.

    Raises FileNotFoundError if there is no BPE, and ValueError, naming the files, if they hold none that fits here.
    """
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    try:
        saved = {name: read_json(folder / name) for name in found if name.endswith(".json")}
        if "model" not in saved.get("tokenizer.json", {"model": None}):
            del saved["tokenizer.json"]  # keras-hub's, which names no vocabulary
        if "tokenizer.json" not in saved and not {"vocab.json", "merges.txt"}.issubset(found):
            raise FileNotFoundError(f"{folder}: wanted vocab.json and merges.txt, or tokenizer.json; found {found}")
        settings, ids = _settings(saved)
        if "tokenizer.json" in saved:
            settings = _whole(read_text(folder / "tokenizer.json"), saved, settings)
        else:
            settings |= {"vocab": saved["vocab.json"], "merges": _merges(folder / "merges.txt")}
        if "chat_template.jinja" in found:
            settings["chat_template"] = read_text(folder / "chat_template.jinja")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: no tokenizer in {', '.join(found)}: {error}") from error
    return settings, ids


def vocabulary(backend: Tokenizer) -> dict[str, str]:
    """The text of vocab.json and of merges.txt."""
    with tempfile.TemporaryDirectory() as made:
        return {Path(path).name: Path(path).read_text(encoding="utf-8") for path in backend.model.save(made)}


def is_gpt2(backend: Tokenizer) -> bool:
    """Whether vocab.json and merges.txt say how this splits a text: as GPT-2 does."""
    splits = backend.pre_tokenizer
    return isinstance(splits, pre_tokenizers.ByteLevel) and splits.use_regex and backend.normalizer is None


def check_merges(vocab: Mapping[str, int], merges: Iterable[tuple[str, ...]]) -> None:
    """Raise ValueError for a pair that is none, or whose token the vocabulary lacks: the library may crash on one."""
    for pair in merges:
        lost = next((f"`{token}` out of vocabulary" for token in (*pair, "".join(pair)) if token not in vocab), None)
        if lost or len(pair) != 2:
            found = f"merges: found {' '.join(pair)!r:.80}, {lost or 'wanted two tokens'}"
            raise ValueError(f"vocab and merges make no BPE: {found:.200}")


@contextmanager
def library(what: str) -> Iterator[None]:
    """Turn errors of the tokenizers library into a ValueError: a bare Exception, or a panic, which is not even that."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {' '.join(str(error).split())[:400]}") from error


def flags(token: AddedToken) -> dict[str, Any]:
    """How tokenizer_config.json spells an added token."""
    return {flag: getattr(token, flag) for flag in ("content", *_FLAGS)}


def _whole(text: str, saved: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the tokenizer that a tokenizer.json describes whole, and what it says beside that."""
    model = saved["tokenizer.json"]["model"]
    if not isinstance(model, dict):
        raise ValueError(f"tokenizer.json: model: found {model!r:.80}, wanted an object")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model.get("merges") or ()]
    if not model.get("continuing_subword_prefix"):
        check_merges(model.get("vocab") or {}, pairs)
    with library("tokenizer.json is none of the tokenizers library"):
        backend = Tokenizer.from_str(text)
        for pair in (None, ""):  # a post-processor of unknown tokens panics only when it is used
            backend.encode("", pair)
    kind = saved.get("tokenizer_config.json", {}).get("tokenizer_class")
    splits = saved["tokenizer.json"].get("pre_tokenizer") or {}
    steps = {step.get("type") for step in splits.get("pretokenizers", [splits])}
    if not isinstance(backend.model, BPE) or "ByteLevel" not in steps:
        raise ValueError("tokenizer.json holds something other than a byte-level BPE")
    if kind not in _ANY_BPE and not is_gpt2(backend):
        # transformers' GPT2Tokenizer takes the vocabulary alone from such a file, and so gives other ids than the file
        raise ValueError(
            f"tokenizer.json holds something other than GPT-2's byte-level BPE, and tokenizer_class: found {kind!r},"
            f" wanted one of {', '.join(_ANY_BPE)}"
        )
    settings.pop("add_bos_token", None)  # the post-processor of tokenizer.json says it
    settings.pop("add_eos_token", None)
    defaults: dict[str, Any] = dict.fromkeys(NAMES) if kind in _ANY_BPE else {}
    if backend.padding is not None:
        defaults |= {"padding_side": backend.padding["direction"], "pad_token": backend.padding["pad_token"]}
    if backend.truncation is not None:
        defaults["truncation_side"] = backend.truncation["direction"]
    return defaults | settings | {"tokenizer_object": backend}


def _settings(saved: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, int]]:
    """What tokenizer_config.json and its older companions say, and the ids that added tokens must get."""
    config, written = saved.get("tokenizer_config.json", {}), saved.get("tokenizer.json", {})
    if "added_tokens_decoder" in config:  # then special_tokens_map.json is for older readers
        listed = {int(index): token for index, token in config["added_tokens_decoder"].items()}
    else:
        config = config | saved.get("special_tokens_map.json", {})
        listed = {index: token for token, index in saved.get("added_tokens.json", {}).items()}
        listed |= {token["id"]: token for token in written.get("added_tokens", ())}
    for token in written.get("added_tokens", ()):
        _token(token, False)  # the library takes these as they are
    settings = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    if isinstance(settings.get("chat_template"), list):  # several, each with its name
        settings["chat_template"] = {one["name"]: one["template"] for one in settings["chat_template"]}

    named = {name: _token(config[name], True) if config[name] else None for name in NAMES if name in config}
    own = {name: value for name, value in config.items() if name.endswith("_token") and name not in (*NAMES, *SETTINGS)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    own |= extra if isinstance(extra, dict) else {}
    own = {name: _token(value, True) for name, value in own.items() if value}
    extra = [] if isinstance(extra, dict) else [_token(value, True) for value in extra]
    special = {token.content for token in (*named.values(), *own.values(), *extra) if token is not None}
    added = {index: _token(value, False) for index, value in sorted(listed.items())}
    for token in added.values():
        token.special = token.special or token.content in special
    settings |= named | {"model_specific_special_tokens": own, "extra_special_tokens": extra}
    return settings | {"added_tokens": list(added.values())}, {token.content: i for i, token in added.items()}


def _token(value: Any, special: bool) -> AddedToken:
    """From a file's string, or its object with "content" and flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise ValueError(f"a special token is {value!r:.80}, wanted a string or an object with content")
    if len(content) > _LONGEST:
        found = f"{content[:20]!r}..., {len(content)} characters"
        raise ValueError(f"a special token is {found}, wanted at most {_LONGEST}")
    given = {flag: value[flag] for flag in _FLAGS if flag in value} if isinstance(value, dict) else {}
    return AddedToken(content, **({"special": special} | given))


def _merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line and not line.startswith("#version"):
            left, _, right = line.partition(" ")
            if not left or not right or " " in right:
                raise ValueError(f"line {number} of merges.txt is {line!r:.80}, wanted two tokens")
            merges.append((left, right))
    return merges
