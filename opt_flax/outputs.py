"""Outputs, registered as pytrees: jit and the other transformations take a call's result apart and put it together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jax.tree_util import DictKey, register_pytree_with_keys

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
