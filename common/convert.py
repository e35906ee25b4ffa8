"""From one checkpoint folder to another, tensor by tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from .checkpoint import Checkpoint, save_checkpoint
from .config import DTYPES, OPTConfig
from .hub import fetch_checkpoint
from .progress import byte_bar
from .tensors import MAX_SHARD_SIZE, Entry, Source, numpy_dtype
from .weights import match, table

# What a checkpoint folder holds beside config and weights, and takes along.
COMPANIONS = (
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def convert(
    source: str | Path, target: str | Path, dtype: str | None = None, max_shard_size: int | str = MAX_SHARD_SIZE
) -> list[Path]:
    """Write the checkpoint `source` (anything `from_pretrained` takes) as Hub safetensors into the folder `target`,
    with its config, generation config and tokenizer. Returns the weight files.

    `dtype` casts every tensor; by default each keeps its own. One tensor is in memory at a time.
    Raises ValueError, leaving `target` as it was, for a tensor that does not fit or overflows in `dtype`.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: found {dtype!r}, wanted one of {', '.join(DTYPES)}")
    folder = fetch_checkpoint(source)
    if Path(target).resolve() == folder.resolve():
        raise ValueError(f"{target}: is the source too; wanted another folder")
    checkpoint, config = Checkpoint(folder), OPTConfig.from_pretrained(folder)
    names, tied = match(checkpoint, config)
    config = dataclasses.replace(config, tie_word_embeddings=tied, dtype=dtype or checkpoint.dtype)
    entries = [(spec, checkpoint[names[spec.name]]) for spec in table(config)]
    sources = [
        Source(spec.name, spec.shape, dtype or entry.dtype, lambda n=spec.name, e=entry: _cast(n, e, dtype))
        for spec, entry in entries
    ]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in COMPANIONS if (folder / name).is_file()}
    with byte_bar(f"Converting {folder.name}", sum(s.nbytes for s in sources)) as advance:
        return save_checkpoint(target, sources, {"config.json": config.to_json(), **texts}, max_shard_size, advance)


def _cast(name: str, entry: Entry, dtype: str | None) -> np.ndarray:
    array = entry.read()
    if dtype is None:
        return array
    with np.errstate(over="ignore"):  # told below, by name
        cast = array.astype(numpy_dtype(dtype))
    lost = int(np.isinf(cast).sum() - np.isinf(array).sum())
    if lost:
        raise ValueError(f"{name}: {lost} of {array.size} numbers overflow {dtype}; bfloat16 or float32 can hold them")
    return cast
