"""`from_pretrained` and `save_pretrained`, less what each framework does with an array."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DTYPES, OPTConfig
from ..hub import FETCH_OPTIONS
from ..progress import byte_bar
from ..weights import Spec, head, is_head, table
from .open import open_checkpoint
from .save import save_checkpoint
from .shards import MAX_SHARD_SIZE
from .tensors import Source, contiguous

# keys of a config that `from_pretrained` takes in place of the checkpoint's
_FIELDS = {field.name for field in dataclasses.fields(OPTConfig)}
CHANGEABLE = _FIELDS - {"unknown", "dtype", "_attn_implementation"} | {"id2label", "label2id"}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint: its config, the dtype to load in, its tensors in the order of the table, read one at a
    time as they are asked for, and those of the head that it does not hold, for the framework to draw."""

    config: OPTConfig
    dtype: str
    tensors: Iterator[tuple[Spec, np.ndarray]]
    new: list[Spec]


def open_pretrained(
    path_or_name: str | Path,
    architecture: str,
    dtype: str,
    copied: bool = False,
    layout: str | None = None,
    **options: Any,
) -> Pretrained:
    """Find, open and check a checkpoint; no tensor is read yet.

    `architecture`: one of `weights.HEADS`. `dtype` is a name, or "auto" for the checkpoint's own. `copied`: the caller
    copies each array elsewhere and lets it go, so it may be a map of the file. `layout`: which to read of several, as
    on the Hub; the preferred one by default (`open_checkpoint`). `options`: keys of the config that are to be others
    (`num_labels`, `dropout` ...), and what `opt_common.hub.fetch` takes.
    Warns, in one line, of a head that is not used, and of one that the checkpoint does not hold. Raises before anything
    is allocated.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"dtype: found {dtype!r}, wanted 'auto' or one of {', '.join(DTYPES)}")
    unknown = sorted(options.keys() - CHANGEABLE - {*FETCH_OPTIONS})
    if unknown:
        raise TypeError(f"from_pretrained: found argument {unknown[0]!r}, wanted one of the config's or the Hub's")
    changes = {key: options.pop(key) for key in [*options] if key in CHANGEABLE}
    opened = open_checkpoint(path_or_name, layout, prefer=True, architecture=architecture, changes=changes, **options)
    checkpoint, config, names, tied = opened.checkpoint, opened.config, opened.names, opened.tied
    path, there = checkpoint.path, set(names.values())
    if architecture == "OPTForCausalLM" and config.tie_word_embeddings and not tied:
        warnings.warn(f"{path}: lm_head.weight differs from embed_tokens.weight, so they are not tied", stacklevel=3)
    dtype = checkpoint.dtype if dtype == "auto" else dtype
    config = dataclasses.replace(config, tie_word_embeddings=tied, dtype=dtype)
    bare = "model." if architecture == "OPTModel" else ""
    stored = [(spec, names[bare + spec.name]) for spec in table(config, architecture) if bare + spec.name in names]
    new = [spec for spec in head(config, architecture) if spec.name not in names]
    unused = [
        name for name in checkpoint if is_head(name) and name not in there and not (tied and name == "lm_head.weight")
    ]
    for what, named in (("newly initialized, so train before use", [s.name for s in new]), ("not used", unused)):
        if named:
            warnings.warn(f"{path}: {what}: {', '.join(named)}", stacklevel=3)

    def tensors() -> Iterator[tuple[Spec, np.ndarray]]:
        entries = [(spec, checkpoint[name]) for spec, name in stored]
        with byte_bar(f"Loading {path.name}", sum(entry.nbytes for _, entry in entries)) as advance:
            for spec, entry in entries:
                yield spec, contiguous(entry.map() if copied else entry.read())
                advance(entry.nbytes)

    return Pretrained(config, dtype, tensors(), new)


def save_pretrained(
    folder: str | Path,
    config: OPTConfig,
    architecture: str,
    dtype: str,
    get: Callable[[Spec], np.ndarray],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write config.json, generation_config.json and safetensors that transformers loads; see `save_checkpoint`.

    `get` returns the array of a tensor in the checkpoint's orientation and in `dtype`.
    """
    unknown = {**config.unknown, "architectures": [architecture]}
    config = dataclasses.replace(config, dtype=dtype, unknown=unknown)
    sources = [Source(s.name, s.shape, dtype, lambda s=s: get(s)) for s in table(config, architecture)]
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    texts = {"config.json": config.to_json(), "generation_config.json": json.dumps(ids, indent=2) + "\n"}
    with byte_bar(f"Saving {Path(folder).name}", sum(source.nbytes for source in sources)) as advance:
        save_checkpoint(folder, sources, texts, max_shard_size, advance)
