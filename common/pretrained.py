"""`from_pretrained` and `save_pretrained`, less what each framework does with an array."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, recognize, save_checkpoint
from .config import DTYPES, OPTConfig
from .hub import fetch_checkpoint
from .layouts import LAYOUTS
from .progress import byte_bar
from .tensors import MAX_SHARD_SIZE, Source, contiguous
from .weights import Spec, match, table


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint and its config, checked against each other: where each tensor of the table lies, and whether the
    head is tied."""

    checkpoint: Checkpoint
    config: OPTConfig
    names: dict[str, str]
    tied: bool


def open_checkpoint(
    path_or_name: str | Path, layout: str | None = None, prefer: bool = False, companions: bool = False, **hub: Any
) -> Opened:
    """Find, open and check a checkpoint; no tensor is read, nothing of its size is allocated.

    `path_or_name`: a folder, a weight file with its config.json beside it, "opt-demo", or a Hub name.
    `layout`: one of `opt_common.layouts.LAYOUTS`, or None for the one that is there. Of several, `prefer` takes the
    first: safetensors, then PyTorch's, then the others in the order of LAYOUTS; otherwise they are an error. Of a Hub
    repository the preferred one is taken, which alone is fetched. `companions` fetches its tokenizer too.
    Raises FileNotFoundError and ValueError as `fetch`, `Checkpoint`, `OPTConfig.from_pretrained` and `match` do.
    """
    checkpoint, config = find_checkpoint(path_or_name, layout, prefer, companions, **hub)
    names, tied = match(checkpoint, config)
    return Opened(checkpoint, config, names, tied)


def find_checkpoint(
    path_or_name: str | Path, layout: str | None = None, prefer: bool = False, companions: bool = False, **hub: Any
) -> tuple[Checkpoint, OPTConfig]:
    """As `open_checkpoint`, but the two are not checked against each other."""
    path = fetch_checkpoint(path_or_name, layout, companions, **hub)
    if prefer or not Path(path_or_name).expanduser().exists():  # what was fetched earlier lies beside it in the cache
        layout = layout or next(iter(recognize(path)))
    checkpoint = Checkpoint(path, layout)
    own = getattr(LAYOUTS[checkpoint.layout], "config", lambda main, tensors: None)(checkpoint.main, checkpoint)
    if own is None and not (checkpoint.folder / "config.json").is_file():
        raise FileNotFoundError(f"{checkpoint.folder}: no config.json; wanted one beside the weights of an OPT")
    return checkpoint, own or OPTConfig.from_pretrained(checkpoint.folder)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An opened checkpoint: its config, the dtype to load in, and its tensors in the order of the table, read one at a
    time as they are asked for."""

    config: OPTConfig
    dtype: str
    tensors: Iterator[tuple[Spec, np.ndarray]]


def open_pretrained(
    path_or_name: str | Path, prefix: str, dtype: str, copied: bool = False, layout: str | None = None, **hub: Any
) -> Pretrained:
    """Find, open and check a checkpoint; no tensor is read yet.

    `prefix` is the table's: "model." for OPTForCausalLM, "" for OPTModel. `dtype` is a name, or "auto" for the
    checkpoint's own. `copied`: the caller copies each array elsewhere and lets it go, so it may be a map of the file.
    `layout`: which to read of several, as on the Hub; the preferred one by default (`open_checkpoint`).
    `hub`: see `opt_common.hub.fetch`. Raises before anything is allocated.
    """
    if dtype not in (*DTYPES, "auto"):
        raise ValueError(f"dtype: found {dtype!r}, wanted 'auto' or one of {', '.join(DTYPES)}")
    opened = open_checkpoint(path_or_name, layout, prefer=True, **hub)
    checkpoint, config, names, tied = opened.checkpoint, opened.config, opened.names, opened.tied
    path = checkpoint.path
    if config.tie_word_embeddings and not tied:
        warnings.warn(f"{path}: lm_head.weight differs from embed_tokens.weight, so they are not tied", stacklevel=3)
    dtype = checkpoint.dtype if dtype == "auto" else dtype
    config = dataclasses.replace(config, tie_word_embeddings=tied, dtype=dtype)

    def tensors() -> Iterator[tuple[Spec, np.ndarray]]:
        specs = [(spec, checkpoint[names[("" if prefix else "model.") + spec.name]]) for spec in table(config, prefix)]
        with byte_bar(f"Loading {path.name}", sum(entry.nbytes for _, entry in specs)) as advance:
            for spec, entry in specs:
                yield spec, contiguous(entry.map() if copied else entry.read())
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
