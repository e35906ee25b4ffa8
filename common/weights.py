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
from typing import Any, Literal, Protocol

from .config import OPTConfig

Kind = Literal["embedding", "linear", "bias", "norm", "norm_bias"]
FLOATS = ("float16", "bfloat16", "float32", "float64")


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
FLAX = Layout("embedding", "kernel", "bias", "scale", "bias", transposed=False)


def table(config: OPTConfig, prefix: str = "model.") -> Iterator[Spec]:
    """Every tensor of an OPT, in the order of the model. `prefix` is "" for the bare OPTModel, which has no head."""
    c, d = config, f"{prefix}decoder"
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
    if prefix and not c.tie_word_embeddings:
        yield Spec("lm_head", "linear", (V, E))


def parameter_count(config: OPTConfig) -> int:
    """How many numbers an OPTForCausalLM of this config holds; a tied head counts once."""
    return sum(spec.size for spec in table(config))


def byte_count(config: OPTConfig, dtype: str = "float16") -> int:
    """The bytes of its weights in `dtype`."""
    return parameter_count(config) * {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[dtype]


class Stored(Protocol):
    """What `match` needs of a checkpoint: a mapping from names to entries with .shape and .dtype, and where it is."""

    path: Any

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> Any: ...
    def same(self, first: str, second: str) -> bool: ...


def match(checkpoint: Stored, config: OPTConfig) -> tuple[dict[str, str], bool]:
    """Where each tensor of the table lies in a checkpoint.

    Takes the Hub's two spellings, `model.decoder.` and `decoder.`, and a head that is present, absent or untied.
    Returns {name in the table: name in the checkpoint} and whether the head is tied. A checkpoint whose head differs
    from its embedding is untied whatever the config says, as in transformers 5.

    Raises ValueError that lists every missing, unexpected, repeated, misshapen or wrongly typed tensor by name.
    """
    names, tied, wrong = compare(checkpoint, config)
    if wrong:
        shown = "\n  ".join(wrong)
        raise ValueError(f"{checkpoint.path}: {len(wrong)} tensor(s) do not fit the config:\n  {shown}")
    return names, tied


def compare(checkpoint: Stored, config: OPTConfig) -> tuple[dict[str, str], bool, list[str]]:
    """As `match`, with what is wrong as a list of sentences; the names are those of the tensors that are there."""
    layers, tensors = config.num_hidden_layers, len(list(checkpoint))
    if layers > tensors:  # before a table of as many rows as somebody's config.json says is made
        return {}, config.tie_word_embeddings, [f"num_hidden_layers: found {layers}, but it holds {tensors} tensors"]
    found: dict[str, str] = {}
    wrong: list[str] = []
    for name in checkpoint:
        # "decoder.version" is metaseq's, and old conversions kept it
        plain = name.removeprefix("model.")
        if plain == "decoder.version":
            continue
        full = plain if plain.startswith("lm_head.") else f"model.{plain}"
        if full in found:
            wrong.append(f"{full}: stands there twice, as {found[full]} and {name}")
        found[full] = name

    head, embedding = found.pop("lm_head.weight", None), found.get("model.decoder.embed_tokens.weight")
    tied = config.tie_word_embeddings
    if tied and head is not None and embedding is not None:
        # only same-sized tensors can be compared; a misshapen embedding is reported below
        tied = checkpoint[head].shape != checkpoint[embedding].shape or checkpoint.same(head, embedding)
    if tied and head is not None and embedding is None:
        found["model.decoder.embed_tokens.weight"] = head  # safetensors keeps one of a tied pair, not always the same
    if not tied and head is not None:
        found["lm_head.weight"] = head

    specs = {spec.name: spec for spec in table(config)}
    if not tied:
        specs["lm_head.weight"] = Spec("lm_head", "linear", (config.vocab_size, config.embed_dim))
    for name, spec in specs.items():
        if name not in found:
            wrong.append(f"{name}: missing, wanted {list(spec.shape)}")
            continue
        entry = checkpoint[found[name]]
        if tuple(entry.shape) != spec.shape:
            wrong.append(f"{found[name]}: found shape {list(entry.shape)}, wanted {list(spec.shape)}")
        if entry.dtype not in FLOATS:
            wrong.append(f"{found[name]}: found dtype {entry.dtype}, wanted one of {', '.join(FLOATS)}")
    wrong += [f"{found[name]}: unexpected, no such tensor in this OPT" for name in found if name not in specs]
    return {name: found[name] for name in specs if name in found}, tied, wrong
