"""`from_pretrained` and `save_pretrained`, less what each framework does with an array."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, save_checkpoint
from .config import DTYPES, OPTConfig
from .hub import fetch_checkpoint
from .progress import byte_bar
from .tensors import MAX_SHARD_SIZE, Source
from .weights import Spec, match, table


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint: its config, the dtype to load in, and its tensors in the order of the table, read one at a
    time as they are asked for."""

    config: OPTConfig
    dtype: str
    tensors: Iterator[tuple[Spec, np.ndarray]]


def open_pretrained(path_or_name: str | Path, prefix: str, dtype: str, copied: bool = False, **hub: Any) -> Pretrained:
    """Find, open and check a checkpoint; no tensor is read yet.

    `prefix` is the table's: "model." for OPTForCausalLM, "" for OPTModel. `dtype` is a name, or "auto" for the
    checkpoint's own. `copied`: the caller copies each array elsewhere and lets it go, so it may be a map of the file.
    `hub`: see `opt_common.hub.fetch`. Raises before anything is allocated.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"dtype: found {dtype!r}, wanted 'auto' or one of {', '.join(DTYPES)}")
    folder = fetch_checkpoint(path_or_name, **hub)
    checkpoint = Checkpoint(folder)
    config = OPTConfig.from_pretrained(folder)
    names, tied = match(checkpoint, config)
    if config.tie_word_embeddings and not tied:
        warnings.warn(f"{folder}: lm_head.weight differs from embed_tokens.weight, so they are not tied", stacklevel=3)
    dtype = checkpoint.dtype if dtype == "auto" else dtype
    config = dataclasses.replace(config, tie_word_embeddings=tied, dtype=dtype)

    def tensors() -> Iterator[tuple[Spec, np.ndarray]]:
        specs = [(spec, checkpoint[names[("" if prefix else "model.") + spec.name]]) for spec in table(config, prefix)]
        with byte_bar(f"Loading {folder.name}", sum(entry.nbytes for _, entry in specs)) as advance:
            for spec, entry in specs:
                yield spec, entry.map() if copied else entry.read()
                advance(entry.nbytes)

    return Pretrained(config, dtype, tensors())


def save_pretrained(
    folder: str | Path,
    config: OPTConfig,
    prefix: str,
    dtype: str,
    get: Callable[[Spec], np.ndarray],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write config.json, generation_config.json and safetensors that transformers loads; see `save_checkpoint`.

    `get` returns the array of a tensor in the checkpoint's orientation and in `dtype`.
    """
    config = dataclasses.replace(config, dtype=dtype)
    sources = [Source(s.name, s.shape, dtype, lambda s=s: get(s)) for s in table(config, prefix)]
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {"config.json": config.to_json(), "generation_config.json": json.dumps(ids, indent=2) + "\n"}
    with byte_bar(f"Saving {Path(folder).name}", sum(source.nbytes for source in sources)) as advance:
        save_checkpoint(folder, sources, texts, max_shard_size, advance)
