"""Orbax checkpoints of opt_flax: `StandardCheckpointer().save(folder, nnx.state(model))`.

Each array is the value of a variable, named by the variable's path. Reading skips whatever else a training state holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ...config import OPTConfig
from ...files import abridged
from ...weights import FLAX, HEADS, Spec
from ..containers import zarr
from ..tensors import Entry, Source
from .layout import Layout, Progress
from .names import Names

_FILE = "_METADATA"
_EMBEDDING = re.compile(r"((?:.+\.)??)(?:model\.)?decoder\.embed_tokens\.embedding(?:\.value)?")


def _normalize(stored: str) -> str:
    # the bare model's decoder is at the top
    return re.sub(r"^decoder\.", "model.decoder.", stored.removesuffix(".value")) + ".value"


def _value(spec: Spec) -> str:
    return f"{FLAX.name(spec)}.value"


_NAMES = Names("opt_flax", FLAX, _value, "layers.0.", "layers.{}.", _normalize)


def _find(path: Path) -> Path | None:
    main = path if path.is_file() else path / _FILE
    return main if main.name == _FILE and main.is_file() else None


def _read(main: Path) -> tuple[list[Path], dict[str, Entry]]:
    store = zarr.Store(main)
    found = sorted(
        {match[1] for name in store.names if (match := _EMBEDDING.fullmatch(name))},
        key=lambda prefix: (_depth(prefix), prefix),
    )
    if not found:
        there = abridged(sorted(store.names)) or "none"
        raise ValueError(f"{main}: holds no array decoder.embed_tokens.embedding; found: {there}")
    if len(found) > 1 and _depth(found[0]) == _depth(found[1]):  # an optimizer's moments are nested deeper
        raise ValueError(f"{main}: holds several models: {abridged(prefix or 'at its top' for prefix in found)}")
    root = found[0]
    own = [name for name in sorted(store.names) if name.startswith(root) and _is_model(name.removeprefix(root))]
    entries = {name.removeprefix(root): entry for name, entry in store.read(own).items()}
    return store.files, _NAMES.to_hub(main, entries)


def _depth(prefix: str) -> int:
    return prefix.count(".")


def _is_model(name: str) -> bool:
    return name.split(".")[0] in ("model", "decoder", *HEADS.values())


def _write(
    folder: Path, tensors: Sequence[Source], config: OPTConfig | None, limit: int, advance: Progress
) -> list[str]:
    """A folder per array, whatever `limit`."""
    names, stored = [], [_NAMES.to_stored(t) for t in tensors]
    for t in stored:
        chunk = zarr.write(folder / t.name, t)
        names.append(f"{t.name}/{chunk.name}")
        advance(t.nbytes)
    for name, text in _texts(stored).items():
        (folder / name).write_text(text)
    return names


def _plan(tensors: Sequence[Source], config: OPTConfig | None, limit: int) -> list[tuple[str, int]]:
    stored = [_NAMES.to_stored(t) for t in tensors]
    files = [(name, len(text)) for name, text in _texts(stored).items()]
    return files + [(f"{t.name}/{name}", size) for t in stored for name, size in zarr.sizes(t)]


def _texts(tensors: Sequence[Source]) -> dict[str, str]:
    """What Orbax wants beside the arrays: the tree of which they are the leaves, and what wrote it."""
    tree = {}
    for t in tensors:
        keys = tuple(t.name.split("."))
        tree[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(t.shape)},
        }
    handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    return {
        "_METADATA": json.dumps({"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False}),
        "_CHECKPOINT_METADATA": json.dumps({"item_handlers": handler, "metrics": {}, "custom_metadata": {}}),
    }


ORBAX = Layout(
    main=(_FILE,),
    find=_find,
    read=_read,
    write=_write,
    plan=_plan,
    beside=("manifest.ocdbt", "d/*", "ocdbt.process_*/*", "*/.zarray", "*/[0-9]*"),
    headed=True,
)
