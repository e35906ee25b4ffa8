"""OPT's hyper-parameters, named as in a Hub `config.json`, and the paper's sizes (arXiv:2205.01068, table 1)."""

from __future__ import annotations

import copy
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from .files import json_text, read_json, write_atomically
from .hub import FETCH_OPTIONS, fetch
from .kin import Kin
from .quantization import QuantizationConfig

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish", "tanh")
DTYPES = ("float16", "bfloat16", "float32", "float64")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
MAX_LABELS = 1_000_000

# layers, hidden, heads, ffn. 350m alone is post-norm with a 512-wide embedding (metaseq #383, #388).
SIZES: dict[str, dict[str, Any]] = {
    name: {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_dim": 4 * hidden}
    for name, layers, hidden, heads in [
        ("125m", 12, 768, 12),
        ("350m", 24, 1024, 16),
        ("1.3b", 24, 2048, 32),
        ("2.7b", 32, 2560, 32),
        ("6.7b", 32, 4096, 32),
        ("13b", 40, 5120, 40),
        ("30b", 48, 7168, 56),
        ("66b", 64, 9216, 72),
        ("175b", 96, 12288, 96),
    ]
}
SIZES["350m"] |= {"word_embed_proj_dim": 512, "do_layer_norm_before": False}

# Things a config.json can ask for that no OPT here does. Running such a model without them would answer wrongly.
_REFUSED = {
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}


# What transformers' config has besides OPT's own fields, by default.
_COMMON = {
    "architectures": None,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "transformers_version": None,
}
# Fields that are not OPT's shape: saved only where they are not the default.
_SETTINGS = ("problem_type", "output_attentions", "output_hidden_states", "return_dict")


def _name(dtype: Any) -> Any:
    """The name of a PyTorch dtype, whether it comes as one or as text; anything else as it is."""
    return str(dtype).removeprefix("torch.") if str(dtype).startswith("torch.") else dtype


@dataclass(init=False, unsafe_hash=True)  # hashed by value: Flax keeps it as the static part of a model
class OPTConfig(Kin):
    """The hyper-parameters of an OPT and the defaults of its calls. Takes the keys of a `config.json` as keywords.

    Attributes can be set, and are validated when set; models read them when they run. The defaults are opt-125m's.
    `word_embed_proj_dim` defaults to `hidden_size`; `dtype` is the name of the checkpoint's ("float16", "bfloat16",
    "float32", "float64") or None if it does not say. `use_cache`, `output_attentions`, `output_hidden_states` and
    `return_dict` are the defaults of a call's arguments of those names. `num_labels`, `id2label`, `label2id` and
    `problem_type` are OPTForSequenceClassification's: see its `labels`; as in transformers, a file gives num_labels as
    the length of `id2label`. `quantization_config` says which Linears are quantized. `unknown` holds keys that OPT has
    no use for (`prefix`, one of your own ...): they read as attributes, and saving writes them back.

    Raises ValueError, naming the field, for a value that no OPT can have, or a feature that is not implemented.
    """

    model_type: ClassVar[str] = "opt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {}

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2
    num_labels: int = 2
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    dtype: str | None = None
    quantization_config: QuantizationConfig | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)
    _attn_implementation: str = "sdpa"  # of the model that runs, not of the checkpoint: in no file

    def __init__(self, **values: Any) -> None:
        model_type = values.pop("model_type", "opt")
        if model_type != "opt":
            raise ValueError(f"model_type: found {reprlib.repr(model_type)}, wanted 'opt'")
        names = {f.name for f in fields(self)}
        unknown = dict(values.pop("unknown", None) or {})
        unknown |= {key: values.pop(key) for key in list(values) if key not in names and key != "torch_dtype"}
        for key, harmless in _REFUSED.items():
            if key in unknown and unknown[key] not in harmless:
                found = f"{key}: found {reprlib.repr(unknown[key])}"
                raise ValueError(f"{found}; OPT Zoo does not support this and will not ignore it")
        # transformers before 4.56 writes torch_dtype, later releases dtype
        torch_dtype = values.pop("torch_dtype", None)
        dtype = values.pop("dtype", None) or torch_dtype
        values["dtype"] = _name(dtype)
        quantization = values.get("quantization_config")
        if quantization is not None and not isinstance(quantization, QuantizationConfig):
            values["quantization_config"] = QuantizationConfig.from_dict(quantization)
        if "attn_implementation" in unknown:  # transformers' keyword
            values["_attn_implementation"] = unknown.pop("attn_implementation") or "sdpa"
        labels = unknown.get("id2label")
        if labels is not None:
            if not isinstance(labels, Mapping) or not labels:
                raise ValueError(f"id2label: found {reprlib.repr(labels)}, wanted an object of names by number")
            values["num_labels"] = len(labels)
        for f in fields(self):
            self.__dict__[f.name] = values.get(f.name, getattr(type(self), f.name, None))
        if self.word_embed_proj_dim is None:
            self.__dict__["word_embed_proj_dim"] = self.hidden_size
        if isinstance(self.eos_token_id, list):
            self.__dict__["eos_token_id"] = tuple(self.eos_token_id)
        self.__dict__["unknown"] = copy.deepcopy(unknown)
        self._validate()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        elif name not in self.__dict__:
            self.unknown[name] = value  # type: ignore[index]
        else:
            before = self.__dict__[name]
            self.__dict__[name] = tuple(value) if name == "eos_token_id" and isinstance(value, list) else value
            try:
                self._validate()
            except ValueError:
                self.__dict__[name] = before
                raise

    def __getattr__(self, name: str) -> Any:
        unknown = self.__dict__.get("unknown", {})
        if name in unknown or name in _COMMON:
            return unknown.get(name, _COMMON.get(name))
        raise AttributeError(f"OPTConfig has no attribute {name!r}")

    def __iter__(self) -> Iterator[str]:
        """The names of its values, so that `"use_cache" in config` asks for one."""
        return iter({**_COMMON, **self.to_dict(), "id2label": None, "label2id": None})

    def _validate(self) -> None:
        def check(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"OPTConfig.{name}: found {reprlib.repr(getattr(self, name))}, wanted {wanted}")

        def whole(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "bool":
                check(isinstance(value, bool), f.name, "true or false")
            elif f.type == "float":
                check(isinstance(value, (int, float)) and not isinstance(value, bool), f.name, "a number")
                limit = 0 <= value < (math.inf if f.name == "init_std" else 1)
                check(limit, f.name, "a number ≥ 0" if f.name == "init_std" else "a probability, 0 ≤ p < 1")
            elif f.name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                ids = value if isinstance(value, tuple) and f.name == "eos_token_id" else (value,)
                first = -1 if f.name == "pad_token_id" else 0  # -1: no token is padding, as some files write it
                known = all(i is None or (whole(i) and i in range(first, self.vocab_size)) for i in ids)
                check(known, f.name, f"a token id below vocab_size ({self.vocab_size}), or null")
            elif f.type in ("int", "int | None"):
                check(whole(value) and value > 0, f.name, "a whole number > 0")
        heads = self.num_attention_heads
        check(self.hidden_size % heads == 0, "hidden_size", f"a multiple of num_attention_heads ({heads})")
        check(self.activation_function in ACTIVATIONS, "activation_function", f"one of {', '.join(ACTIVATIONS)}")
        check(self.dtype in (None, *DTYPES), "dtype", f"one of {', '.join(DTYPES)}, or null")
        check(self.num_labels <= MAX_LABELS, "num_labels", f"at most {MAX_LABELS}")
        wanted = f"one of {', '.join(PROBLEM_TYPES)}, or null"
        check(self.problem_type in (None, *PROBLEM_TYPES), "problem_type", wanted)
        quantization = self.quantization_config
        check(quantization is None or isinstance(quantization, QuantizationConfig), "quantization_config", "none")

    @property
    def embed_dim(self) -> int:
        """Width of the token embedding and of the head: `word_embed_proj_dim`, never None."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def projects_embeddings(self) -> bool:
        """Whether `project_in` and `project_out` exist (350m)."""
        return self.embed_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether the decoder ends in a layer norm of its own. Checkpoints tuned before the norm was found missing
        (metaseq #164) say `_remove_final_layer_norm`."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-text ids as a tuple, empty if there is none."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each label; LABEL_0, LABEL_1 ... by default."""
        given = self.unknown.get("id2label") or {}
        named = {i: given.get(str(i), given.get(i)) for i in range(self.num_labels)}
        return {i: f"LABEL_{i}" if name is None else str(name) for i, name in named.items()}

    @id2label.setter
    def id2label(self, names: Mapping[int, str]) -> None:
        self.num_labels = len(names)
        self.unknown["id2label"] = {int(i): name for i, name in names.items()}  # type: ignore[index]

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each label by its name."""
        given = self.unknown.get("label2id")
        if given and len(given) == self.num_labels:
            return {str(name): int(i) for name, i in given.items()}
        return {name: i for i, name in self.id2label.items()}

    @label2id.setter
    def label2id(self, numbers: Mapping[str, int]) -> None:
        self.unknown["label2id"] = dict(numbers)  # type: ignore[index]

    @property
    def name_or_path(self) -> str:
        """The name or folder it was loaded from; empty for a new one."""
        return self.__dict__.get("_loaded_from", self.unknown.get("_name_or_path", ""))

    @name_or_path.setter
    def name_or_path(self, name: str) -> None:
        self.__dict__["_loaded_from"] = str(name)

    _name_or_path = name_or_path  # as TRL reads it

    @property
    def torch_dtype(self) -> Any:
        """`dtype`, as a torch.dtype if PyTorch is imported."""
        torch = sys.modules.get("torch")
        return self.dtype if self.dtype is None or torch is None else getattr(torch, self.dtype)

    @torch_dtype.setter
    def torch_dtype(self, dtype: Any) -> None:
        self.dtype = _name(dtype)

    @property
    def use_return_dict(self) -> bool:
        """transformers' other name for `return_dict`."""
        return self.return_dict

    @property
    def per_layer_config(self) -> list[OPTConfig]:
        """The config of each layer, which transformers' caches ask for: all the same."""
        return [self] * self.num_hidden_layers

    def get_text_config(self, *args: Any, **kwargs: Any) -> OPTConfig:
        """The config itself: OPT has only text. For code that also handles multimodal models."""
        return self

    def update(self, values: Mapping[str, Any]) -> None:
        """Set attributes by name."""
        for name, value in values.items():
            setattr(self, name, value)

    @classmethod
    def from_size(cls, size: str, **changes: Any) -> OPTConfig:
        """The config of a published size, "125m" to "175b", with any field changed by keyword."""
        if size not in SIZES:
            raise ValueError(f"size: found {size!r}, wanted one of {', '.join(SIZES)}")
        return cls(**(SIZES[size] | changes))

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], source: str = "config", return_unused_kwargs: bool = False, **changes: Any
    ) -> OPTConfig:
        """From the contents of a `config.json`, with `changes` by key. Errors begin with `source`, the name of where it
        came from. return_unused_kwargs: return the config and, left out of it, the changes to keys that it lacks.

        Raises ValueError for another model's config, a bad field, or a feature that is not implemented.
        """
        stored = {key: value for key, value in values.items() if key != "_attn_implementation"}  # of one that ran once
        try:
            config = cls(**stored)
            if not return_unused_kwargs:
                return config.changed(**changes) if changes else config
            used = {key for key in changes if key == "attn_implementation" or hasattr(config, key)}
            unused = {key: changes.pop(key) for key in changes.keys() - used}
            return config.changed(**changes), unused  # type: ignore[return-value]
        except RecursionError as error:
            raise ValueError(f"{source}: nested too deeply") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_json_file(cls, path: str | Path) -> OPTConfig:
        """From a `config.json` by its path."""
        return cls.from_dict(read_json(Path(path)), source=str(path))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | Any, **options: Any) -> OPTConfig:
        """From a folder with a `config.json`, "opt-demo", or a Hub name; or from transformers' config, an object with
        `to_dict`.

        options: what `opt_common.hub.fetch` takes (revision, cache_dir, token, local_files_only), config overrides,
            `num_labels=3`, `dropout=0.0`, and `from_dict`'s return_unused_kwargs.
        """
        source: Any = pretrained_model_name_or_path
        if hasattr(source, "to_dict"):
            return cls.from_dict(source.to_dict(), **options)
        path, options = _file(source, options)
        return cls.from_dict(read_json(path), source=str(path), **options)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | Path, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of the `config.json` that `from_pretrained` reads, and the options that are not the Hub's."""
        path, options = _file(pretrained_model_name_or_path, options)
        return read_json(path), options

    @classmethod
    def for_model(cls, model_type: str, **values: Any) -> OPTConfig:
        """From keywords alone. Raises ValueError if `model_type` is not "opt"."""
        return cls(model_type=model_type, **values)

    def changed(self, **changes: Any) -> OPTConfig:
        """A copy with keys of a `config.json` changed: `num_labels`, `id2label`, `dropout` ..."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"unknown": dict(self.unknown)}
        if "num_labels" in changes or "id2label" in changes:
            for key in ("id2label", "label2id"):
                values["unknown"].pop(key, None)
        if "dtype" in changes or "torch_dtype" in changes:
            values.pop("dtype")
        unknown = values.pop("unknown") | {key: value for key, value in changes.items() if key not in values}
        known = {key: value for key, value in changes.items() if key in values}
        config = OPTConfig(**(values | known), **unknown)
        config.name_or_path = self.name_or_path
        return config

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads, unknown keys included."""
        values: dict[str, Any] = {"architectures": ["OPTForCausalLM"], "model_type": "opt"} | dict(self.unknown)
        for f in fields(self):
            value = getattr(self, f.name)
            kept = f.name not in ("unknown", "dtype", "quantization_config", "num_labels", "_attn_implementation")
            if kept and (f.name not in _SETTINGS or value != f.default):
                values[f.name] = list(value) if isinstance(value, tuple) else value
        if self.num_labels != len(self.unknown.get("id2label") or (0, 1)):
            values["id2label"] = {str(i): name for i, name in self.id2label.items()}
            values["label2id"] = {name: i for i, name in self.id2label.items()}
        if self.quantization_config is not None:
            values["quantization_config"] = self.quantization_config.to_dict()
        if self.dtype is not None:
            values["torch_dtype"] = self.dtype  # every release of transformers reads this spelling
        return dict(sorted(values.items()))

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict`: it holds no defaults that transformers adds."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """transformers' name for `to_json`."""
        return self.to_json()

    def to_json_file(self, path: str | Path, use_diff: bool = True) -> None:
        """Write `to_json` to a file, whole or not at all."""
        write_atomically(Path(path), self.to_json())

    def to_json(self) -> str:
        """`to_dict` as the text of a `config.json`."""
        return json_text(self.to_dict()) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/config.json`, whole or not at all."""
        write_atomically(Path(folder) / "config.json", self.to_json())


def _file(name: str | Path, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The path of a `config.json`, and the options that are not the Hub's."""
    hub = {key: value for key, value in options.items() if key in FETCH_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in FETCH_OPTIONS}
    return fetch(name, ["config.json"], **hub) / "config.json", rest
