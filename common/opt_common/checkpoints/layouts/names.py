"""What transformers' TensorFlow and Flax classes call OPT's tensors; shared by every layout of theirs.

    model.decoder.layers.0.fc1.weight    the Hub
    model/decoder/layers.0/fc1/kernel:0  TensorFlow, after a scope such as `tfopt_for_causal_lm/`, which some files keep
    model.decoder.layers.0.fc1.kernel    Flax; msgpack nests it, its index joins it with "/"

All go by the rows of the one table in `weights.py`. `transposed` says that the matrix is stored [in, out].
"""

from __future__ import annotations

import re

from ...config import OPTConfig
from ...weights import FLAX, Layout, Spec, table

# Every kind of row once; the layers differ by their number only.
_ROWS = [
    *table(OPTConfig(num_hidden_layers=1, word_embed_proj_dim=1, tie_word_embeddings=False)),
    *table(OPTConfig(num_hidden_layers=1, word_embed_proj_dim=1), "OPTModel"),
]
_LAYER = re.compile(r"layers([./])(0|[1-9]\d{0,3})(?=[./])", re.ASCII)

# its Flax says what opt_flax says
_TF = Layout("embeddings", "kernel", "bias", "gamma", "beta", transposed=True)


def _tf(spec: Spec) -> str:
    # embed_tokens is a layer of transformers' own
    leaf = "weight" if spec.path.endswith("embed_tokens") else getattr(_TF, spec.kind)
    return f"{spec.path.replace('.', '/').replace('layers/', 'layers.')}/{leaf}:0"


def _flax(spec: Spec) -> str:
    return f"{spec.path}.{getattr(FLAX, spec.kind)}"


# transformers' TFOPTForCausalLM has no head of its own, and its bare TFOPTModel says "model/" too
_TO_TF = {s.name: (_tf(s), s.kind == "linear") for s in _ROWS if s.path.startswith("model.")}
_TO_FLAX = {s.name: (_flax(s), s.kind == "linear") for s in _ROWS}
_FROM_TF = {theirs: (name, transposed) for name, (theirs, transposed) in _TO_TF.items()}
_FROM_TF["model/decoder/embed_positions/weight:0"] = ("model.decoder.embed_positions.weight", False)  # files of 2022
_FROM_FLAX = {theirs: (name, transposed) for name, (theirs, transposed) in _TO_FLAX.items()}


def to_tf(name: str) -> tuple[str, bool]:
    """TensorFlow's name, without a scope, of the tensor that the Hub calls `name` (with or without `model.`), and
    whether it is stored transposed. ValueError if TensorFlow's OPT has no such tensor: a head of its own, for one."""
    full = name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
    found = _look_up(_TO_TF, full)
    if found is None:
        raise ValueError(f"{name}: transformers' TensorFlow OPT has no such tensor")
    return found


def from_tf(name: str) -> tuple[str, bool] | None:
    """The Hub's name of TensorFlow's `name`, with or without a scope, and whether it is stored transposed; or None."""
    return _look_up(_FROM_TF, re.sub(r"^[^/]+/(?=model/)", "", name))


def to_flax(name: str) -> tuple[str, bool]:
    """Flax's name, joined by dots, of the tensor that the Hub calls `name`, and whether it is stored transposed.
    Without `model.` it is FlaxOPTModel's. ValueError if Flax's OPT has no such tensor."""
    found = _look_up(_TO_FLAX, name)
    if found is None:
        raise ValueError(f"{name}: transformers' Flax OPT has no such tensor")
    return found


def from_flax(name: str) -> tuple[str, bool] | None:
    """The Hub's name of Flax's `name`, joined by dots, and whether it is stored transposed; or None."""
    return _look_up(_FROM_FLAX, name)


def _look_up(names: dict[str, tuple[str, bool]], name: str) -> tuple[str, bool] | None:
    number = _LAYER.search(name)
    found = names.get(_LAYER.sub(r"layers\g<1>0", name, count=1))
    if found is None or number is None:
        return found
    return _LAYER.sub(rf"layers\g<1>{number[2]}", found[0], count=1), found[1]
