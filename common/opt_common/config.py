"""OPT's hyper-parameters, named as in a Hub `config.json`, and the paper's sizes (arXiv:2205.01068, table 1)."""

from __future__ import annotations

import copy
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from .files import read_json, write_atomically
from .hub import fetch

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
    "quantization_config": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}


@dataclass(unsafe_hash=True)  # hashed by value: Flax keeps it as the static part of a model
class OPTConfig:
    """What an OPT is made of. Fields can be set and are validated when set; models read them when they run.

    The defaults are opt-125m's. `word_embed_proj_dim` defaults to `hidden_size`; `dtype` is the checkpoint's
    ("float16", "bfloat16", "float32", "float64") or None if it does not say. `unknown` holds the keys of a
    `config.json` that OPT has no use for (`prefix`, `activation_dropout` ...), so that saving gives them back.
    `num_labels` and `problem_type` are of OPTForSequenceClassification alone: see its `labels`. In a file `id2label`
    tells their number, as transformers has it.

    Raises ValueError, naming the field, for a value that cannot be an OPT.
    """

    model_type: ClassVar[str] = "opt"
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
    dtype: str | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict, hash=False)
    _attn_implementation: str = "sdpa"  # of the model that runs, not of the checkpoint: in no file

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size
        self.unknown = copy.deepcopy(dict(self.unknown))
        self._validate()
        self.__dict__["_complete"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get(name)
        self.__dict__[name] = tuple(value) if name == "eos_token_id" and isinstance(value, list) else value
        if "_complete" in self.__dict__:  # __init__ sets the fields one by one, and they are checked together
            try:
                self._validate()
            except ValueError:
                self.__dict__[name] = before
                raise

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
                known = all(i is None or (whole(i) and i in range(self.vocab_size)) for i in ids)
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

    @property
    def embed_dim(self) -> int:
        """Width of the token embedding and of the head: `word_embed_proj_dim`, never None."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def head_dim(self) -> int:
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
        """What each label is called: LABEL_0, LABEL_1 ... if the config does not say."""
        given = self.unknown.get("id2label") or {}
        named = {i: given.get(str(i), given.get(i)) for i in range(self.num_labels)}
        return {i: f"LABEL_{i}" if name is None else str(name) for i, name in named.items()}

    @classmethod
    def from_size(cls, size: str, **changes: Any) -> OPTConfig:
        """The config of a published size, "125m" to "175b", with any field changed by keyword."""
        if size not in SIZES:
            raise ValueError(f"size: found {size!r}, wanted one of {', '.join(SIZES)}")
        return cls(**(SIZES[size] | changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> OPTConfig:
        """From the contents of a `config.json`. Errors begin with `source`, the name of where it came from.

        Raises ValueError for another model's config, a bad field, or a feature that is not implemented.
        """
        values = dict(values)
        model_type = values.pop("model_type", "opt")
        if model_type != "opt":
            raise ValueError(f"{source}: model_type: found {reprlib.repr(model_type)}, wanted 'opt'")
        for key, harmless in _REFUSED.items():
            if key in values and values[key] not in harmless:
                found = f"{source}: {key}: found {reprlib.repr(values[key])}"
                raise ValueError(f"{found}; OPT Zoo cannot do this and will not ignore it")
        labels = values.get("id2label")
        if labels is not None:
            if not isinstance(labels, Mapping) or not labels:
                raise ValueError(
                    f"{source}: id2label: found {reprlib.repr(labels)}, wanted an object of names by number"
                )
            values["num_labels"] = len(labels)
        # transformers before 4.56 writes torch_dtype, later releases dtype
        torch_dtype = values.pop("torch_dtype", None)
        dtype = values.pop("dtype", None) or torch_dtype
        known = {f.name for f in fields(cls)} - {"unknown", "dtype", "_attn_implementation"}
        unknown = {key: value for key, value in values.items() if key not in known}
        if isinstance(dtype, str):
            dtype = dtype.removeprefix("torch.")
        try:
            return cls(**{k: v for k, v in values.items() if k in known}, dtype=dtype, unknown=unknown)
        except RecursionError as error:
            raise ValueError(f"{source}: nested too deeply") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path, **hub: Any) -> OPTConfig:
        """From a folder with a `config.json`, "opt-demo", or a Hub name. `hub`: see `opt_common.hub.fetch`."""
        path = fetch(path_or_name, ["config.json"], **hub) / "config.json"
        return cls.from_dict(read_json(path), source=str(path))

    def changed(self, **changes: Any) -> OPTConfig:
        """A copy with keys of a `config.json` changed: `num_labels`, `id2label`, `dropout` ..."""
        values = self.to_dict()
        if "num_labels" in changes or "id2label" in changes:
            values = {key: value for key, value in values.items() if key not in ("id2label", "label2id")}
        return OPTConfig.from_dict(values | changes)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers reads, unknown keys included."""
        values: dict[str, Any] = {"architectures": ["OPTForCausalLM"], "model_type": "opt"} | dict(self.unknown)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("unknown", "dtype", "num_labels", "problem_type", "_attn_implementation"):
                values[f.name] = list(value) if isinstance(value, tuple) else value
        if self.problem_type is not None:
            values["problem_type"] = self.problem_type
        if self.num_labels != len(self.unknown.get("id2label") or (0, 1)):
            values["id2label"] = {str(i): name for i, name in self.id2label.items()}
            values["label2id"] = {name: i for i, name in self.id2label.items()}
        if self.dtype is not None:
            values["torch_dtype"] = self.dtype  # every release of transformers reads this spelling
        return dict(sorted(values.items()))

    def to_json(self) -> str:
        """`to_dict` as the text of a `config.json`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder/config.json`, whole or not at all."""
        write_atomically(Path(folder) / "config.json", self.to_json())
