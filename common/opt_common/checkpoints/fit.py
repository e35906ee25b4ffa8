"""Matches the tensors of a checkpoint with the table of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from ..config import DTYPES, OPTConfig
from ..weights import HEADS, is_head, table

SHOWN = 10  # misfits in an error
_WHOLE = {"packed": ("int32",), "shape": ("int64", "int32")}


class Stored(Protocol):
    """What `match` needs of a checkpoint: a mapping from names to entries with .shape and .dtype, and its path."""

    path: Any

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> Any: ...
    def same(self, first: str, second: str) -> bool: ...


def stored_architecture(checkpoint: Stored) -> str:
    """Which of HEADS a checkpoint holds, by its tensors; OPTForCausalLM, whose head may be tied, by default."""
    modules = {name.split(".")[0] for name in checkpoint}
    return next((name for name in list(HEADS)[2:] if HEADS[name] in modules), "OPTForCausalLM")


def match(
    checkpoint: Stored,
    config: OPTConfig,
    architecture: str | None = None,
    fewer_layers: bool = False,
    resized_heads: bool = False,
    added: Collection[str] = (),
) -> tuple[dict[str, str], bool]:
    """The stored name of each tensor of the table.

    Accepts the Hub's two spellings, `model.decoder.` and `decoder.`, and a head that is present, absent or untied.
    Returns {name in the table: name in the checkpoint} and whether the head is tied. A stored head that differs from
    the embedding is untied whatever the config says, as in transformers 5.
    `architecture`: whose table, the checkpoint's by default. If it is another, the stored head is ignored, and `score`
    or `qa_outputs` may be missing; the result then lacks their names. An OPTModel's begin with "model." here.

    `fewer_layers`: whether the checkpoint may hold more layers than the config; the last are then ignored.
    `resized_heads`: whether a stored head may have another shape; it is then ignored. `added`: names that it may hold
    besides the table's.

    Raises ValueError that counts the missing, unexpected, repeated, misshapen and wrongly typed tensors and names the
    first ten; `compare` gives all.
    """
    names, tied, wrong = compare(checkpoint, config, architecture, fewer_layers, resized_heads, added)
    if wrong:
        more = [f"and {len(wrong) - SHOWN} more: opt-zoo inspect --json lists all"] if len(wrong) > SHOWN else []
        shown = "\n  ".join([*wrong[:SHOWN], *more])
        raise ValueError(f"{checkpoint.path}: {len(wrong)} tensor(s) do not fit the config:\n  {shown}")
    return names, tied


def compare(
    checkpoint: Stored,
    config: OPTConfig,
    architecture: str | None = None,
    fewer_layers: bool = False,
    resized_heads: bool = False,
    added: Collection[str] = (),
) -> tuple[dict[str, str], bool, list[str]]:
    """As `match`, with the mismatches as a list of sentences; the names are those of the tensors found."""
    layers, tensors = config.num_hidden_layers, len(list(checkpoint))
    if layers > tensors:  # before making a table as long as an untrusted config.json says
        return {}, config.tie_word_embeddings, [f"num_hidden_layers: found {layers}, but it holds {tensors} tensors"]
    stored = stored_architecture(checkpoint)
    wanted = architecture or stored
    found: dict[str, str] = {}
    wrong: list[str] = []
    for name in checkpoint:
        # "decoder.version" is metaseq's, and old conversions kept it
        plain = name.removeprefix("model.")
        if plain == "decoder.version":
            continue
        full = plain if is_head(plain) else f"model.{plain}"
        if full in found:
            wrong.append(f"{full}: appears twice, as {found[full]} and {name}")
        found[full] = name

    lm_head, embedding = found.pop("lm_head.weight", None), found.get("model.decoder.embed_tokens.weight")
    tied = config.tie_word_embeddings
    if tied and lm_head is not None and embedding is not None:
        # only same-sized tensors can be compared; a misshapen embedding is reported below
        tied = checkpoint[lm_head].shape != checkpoint[embedding].shape or checkpoint.same(lm_head, embedding)
    if tied and lm_head is not None and embedding is None:
        # safetensors keeps one of a tied pair, not always the same
        found["model.decoder.embed_tokens.weight"] = lm_head
    if not tied and lm_head is not None:
        found["lm_head.weight"] = lm_head

    config, bare = dataclasses.replace(config, tie_word_embeddings=tied), "model." if wanted == "OPTModel" else ""
    try:
        specs = {f"{bare}{spec.name}": spec for spec in table(config, wanted)}
    except ValueError as error:  # a Linear that cannot be quantized as the config says
        return {}, tied, [str(error)]
    for name, spec in specs.items():
        if name not in found:
            if wanted == stored or name == "lm_head.weight" or not is_head(name):
                wrong.append(f"{name}: missing, wanted {list(spec.shape)}")
            continue
        entry = checkpoint[found[name]]
        if tuple(entry.shape) != spec.shape and resized_heads and is_head(name):
            del found[name]
            continue
        if tuple(entry.shape) != spec.shape:
            wrong.append(f"{found[name]}: found shape {list(entry.shape)}, wanted {list(spec.shape)}")
        if entry.dtype not in (dtypes := _WHOLE.get(spec.kind, DTYPES)):
            wrong.append(f"{found[name]}: found dtype {entry.dtype}, wanted one of {', '.join(dtypes)}")
    for name in found:
        spare = fewer_layers and layer_number(name) >= layers
        if name not in specs and not spare and not (architecture and is_head(name)) and found[name] not in added:
            wrong.append(f"{found[name]}: unexpected, no such tensor in this OPT")
    return {name: found[name] for name in specs if name in found}, tied, wrong


def layer_number(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 if none."""
    number = name.partition(".layers.")[2].partition(".")[0]
    return int(number) if number.isdecimal() else -1
