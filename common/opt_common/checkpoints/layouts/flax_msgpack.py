"""transformers' Flax weights: `flax_model.msgpack`, or shards with `flax_model.msgpack.index.json`."""

from __future__ import annotations

from ..containers import msgpack
from .layout import Container, hub_layout
from .names import FLAX_PATH_NAMES

FLAX_MSGPACK = hub_layout("flax_model.msgpack", Container(msgpack.read, msgpack.write, msgpack.size), FLAX_PATH_NAMES)
