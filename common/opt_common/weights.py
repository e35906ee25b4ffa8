"""The one table of OPT's tensors, as a function of the config.

Loading, saving, counting parameters, checking shapes and sharding all walk this table, in every framework. Module paths
are the checkpoint's everywhere, so a framework differs only in the last part of a name and in the orientation of its
matrices: see `Naming`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal

import numpy as np

from .config import OPTConfig
from .quantization import Packing

Kind = Literal["embedding", "linear", "bias", "norm", "norm_bias", "packed", "scale", "shape"]
Axis = Literal["vocab", "embed", "hidden", "heads", "ffn", "labels"]
# The models, by transformers' names, and the module of each that comes after the decoder.
HEADS = {
    "OPTModel": None,
    "OPTForCausalLM": "lm_head",
    "OPTForSequenceClassification": "score",
    "OPTForQuestionAnswering": "qa_outputs",
}


@dataclass(frozen=True)
class Spec:
    """One tensor: the path of its module, what it is, its shape in a checkpoint (matrices [out, in]), and the name of
    each axis, None for positions. `packing` and the shape of the `matrix`, if it is a part of a quantized Linear."""

    path: str
    kind: Kind
    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    packing: Packing | None = None
    matrix: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Its name in a Hub checkpoint, e.g. `model.decoder.layers.0.fc1.weight`."""
        return TORCH.name(self)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def dtype(self, floats: str) -> str:
        """Its dtype in a model whose floating-point numbers are `floats`."""
        return {"packed": "int32", "shape": "int64"}.get(self.kind, floats)


@dataclass(frozen=True)
class Naming:
    """What a framework calls the parameters of a module, and whether its matrices are [in, out]."""

    embedding: str
    linear: str
    bias: str
    norm: str
    norm_bias: str
    transposed: bool
    # of a quantized Linear: the checkpoint's names and orientation everywhere
    packed: str = "weight_packed"
    scale: str = "weight_scale"
    shape: str = "weight_shape"

    def name(self, spec: Spec) -> str:
        """The parameter's full name, joined by dots."""
        return f"{spec.path}.{getattr(self, spec.kind)}"

    def parameter(self, model: Any, spec: Spec) -> Any:
        """The framework's parameter for `spec`, found by walking `spec.path` from `model`."""
        parts = spec.path.split(".")
        module = reduce(lambda m, p: m[int(p)] if p.isdigit() else getattr(m, p), parts, model)
        return getattr(module, getattr(self, spec.kind))

    def transposes(self, spec: Spec) -> bool:
        """Whether the framework stores this tensor transposed."""
        return self.transposed and spec.kind == "linear"

    def oriented(self, spec: Spec, array: np.ndarray) -> np.ndarray:
        """A view of the checkpoint's array in the framework's orientation, or the other way round."""
        return array.T if self.transposes(spec) else array


TORCH = Naming("weight", "weight", "bias", "weight", "bias", transposed=False)
KERAS = Naming("embeddings", "kernel", "bias", "gamma", "beta", transposed=True)
FLAX = Naming("embedding", "kernel", "bias", "scale", "bias", transposed=True)


def table(config: OPTConfig, architecture: str = "OPTForCausalLM") -> Iterator[Spec]:
    """Every tensor of an OPT, in the order of the model. `architecture` is one of HEADS, or a ValueError; the bare
    OPTModel's names do not begin with "model."."""
    if architecture not in HEADS:
        raise ValueError(f"architecture: found {architecture!r}, wanted one of {', '.join(HEADS)}")
    c, d, row = config, "decoder" if architecture == "OPTModel" else "model.decoder", partial(_row, config)

    def linear(path: str, out: Axis, into: Axis) -> Iterator[Spec]:
        yield from _matrix(config, row(path, "linear", out, into))
        if c.enable_bias:
            yield row(path, "bias", out)

    def norm(path: str) -> Iterator[Spec]:
        if c.layer_norm_elementwise_affine:
            yield row(path, "norm", "hidden")
            yield row(path, "norm_bias", "hidden")

    yield row(f"{d}.embed_tokens", "embedding", "vocab", "embed")
    yield row(f"{d}.embed_positions", "embedding", None, "hidden")
    if c.projects_embeddings:
        yield from _matrix(config, row(f"{d}.project_in", "linear", "hidden", "embed"))
        yield from _matrix(config, row(f"{d}.project_out", "linear", "embed", "hidden"))
    for i in range(c.num_hidden_layers):
        layer = f"{d}.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj"):
            yield from linear(f"{layer}.self_attn.{projection}", "heads", "hidden")
        yield from linear(f"{layer}.self_attn.out_proj", "hidden", "heads")
        yield from norm(f"{layer}.self_attn_layer_norm")
        yield from linear(f"{layer}.fc1", "ffn", "hidden")
        yield from linear(f"{layer}.fc2", "hidden", "ffn")
        yield from norm(f"{layer}.final_layer_norm")
    if c.has_final_layer_norm:
        yield from norm(f"{d}.final_layer_norm")
    yield from head(config, architecture)


def head(config: OPTConfig, architecture: str) -> Iterator[Spec]:
    """The tensors that come after the decoder."""
    if architecture == "OPTForCausalLM" and not config.tie_word_embeddings:
        yield _row(config, "lm_head", "linear", "vocab", "embed")
    if architecture == "OPTForSequenceClassification":
        yield _row(config, "score", "linear", "labels", "embed")
    if architecture == "OPTForQuestionAnswering":  # where an answer starts and ends
        yield Spec("qa_outputs", "linear", (2, config.embed_dim), ("labels", "embed"))
        yield Spec("qa_outputs", "bias", (2,), ("labels",))


def _row(config: OPTConfig, path: str, kind: Kind, *axes: Axis | None) -> Spec:
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.embed_dim,
        "hidden": config.hidden_size,
        "heads": config.hidden_size,  # of all heads together
        "ffn": config.ffn_dim,
        "labels": config.num_labels,
        None: config.max_position_embeddings + 2,
    }
    return Spec(path, kind, tuple(sizes[axis] for axis in axes), axes)


def _matrix(config: OPTConfig, spec: Spec) -> Iterator[Spec]:
    """The tensors that a Linear's matrix is stored in: itself or, quantized, three."""
    path = spec.path if spec.path.startswith("model.") else f"model.{spec.path}"
    packing = config.quantization_config and config.quantization_config.of(path)
    if packing is None:
        yield spec
        return
    (out, into), axes = spec.shape, spec.axes
    packing.check(spec.path, into)
    yield Spec(spec.path, "packed", (out, packing.columns(into)), axes, packing, spec.shape)
    yield Spec(spec.path, "scale", (out, packing.groups(into)), axes, packing, spec.shape)
    yield Spec(spec.path, "shape", (2,), (None,), packing, spec.shape)


def parameter_count(config: OPTConfig) -> int:
    """The number of parameters of an OPTForCausalLM with this config; a tied head counts once."""
    return sum(spec.size for spec in table(config.changed(quantization_config=None)))


def byte_count(config: OPTConfig, dtype: str = "float16") -> int:
    """The size in bytes of its weights in `dtype`."""
    sizes = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}
    return sum(spec.size * sizes[spec.dtype(dtype)] for spec in table(config))


def is_head(name: str) -> bool:
    """Whether a name in a checkpoint is that of a head's tensor, any head's."""
    return name.split(".")[0] in HEADS.values()
