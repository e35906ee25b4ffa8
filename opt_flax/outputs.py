"""Outputs, and the config, registered as pytrees: jit and the other transformations take a call's result and a model
apart and put them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from operator import itemgetter
from typing import Any

from flax import nnx
from jax.tree_util import DictKey, register_pytree_node, register_pytree_with_keys

from opt_common.config import OPTConfig
from opt_common.outputs import OUTPUTS, ModelOutput


def _register(cls: type[ModelOutput]) -> None:
    def flatten_with_keys(output: ModelOutput) -> tuple[list[Any], tuple[str, ...]]:
        return [(DictKey(name), value) for name, value in output.items()], tuple(output)

    def unflatten(names: tuple[str, ...], values: Iterable[Any]) -> ModelOutput:
        output = cls()
        output.update(zip(names, values, strict=True))  # not through __init__: among shardings, say, None is a value
        return output

    register_pytree_with_keys(cls, flatten_with_keys, unflatten)


for _cls in OUTPUTS:
    _register(_cls)


_values = itemgetter(*(f.name for f in fields(OPTConfig) if f.hash is not False))


def _flatten(config: OPTConfig) -> tuple[tuple[()], tuple[OPTConfig, tuple[Any, ...]]]:
    return (), (config, _values(vars(config)))


# A config holds no arrays. As a node that is made of its values, a program that was compiled for a model is not taken
# for one whose config has been changed since; as an attribute like others, jit would know it by the object alone.
register_pytree_node(OPTConfig, _flatten, lambda seen, _: seen[0])
nnx.register_data_type(OPTConfig)
