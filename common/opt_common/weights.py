"""The one table of OPT's tensors, as a function of the config.

Every framework's load, save, parameter count and shape check walk this table. Module paths are the checkpoint's in
every framework, so there is nothing to map but the last name of a parameter and whether a matrix is stored [in, out].

    V vocabulary   E embedding width   H hidden   F feed-forward   P positions + 2
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from .config import OPTConfig

Kind = Literal["embedding", "linear", "bias", "norm", "norm_bias"]
# The models, by transformers' names, and the module of each that comes after the decoder.
HEADS = {
    "OPTModel": None,
    "OPTForCausalLM": "lm_head",
    "OPTForSequenceClassification": "score",
    "OPTForQuestionAnswering": "qa_outputs",
}


@dataclass(frozen=True)
class Spec:
    """One tensor: the path of its module, what it is, and its shape in a checkpoint (matrices [out, in])."""

    path: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in a Hub checkpoint, e.g. `model.decoder.layers.0.fc1.weight`."""
        return f"{self.path}.{'bias' if self.kind in ('bias', 'norm_bias') else 'weight'}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """What a framework calls the parameters of a module, and whether its matrices are [in, out]."""

    embedding: str
    linear: str
    bias: str
    norm: str
    norm_bias: str
    transposed: bool

    def parameter(self, model: Any, spec: Spec) -> Any:
        """The framework's parameter for `spec`, found by walking `spec.path` from `model`."""
        parts = spec.path.split(".")
        module = functools.reduce(lambda m, p: m[int(p)] if p.isdigit() else getattr(m, p), parts, model)
        return getattr(module, getattr(self, spec.kind))


TORCH = Layout("weight", "weight", "bias", "weight", "bias", transposed=False)
KERAS = Layout("embeddings", "kernel", "bias", "gamma", "beta", transposed=True)
FLAX = Layout("embedding", "kernel", "bias", "scale", "bias", transposed=True)


def table(config: OPTConfig, architecture: str = "OPTForCausalLM") -> Iterator[Spec]:
    """Every tensor of an OPT, in the order of the model. `architecture` is one of HEADS, or a ValueError; the bare
    OPTModel's names do not begin with "model."."""
    if architecture not in HEADS:
        raise ValueError(f"architecture: found {architecture!r}, wanted one of {', '.join(HEADS)}")
    c, d = config, "decoder" if architecture == "OPTModel" else "model.decoder"
    V, E, H, F = c.vocab_size, c.embed_dim, c.hidden_size, c.ffn_dim

    def linear(path: str, out: int, into: int) -> Iterator[Spec]:
        yield Spec(path, "linear", (out, into))
        if c.enable_bias:
            yield Spec(path, "bias", (out,))

    def norm(path: str) -> Iterator[Spec]:
        if c.layer_norm_elementwise_affine:
            yield Spec(path, "norm", (H,))
            yield Spec(path, "norm_bias", (H,))

    yield Spec(f"{d}.embed_tokens", "embedding", (V, E))
    yield Spec(f"{d}.embed_positions", "embedding", (c.max_position_embeddings + 2, H))
    if c.projects_embeddings:
        yield Spec(f"{d}.project_in", "linear", (H, E))
        yield Spec(f"{d}.project_out", "linear", (E, H))
    for i in range(c.num_hidden_layers):
        layer = f"{d}.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{projection}", H, H)
        yield from norm(f"{layer}.self_attn_layer_norm")
        yield from linear(f"{layer}.fc1", F, H)
        yield from linear(f"{layer}.fc2", H, F)
        yield from norm(f"{layer}.final_layer_norm")
    if c.has_final_layer_norm:
        yield from norm(f"{d}.final_layer_norm")
    yield from head(config, architecture)


def head(config: OPTConfig, architecture: str) -> Iterator[Spec]:
    """The tensors that come after the decoder."""
    E = config.embed_dim
    if architecture == "OPTForCausalLM" and not config.tie_word_embeddings:
        yield Spec("lm_head", "linear", (config.vocab_size, E))
    if architecture == "OPTForSequenceClassification":
        yield Spec("score", "linear", (config.num_labels, E))
    if architecture == "OPTForQuestionAnswering":
        yield Spec("qa_outputs", "linear", (2, E))
        yield Spec("qa_outputs", "bias", (2,))


def parameter_count(config: OPTConfig) -> int:
    """How many numbers an OPTForCausalLM of this config holds; a tied head counts once."""
    return sum(spec.size for spec in table(config))


def byte_count(config: OPTConfig, dtype: str = "float16") -> int:
    """The bytes of its weights in `dtype`."""
    return parameter_count(config) * {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[dtype]


def is_head(name: str) -> bool:
    """Whether a name in a checkpoint is that of a head's tensor, any head's."""
    return name.split(".")[0] in HEADS.values()
